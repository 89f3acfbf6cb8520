"""Checkpoints: official `.pth` and `.safetensors` files to and from an RWKV7 module.

Files are memory-mapped and only ever read as tensors; nothing is unpickled that could run code.
Shapes come from the file and are checked against the model config.
"""

from __future__ import annotations

import hashlib
import os
import pickle
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from config.schema import ModelConfig
from engine.errors import WeightsError
from engine.model.mapped import FilePages
from engine.model.quantize import quantize, replace_linears
from engine.model.rwkv7 import RWKV7, ModelDims

SAMPLES_AT_ONCE = 1 << 12  # so that not all of a mapped tensor is in memory
FINGERPRINT_SAMPLES = 1 << 16  # elements hashed per tensor; a tuned weight cannot hide from it

# Names that tell other architectures of the family apart from x070.
_FOREIGN = {
    "att.time_decay": "an RWKV-4, 5 or 6 checkpoint",
    "att.time_maa_x": "an RWKV-6 checkpoint",
    "ffn.s_emb.weight": "an RWKV-7a checkpoint (DeepEmbed)",
    "qkv.qq.weight": "an RWKV-7b checkpoint",
}
_UNUSED = ("att.v0", "att.v1", "att.v2")  # of block 0: present or not, never used


def load_checkpoint(path: Path) -> dict[str, Tensor]:
    """Tensors by official name, memory-mapped on the CPU. Raises WeightsError."""
    if not path.is_file():
        raise WeightsError(f"weights_path: no such file: {path}")
    try:
        if path.suffix == ".safetensors":
            tensors = load_file(path)
        else:
            tensors = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise WeightsError(
            f"weights_path: {path} is not a readable checkpoint ({reason}); it may be truncated: "
            "compare its size with the original, or download it again"
        ) from error
    if not isinstance(tensors, dict) or not all(isinstance(t, Tensor) for t in tensors.values()):
        raise WeightsError(f"weights_path: {path} holds something else than a dict of tensors")
    return dict(tensors)


def save_safetensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a servable checkpoint: temporary file, fsync, rename, so readers see all or nothing."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode  # by umask; save_file would leave it private
        save_file(
            {name: t.detach().contiguous() for name, t in tensors.items()},
            temporary,
            metadata=dict(metadata or {}),
        )
        temporary.chmod(mode)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def dims_of(tensors: Mapping[str, Tensor], source: Path | str) -> ModelDims:
    """Read all dimensions off the shapes. Raises WeightsError when it is not RWKV-7."""
    for suffix, what in _FOREIGN.items():
        if f"blocks.0.{suffix}" in tensors:
            raise WeightsError(f"{source} is {what}; this engine serves RWKV-7 (x070)")
    try:
        layers = {int(name.split(".")[1]) for name in tensors if name.startswith("blocks.")}
        last = f"blocks.{max(layers)}."
        heads, head_size = tensors["blocks.0.att.r_k"].shape
        vocab_size, embedded_dim = tensors["emb.weight"].shape
        dims = ModelDims(
            num_cells=len(layers),
            vocab_size=vocab_size,
            embedded_dim=embedded_dim,
            head_size=head_size,
            ffn_dim=tensors["blocks.0.ffn.key.weight"].shape[0],
            w_lora_rank=tensors["blocks.0.att.w1"].shape[1],
            a_lora_rank=tensors["blocks.0.att.a1"].shape[1],
            v_lora_rank=tensors[f"{last}att.v1"].shape[1],
            g_lora_rank=tensors["blocks.0.att.g1"].shape[1],
        )
    except (KeyError, ValueError, IndexError) as error:
        raise WeightsError(
            f"{source} has not the tensors of an RWKV-7 checkpoint (missing or odd: {error}); "
            f"it has {', '.join(sorted(tensors)[:4])}, ..."
        ) from error
    if heads * head_size != embedded_dim:
        raise WeightsError(
            f"{source}: r_k has {heads} heads of {head_size}, which is not the width {embedded_dim}"
        )
    return dims


def check_config(dims: ModelDims, cfg: ModelConfig, source: Path | str) -> None:
    """Raise WeightsError naming every dimension in which the file and the config differ."""
    expected = ModelDims.from_config(cfg)
    # Ranks left out of the config come from a formula that released checkpoints do not follow:
    # only those it writes down are a claim about the file.
    keys = [
        f.name
        for f in fields(ModelDims)
        if not f.name.endswith("_rank") or getattr(cfg, f.name) is not None
    ]
    wrong = [
        f"{key}: config {getattr(expected, key)}, file {getattr(dims, key)}"
        for key in keys
        if getattr(expected, key) != getattr(dims, key)
    ]
    if wrong:
        raise WeightsError(
            f"{source} does not fit model config '{cfg.name}': {'; '.join(wrong)}. "
            "Set model_cfg to the config of this checkpoint."
        )


def read_checkpoint(path: Path, cfg: ModelConfig) -> tuple[ModelDims, dict[str, Tensor]]:
    """All tensors of a model by official name, in their official shapes, memory-mapped.

    What block 0 has and never uses is zeros. Raises WeightsError for a file that does not fit.
    """
    tensors = load_checkpoint(path)
    dims = dims_of(tensors, path)
    check_config(dims, cfg, path)
    with torch.device("meta"):
        expected = RWKV7(dims).state_dict()
    _fill_unused(tensors, expected)
    missing, extra = expected.keys() - tensors.keys(), tensors.keys() - expected.keys()
    if missing or extra:
        raise WeightsError(
            f"{path}: {_some('missing', missing)}{_some('unexpected', extra)}".rstrip("; ")
        )
    for name, meta in expected.items():
        shape = tensors[name].shape
        if shape.numel() != meta.shape.numel() or shape[-1:] != meta.shape[-1:]:
            raise WeightsError(
                f"{path}: {name} has shape {tuple(shape)}, expected {tuple(meta.shape)}"
            )
    return dims, {name: tensors[name].reshape(meta.shape) for name, meta in expected.items()}


def load_model(
    path: Path,
    cfg: ModelConfig,
    device: torch.device | str,
    dtype: torch.dtype,
    is_int8: bool = False,
) -> RWKV7:
    """A module with the file's weights on `device` in `dtype`, ready for inference.

    With `is_int8` its matrices are quantized, one by one as they are read; all else, activations
    included, is of `dtype`.
    """
    dims, tensors = read_checkpoint(path, cfg)
    with torch.device("meta"):
        model = RWKV7(dims)
    try:
        return _with_weights(model, tensors.items(), device, dtype, is_int8)
    except ValueError as error:
        raise WeightsError(f"{path}: {error}; use another dtype than int8") from error


def dummy_tensors(cfg: ModelConfig, seed: int = 0) -> dict[str, Tensor]:
    """The weights of `dummy_model`, by name, in bfloat16 as checkpoints are."""
    with torch.device("meta"):
        expected = RWKV7(ModelDims.from_config(cfg)).state_dict()
    return dict(_random_weights(expected, "cpu", torch.bfloat16, seed))


def dummy_model(
    cfg: ModelConfig,
    device: torch.device | str,
    dtype: torch.dtype,
    seed: int = 0,
    is_int8: bool = False,
) -> RWKV7:
    """Random weights of the right shape and a sane scale, for load tests without a download."""
    with torch.device("meta"):
        model = RWKV7(ModelDims.from_config(cfg))
    named = _random_weights(model.state_dict(), device, dtype, seed)
    return _with_weights(model, named, device, dtype, is_int8)


def _random_weights(
    expected: Mapping[str, Tensor], device: torch.device | str, dtype: torch.dtype, seed: int
) -> Iterator[tuple[str, Tensor]]:
    generator = torch.Generator(device=device).manual_seed(seed)
    for name, meta in expected.items():
        value = torch.empty(meta.shape, device=device, dtype=dtype)
        if name.endswith("weight") and meta.dim() == 1:  # norms
            value.fill_(1.0)
        elif meta.dim() == 2 and not name.endswith("r_k"):
            value.normal_(0.0, meta.shape[-1] ** -0.5, generator=generator)
        else:
            value.uniform_(-0.5, 0.5, generator=generator)
        yield name, value


def _with_weights(
    model: RWKV7,
    named: Iterable[tuple[str, Tensor]],
    device: torch.device | str,
    dtype: torch.dtype,
    is_int8: bool,
) -> RWKV7:
    """Give a module of shapes only its weights, each taken when the one before is in its place."""
    matrices = {
        f"{name}.weight"
        for name, x in model.named_modules()
        if isinstance(x, nn.Linear) and is_int8
    }
    weights = {}
    for name, value in named:
        if name in matrices:
            try:
                packed = quantize(value, device)
            except ValueError as error:
                raise ValueError(f"{name} {error}") from error
            weights[name], weights[f"{name.removesuffix('weight')}scale"] = packed
        else:
            # A copy even where nothing is converted: a mapped file may be replaced under our feet.
            weights[name] = value.to(device=device, dtype=dtype, copy=True)
    if is_int8:
        replace_linears(model)
    model.load_state_dict(weights, assign=True)
    return model.requires_grad_(False).eval()


def fingerprint(tensors: Mapping[str, Tensor], kind: str = "") -> str:
    """16 hex digits that change with any weight matrix, shape or dtype of a model.

    `kind` is whatever else tells its results from those of another with the same weights.
    """
    digest = hashlib.blake2b(kind.encode(), digest_size=8)
    pages = FilePages()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        flat = tensor.reshape(-1)
        step = max(1, flat.numel() // FINGERPRINT_SAMPLES)
        for part in flat.split(step * SAMPLES_AT_ONCE):
            digest.update(part[::step].double().cpu().numpy().tobytes())
            pages.release(part)
    return digest.hexdigest()


def _fill_unused(tensors: dict[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    for suffix in _UNUSED:
        name = f"blocks.0.{suffix}"
        dtype = tensors["emb.weight"].dtype
        tensors[name] = torch.zeros(expected[name].shape, dtype=dtype)


def _some(what: str, names: set[str]) -> str:
    if not names:
        return ""
    listed = ", ".join(sorted(names)[:5]) + (", ..." if len(names) > 5 else "")
    return f"{len(names)} {what} tensors ({listed}); "
