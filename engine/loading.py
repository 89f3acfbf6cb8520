"""The model of a table: which device, which number format, which code computes it; and loads it."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, replace
from importlib.util import find_spec

import torch
from torch import Tensor

from config import ModelTable
from engine.errors import InvalidRequest, WeightsError
from engine.kernels.backend import INT8_GROUP
from engine.kernels.choice import choose_backend
from engine.model.quantize import can_quantize
from engine.model.rwkv7 import RWKV7, ModelDims
from engine.model.served import ServedModel
from engine.model.weights import (
    dummy_model,
    dummy_tensors,
    fingerprint,
    load_model,
    read_checkpoint,
)
from engine.state.layout import PageLayout
from engine.trial import take_backend

logger = logging.getLogger(__name__)

FUSED_DTYPES = ("auto", "bfloat16", "float32", "int8")
FUSED_HEAD_SIZES = 16  # they are multiples of it


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model that is ready to serve, and what to know of it."""

    model: ServedModel
    dtype: str  # of its matrices
    fingerprint: str
    torch_threads: int  # that torch may use beside it
    draw_threads: int = 1  # that draw tokens where the host does


def load_served(table: ModelTable, device: torch.device) -> Loaded:
    """The model, computed by what is quickest there; a line of the log says by what, and why.

    Raises EngineError: a checkpoint that is not there or does not fit.
    """
    reason = _against_fused(table, device)
    if reason is None:
        return _load_fused(table)
    dtype = pick_dtype(table, device)
    model = load(table, device, dtype)
    if device.type == "cpu":
        logger.info("fused kernels: off (%s)", reason)
    take_backend(model, choose_backend(device, model.dims.head_size), device)
    return Loaded(
        model=model,
        dtype="int8" if table.dtype == "int8" else str(dtype).removeprefix("torch."),
        fingerprint=fingerprint(model.state_dict()),
        torch_threads=table.num_threads or max(1, (os.cpu_count() or 1) - 1),
    )


def _load_fused(table: ModelTable) -> Loaded:
    from engine.kernels.cpu.cores import physical_cores
    from engine.model.fused import FusedRWKV7
    from engine.model.pack import pack
    from engine.model.progress import shown

    if table.dtype == "int8":
        _check_int8(table)
    if table.load_format == "dummy":
        dims, tensors = ModelDims.from_config(table.model), dummy_tensors(table.model)
        source = "random weights"
    else:
        assert table.weights_path is not None, "the config loader requires weights_path"
        dims, tensors = read_checkpoint(table.weights_path, table.model)
        source = str(table.weights_path)
    dtype = _lossless(tensors) if table.dtype == "auto" else table.dtype
    num_threads = table.num_threads or physical_cores()
    num_bytes = sum(tensor.nbytes for tensor in tensors.values())
    what = f"{num_bytes >> 20} MiB from {source}, packed as {dtype}"
    try:
        with shown("weights", what, num_bytes) as advance:
            weights = pack(tensors, dims, dtype, num_threads, advance)
    except ValueError as error:
        raise WeightsError(f"{source}: {error}; use another dtype than int8") from error
    model = FusedRWKV7(dims, weights, num_threads)
    return Loaded(
        model=model,
        dtype=dtype,
        fingerprint=fingerprint(tensors, dtype),
        torch_threads=1,
        draw_threads=num_threads,
    )


def _lossless(tensors: dict[str, Tensor]) -> str:
    """Official checkpoints are bfloat16; one that says more than that is kept as it is."""
    matrices = (tensor for tensor in tensors.values() if tensor.dim() == 2)
    is_half = all(matrix.dtype == torch.bfloat16 for matrix in matrices)
    return "bfloat16" if is_half else "float32"


def _against_fused(table: ModelTable, device: torch.device) -> str | None:
    """Why the fused kernels of the CPU cannot compute it; None where they can."""
    if device.type != "cpu":
        return f"device {device.type}"
    if find_spec("numba") is None:
        return "numba is not installed"
    if table.dtype not in FUSED_DTYPES:
        return f"dtype {table.dtype}"
    if table.state_dtype not in ("auto", "float32"):
        return f"state_dtype {table.state_dtype}"
    head_size = table.model.head_size
    if head_size % FUSED_HEAD_SIZES:
        return f"head size {head_size} is no multiple of {FUSED_HEAD_SIZES}"
    if table.dtype == "int8" and 64 % head_size and head_size % 64:
        return f"int8 with head size {head_size}"
    return None


def pick_device(table: ModelTable) -> torch.device:
    """`auto` takes the first listed CUDA device where there is one, else the CPU."""
    has_cuda = torch.cuda.is_available()
    if table.device_type == "cpu" or (table.device_type == "auto" and not has_cuda):
        return torch.device("cpu")
    index = table.device_ids[0]
    if not has_cuda or index >= torch.cuda.device_count():
        raise InvalidRequest(
            f"models.{table.model_name}: device_type = {table.device_type!r}, device_ids = "
            f"{list(table.device_ids)}, but this machine shows {torch.cuda.device_count()} CUDA "
            'devices to torch; use device_type = "cpu" or another id',
            field="device_type",
        )
    return torch.device("cuda", index)


def pick_dtype(table: ModelTable, device: torch.device) -> torch.dtype:
    """Of activations and of weights that are not quantized.

    `auto` is float32 on the CPU, where torch emulates half types and is slower, else bfloat16; so
    it is with `int8`. The fused kernels do not ask: see `load_served`.
    """
    if table.dtype in ("auto", "int8"):
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    dtype: torch.dtype = getattr(torch, table.dtype)
    return dtype


def pick_layout(table: ModelTable, model: ServedModel) -> PageLayout:
    """`auto` is float32, which all else is computed in, or float64 for a float64 model."""
    if table.state_dtype == "auto":
        return model.layout
    return replace(model.layout, wkv_dtype=table.state_dtype)


def load(table: ModelTable, device: torch.device, dtype: torch.dtype) -> RWKV7:
    """The weights of a model table, or random ones with `load_format = "dummy"`."""
    is_int8 = table.dtype == "int8"
    if is_int8:
        _check_int8(table)
    if table.load_format == "dummy":
        return dummy_model(table.model, device, dtype, is_int8=is_int8)
    assert table.weights_path is not None, "the config loader requires weights_path"
    return load_model(table.weights_path, table.model, device, dtype, is_int8)


def _check_int8(table: ModelTable) -> None:
    for width in (table.model.embedded_dim, table.model.ffn_dim):
        if not can_quantize(width):
            raise InvalidRequest(
                f"models.{table.model_name}: dtype = 'int8' needs widths that are multiples of "
                f"{INT8_GROUP}, found {width} in model '{table.model.name}'; use another dtype",
                field="dtype",
            )
