"""Checkpoint files: both formats, every way they can be wrong, and what is never executed."""

from __future__ import annotations

import pickle
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from config.schema import ModelConfig
from engine.errors import WeightsError
from engine.model.rwkv7 import ModelDims
from engine.model.weights import (
    dims_of,
    dummy_model,
    fingerprint,
    load_checkpoint,
    load_model,
    save_safetensors,
)

CFG = ModelConfig(
    name="test", num_cells=2, vocab_size=50, embedded_dim=32, num_heads=2,
    w_lora_rank=8, a_lora_rank=4, v_lora_rank=12, g_lora_rank=16,
)  # fmt: skip


def tensors() -> dict[str, Tensor]:
    return dict(dummy_model(CFG, "cpu", torch.float32, seed=3).state_dict())


def load(path: Path, cfg: ModelConfig = CFG):  # type: ignore[no-untyped-def]
    return load_model(path, cfg, "cpu", torch.float32)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_both_formats_give_the_weights_back(
    tmp_path: Path, suffix: str, dtype: torch.dtype
) -> None:
    saved = {name: t.to(dtype) for name, t in tensors().items()}
    path = tmp_path / f"model{suffix}"
    if suffix == ".pth":
        torch.save(saved, path)
    else:
        save_safetensors(path, saved, {"note": "x"})
    for name, value in load(path).state_dict().items():
        if name.removeprefix("blocks.0.") not in ("att.v0", "att.v1", "att.v2"):
            assert torch.equal(value, saved[name].float()), name


def test_unused_tensors_of_block_0_may_be_absent_or_odd(tmp_path: Path) -> None:
    saved = tensors()
    reference = save(tmp_path / "a.pth", saved)
    saved["blocks.0.att.v1"] = torch.zeros(1)
    del saved["blocks.0.att.v0"], saved["blocks.0.att.v2"]
    other = save(tmp_path / "b.pth", saved)
    assert fingerprint(load(reference).state_dict()) == fingerprint(load(other).state_dict())


def test_flat_vectors_are_accepted_as_the_official_1x1xC(tmp_path: Path) -> None:
    saved = {n: t.flatten() if t.shape[:2] == (1, 1) else t for n, t in tensors().items()}
    flat, official = (
        load(save(tmp_path / "a.pth", saved)),
        load(save(tmp_path / "b.pth", tensors())),
    )
    assert fingerprint(flat.state_dict()) == fingerprint(official.state_dict())


def test_dims_come_from_the_file() -> None:
    assert dims_of(tensors(), "x") == ModelDims.from_config(CFG)


def save(path: Path, saved: object) -> Path:
    torch.save(saved, path)
    return path


def truncate(path: Path) -> Path:
    save(path, tensors())
    path.write_bytes(path.read_bytes()[:-2000])
    return path


def garbage(path: Path) -> Path:
    path.write_bytes(b"\x00garbage" * 100)
    return path


def empty(path: Path) -> Path:
    path.write_bytes(b"")
    return path


def other_architecture(path: Path) -> Path:
    return save(path, tensors() | {"blocks.0.att.time_decay": torch.zeros(2)})


def without_head(path: Path) -> Path:
    saved = tensors()
    del saved["head.weight"]
    return save(path, saved)


def transposed_key(path: Path) -> Path:
    saved = tensors()
    saved["blocks.1.ffn.key.weight"] = saved["blocks.1.ffn.key.weight"].T.contiguous()
    return save(path, saved)


BROKEN: list[tuple[Callable[[Path], Path], str]] = [
    (lambda path: path, "no such file"),
    (truncate, "not a readable checkpoint"),
    (garbage, "not a readable checkpoint"),
    (empty, "not a readable checkpoint"),
    (lambda path: save(path, [1, 2]), "something else than a dict of tensors"),
    (lambda path: save(path, {"a": torch.zeros(2)}), "not the tensors of an RWKV-7"),
    (other_architecture, "RWKV-4, 5 or 6"),
    (without_head, "1 missing tensors (head.weight)"),
    (lambda path: save(path, tensors() | {"extra": torch.zeros(1)}), "1 unexpected tensors"),
    (transposed_key, "blocks.1.ffn.key.weight has shape"),
]


@pytest.mark.parametrize(("make", "message"), BROKEN, ids=[m for _, m in BROKEN])
def test_a_broken_checkpoint_is_one_clear_error(
    tmp_path: Path, make: Callable[[Path], Path], message: str
) -> None:
    path = make(tmp_path / "model.pth")
    with pytest.raises(WeightsError) as caught:
        load(path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("size", [0, 4, 100, 5_000])
def test_a_cut_safetensors_file_is_one_clear_error(tmp_path: Path, size: int) -> None:
    path = tmp_path / "model.safetensors"
    save_safetensors(path, tensors())
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(WeightsError, match="not a readable checkpoint"):
        load(path)


def test_a_mismatch_names_every_dimension_of_config_and_file(tmp_path: Path) -> None:
    path = save(tmp_path / "model.pth", tensors())
    wrong = ModelConfig(name="wrong", num_cells=4, vocab_size=50, embedded_dim=64, num_heads=2)
    with pytest.raises(WeightsError) as caught:
        load(path, wrong)
    for part in ("num_cells: config 4, file 2", "embedded_dim: config 64, file 32", "'wrong'"):
        assert part in str(caught.value)


def test_ranks_are_checked_only_where_the_config_writes_them(tmp_path: Path) -> None:
    path = save(tmp_path / "model.pth", tensors())
    shape = dict(name="x", num_cells=2, vocab_size=50, embedded_dim=32, num_heads=2)
    load(path, ModelConfig(**shape))
    with pytest.raises(WeightsError, match="g_lora_rank: config 24, file 16"):
        load(path, ModelConfig(**shape, g_lora_rank=24))


class _Boom:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return sys.exit, ("a checkpoint ran code",)


def test_a_pickle_that_wants_to_run_code_is_refused(tmp_path: Path) -> None:
    for name in ("zip.pth", "plain.pth"):
        path = tmp_path / name
        if name == "zip.pth":
            torch.save({"emb.weight": _Boom()}, path)
        else:
            path.write_bytes(pickle.dumps({"emb.weight": _Boom()}))
        with pytest.raises(WeightsError):
            load_checkpoint(path)


def test_a_failed_save_leaves_the_old_file_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.safetensors"
    save_safetensors(path, {"a": torch.ones(3)})

    def full_disk(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        save_safetensors(path, {"a": torch.zeros(3)})
    assert list(tmp_path.iterdir()) == [path]
    assert torch.equal(load_file(path)["a"], torch.ones(3))


def test_a_saved_checkpoint_has_the_mode_of_any_new_file(tmp_path: Path) -> None:
    (tmp_path / "other").touch()
    save_safetensors(tmp_path / "model.safetensors", {"a": torch.ones(3)})
    modes = {path.stat().st_mode for path in tmp_path.iterdir()}
    assert len(modes) == 1


def test_fingerprint_changes_with_any_tensor() -> None:
    model = dummy_model(CFG, "cpu", torch.float32)
    seen = {fingerprint(model.state_dict())}
    for tensor in model.state_dict().values():
        tensor.view(-1)[-1 if tensor.numel() < 1 << 16 else 0] += 1.0
        seen.add(fingerprint(model.state_dict()))
    assert len(seen) == 1 + len(model.state_dict())


def test_dummy_weights_give_finite_logits_and_repeat_with_their_seed() -> None:
    first, second = (dummy_model(CFG, "cpu", torch.float32, seed=7) for _ in range(2))
    assert fingerprint(first.state_dict()) == fingerprint(second.state_dict())
    other = dummy_model(CFG, "cpu", torch.float32, seed=8)
    assert fingerprint(first.state_dict()) != fingerprint(other.state_dict())
    with torch.inference_mode():
        logits = first.head(first.hidden(torch.arange(50).view(1, 50)))
    assert torch.isfinite(logits).all()
