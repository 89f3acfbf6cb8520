"""Packed weights: what lies where, bit by bit; and what loading costs in memory."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from engine.model.mapped import FilePages
from engine.model.quantize import quantize
from engine.model.rwkv7 import RWKV7, ModelDims
from engine.model.weights import load_checkpoint, save_safetensors

pytest.importorskip("numba")

from engine.model.pack import MATRIX_NAMES, PackedWeights, pack, padded

PROJECT = Path(__file__).parents[2]
# Widths, ranks and vocabulary are no multiples of 64, and matrices longer than one task's rows.
ODD = ModelDims(
    num_cells=2,
    vocab_size=1100,
    embedded_dim=96,
    head_size=32,
    ffn_dim=200,
    w_lora_rank=8,
    a_lora_rank=24,
    v_lora_rank=16,
    g_lora_rank=72,
)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def random_tensors(dims: ModelDims, dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    with torch.device("meta"):
        expected = RWKV7(dims).state_dict()
    generator = torch.Generator().manual_seed(7)
    return {
        name: (torch.randn(meta.shape, generator=generator) * 0.3).to(dtype)
        for name, meta in expected.items()
    }


def memory_at(address: int, num_bytes: int) -> np.ndarray:
    return np.frombuffer(ctypes.string_at(int(address), num_bytes), np.uint8)


def unpacked(weights: PackedWeights, index: int, dtype: str) -> Tensor:
    """A matrix [padded outputs, padded inputs], in float32; bytes of int8 as they are."""
    record = weights.matrices[index]
    width, num_blocks = int(record["num_inputs"]), int(record["num_blocks"])
    size = num_blocks * 64 * width * {"float32": 4, "bfloat16": 2, "int8": 1}[dtype]
    raw = torch.from_numpy(memory_at(record["weights"], size).copy())
    if dtype == "int8":  # [block][k / 4][output][4]
        bytes_BKOJ = (raw.int() - 128).view(num_blocks, width // 4, 64, 4)
        return bytes_BKOJ.permute(0, 2, 1, 3).reshape(-1, width)
    values = raw.view(DTYPES[dtype]).float()
    if dtype == "float32":  # [block][k][output]
        return values.view(num_blocks, width, 64).transpose(1, 2).reshape(-1, width)
    # [block][k][half][lane][which of the two 16 of a half]
    return values.view(num_blocks, width, 2, 16, 2).permute(0, 2, 4, 3, 1).reshape(-1, width)


def scales_of_packed(weights: PackedWeights, index: int) -> Tensor:
    record = weights.matrices[index]
    num_groups, num_blocks = int(record["num_inputs"]) // 64, int(record["num_blocks"])
    raw = memory_at(record["scales"], num_blocks * num_groups * 64 * 4).copy()
    found = torch.from_numpy(raw).view(torch.float32).view(num_blocks, num_groups, 64)
    return found.transpose(1, 2).reshape(-1, num_groups)


def matrices_of(tensors: dict[str, Tensor], dims: ModelDims) -> dict[int, Tensor]:
    """By their place, [outputs, inputs] and padded."""
    found = {}
    for layer in range(dims.num_cells):
        for place, name in enumerate(MATRIX_NAMES):
            if layer > 0 or name not in ("att.v1", "att.v2"):
                weight = tensors[f"blocks.{layer}.{name}"]
                weight = weight if name.endswith("weight") else weight.T
                found[layer * len(MATRIX_NAMES) + place] = weight
    found[dims.num_cells * len(MATRIX_NAMES)] = tensors["head.weight"]
    return {index: with_zeros(weight) for index, weight in found.items()}


def with_zeros(weight: Tensor) -> Tensor:
    whole = torch.zeros(padded(weight.shape[0]), padded(weight.shape[1]), dtype=weight.dtype)
    whole[: weight.shape[0], : weight.shape[1]] = weight
    return whole


@pytest.mark.parametrize("source", [torch.bfloat16, torch.float32, torch.float16])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("num_threads", [1, 3])
def test_matrices_and_embedding_are_those_of_the_file(
    source: torch.dtype, dtype: str, num_threads: int
) -> None:
    tensors = random_tensors(ODD, source)
    weights = pack(tensors, ODD, dtype, num_threads)
    for index, weight in matrices_of(tensors, ODD).items():
        wanted = weight.to(DTYPES[dtype]).float()
        assert torch.equal(unpacked(weights, index, dtype), wanted), index
    shape = (ODD.vocab_size, padded(ODD.embedded_dim))
    raw = memory_at(weights.model[0]["emb"], shape[0] * shape[1] * DTYPES[dtype].itemsize)
    rows = torch.from_numpy(raw.copy()).view(DTYPES[dtype]).view(shape)
    assert torch.equal(rows[:, : ODD.embedded_dim], tensors["emb.weight"].to(DTYPES[dtype]))
    assert not rows[:, ODD.embedded_dim :].any()


@pytest.mark.parametrize("source", [torch.bfloat16, torch.float32])
def test_int8_is_bit_for_bit_what_quantize_makes(source: torch.dtype) -> None:
    tensors = random_tensors(ODD, source)
    head = tensors["head.weight"]
    head[3] = 0.0  # a group of zeros, one of the smallest numbers, one of large ones, ties
    head[4, :64] = 1e-8
    head[5, :64] = torch.linspace(-8e5, 8e5, 64)
    head[6, :64] = (torch.arange(64) - 31.5) * 2
    head[7, :64] = 3e-6 * torch.arange(64)
    weights = pack(tensors, ODD, "int8", 2)
    for index, weight in matrices_of(tensors, ODD).items():
        wanted, scale = quantize(weight, "cpu")
        assert torch.equal(unpacked(weights, index, "int8"), wanted.int()), index
        assert torch.equal(scales_of_packed(weights, index), scale.float()), index


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), 1e7])
def test_what_int8_cannot_express_is_named(wrong: float) -> None:
    tensors = random_tensors(ODD)
    tensors["blocks.1.att.w2"][3, 5] = wrong
    with pytest.raises(ValueError, match=r"^blocks\.1\.att\.w2 holds"):
        pack(tensors, ODD, "int8", 2)


def test_progress_adds_up_to_all_that_is_packed() -> None:
    tensors = random_tensors(ODD)
    heard: list[int] = []
    pack(tensors, ODD, "bfloat16", 2, heard.append)
    unused = sum(tensors[f"blocks.0.att.{name}"].nbytes for name in ("v0", "v1", "v2"))
    assert sum(heard) == sum(tensor.nbytes for tensor in tensors.values()) - unused


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_releasing_pages_of_a_file_changes_no_value(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"weights.{suffix}"
    tensors = save(path, {name: torch.randn(300, 100) for name in "abc"})
    mapped = load_checkpoint(path)
    pages = FilePages()
    for name, tensor in mapped.items():
        assert pages.are_under(tensor)
        assert torch.equal(tensor, tensors[name])
        pages.release(tensor)
    assert all(torch.equal(mapped[name], tensor) for name, tensor in tensors.items())


def test_memory_and_written_pages_are_never_released(tmp_path: Path) -> None:
    in_memory = torch.ones(1 << 20)
    save(tmp_path / "weights.pth", {"a": torch.zeros(1 << 20)})
    written = load_checkpoint(tmp_path / "weights.pth")["a"]
    written[5] = 3.0  # of this process alone: the file does not have it
    pages = FilePages()
    for tensor in (in_memory, written):
        assert not pages.are_under(tensor)
        pages.release(tensor)
    assert bool((in_memory == 1).all())
    assert written[5] == 3.0


def save(path: Path, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        save_safetensors(path, tensors)
    else:
        torch.save(tensors, path)
    return tensors


# The dimensions of 0.1B with a third of its layers: 260 MB in bfloat16.
LARGE = ModelDims(
    num_cells=4,
    vocab_size=1 << 16,
    embedded_dim=768,
    head_size=64,
    ffn_dim=3072,
    w_lora_rank=64,
    a_lora_rank=64,
    v_lora_rank=32,
    g_lora_rank=128,
)

MEASURE = """
import sys
from pathlib import Path
import torch
from engine.model.pack import pack
from engine.model.rwkv7 import RWKV7, ModelDims
from engine.model.weights import dims_of, load_checkpoint

def status(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))

def read(path, dtype):
    tensors = load_checkpoint(Path(path))
    return pack(tensors, dims_of(tensors, path), dtype, 2)

small, large, dtype = sys.argv[1:]
read(small, dtype)  # what compiling takes is no memory for weights
before = status("VmRSS")
weights = read(large, dtype)
print((status("VmHWM") - before) / weights.num_bytes)
"""


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """small.* and large.*"""
    folder = tmp_path_factory.mktemp("checkpoints")
    with torch.device("meta"):
        expected = RWKV7(LARGE).state_dict()
    random = torch.randn(1 << 20, generator=torch.Generator().manual_seed(1)).bfloat16()
    large = {
        name: random.repeat(-(-meta.numel() // len(random)))[: meta.numel()].view(meta.shape)
        for name, meta in expected.items()
    }
    for suffix in ("safetensors", "pth"):
        save(folder / f"small.{suffix}", random_tensors(ODD))
        save(folder / f"large.{suffix}", large)
    return folder


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_peak_memory_is_at_most_13_tenths_of_the_packed_size(
    checkpoints: Path, suffix: str, dtype: str
) -> None:
    files = [str(checkpoints / f"{size}.{suffix}") for size in ("small", "large")]
    command = [sys.executable, "-c", MEASURE, *files, dtype]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert 0.9 < float(done.stdout) < 1.3
