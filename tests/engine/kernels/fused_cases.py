"""Models and schedules that the fused kernels of the CPU are tested with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from engine.kernels.backend import Batch
from engine.model.fused import FusedRWKV7
from engine.model.pack import pack
from engine.model.rwkv7 import RWKV7, ModelDims, State

NUM_SLOTS = 9
DIMS = ModelDims(
    num_cells=3,
    vocab_size=200,  # no multiple of 64, as most of what follows
    embedded_dim=192,
    head_size=64,
    ffn_dim=416,
    w_lora_rank=16,
    a_lora_rank=8,
    v_lora_rank=96,
    g_lora_rank=40,
)
SHAPES = {
    "64": DIMS,
    "16": replace(DIMS, embedded_dim=48, head_size=16, ffn_dim=80),
    "32": replace(DIMS, embedded_dim=96, head_size=32),
    "128": replace(DIMS, embedded_dim=256, head_size=128, num_cells=2),
}
DTYPES = ("float32", "bfloat16", "int8")
# A ragged batch: prompts and single tokens, in place and from one slot to another.
LENGTHS, SRC, DST = (1, 13, 1, 2, 70, 1), (0, 3, 7, 0, 5, 2), (4, 3, 8, 1, 6, 2)


def weights(dims: ModelDims, seed: int = 0) -> dict[str, Tensor]:
    """Random, of a scale at which decays, rates and gates take all values they can."""
    with torch.device("meta"):
        expected = RWKV7(dims).state_dict()
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, meta in expected.items():
        value = torch.randn(meta.shape, generator=generator)
        if meta.dim() == 2 and not name.endswith("r_k"):
            value *= (meta.shape[1] if name.endswith("weight") else meta.shape[0]) ** -0.5
        if name == "emb.weight":
            value *= 10.0
        if name.endswith("w0"):
            value *= 4.0
        if ".ln" in name or name.startswith("ln"):
            value = 1.0 + 0.2 * value if name.endswith("weight") else 0.2 * value
        found[name] = value.bfloat16()
    return found


def fused(dims: ModelDims, dtype: str, num_threads: int = 2, seed: int = 0) -> FusedRWKV7:
    return FusedRWKV7(dims, pack(weights(dims, seed), dims, dtype), num_threads)


def exact(dims: ModelDims, seed: int = 0) -> RWKV7:
    """The reference in float64, with the same weights."""
    model = RWKV7(dims)
    model.load_state_dict({name: value.double() for name, value in weights(dims, seed).items()})
    return model.double().requires_grad_(False)


def random_state(model: FusedRWKV7, seed: int = 1) -> State:
    """Every slot in use but the zero page."""
    state = model.new_state(NUM_SLOTS)
    generator = torch.Generator().manual_seed(seed)
    for tensor in (state.wkv, state.shift):
        tensor[1:] = torch.randn(tensor[1:].shape, generator=generator) * 0.5
    return state


def batch(lengths: Sequence[int], src: Sequence[int], dst: Sequence[int]) -> Batch:
    return Batch(tuple(lengths), torch.tensor(src), torch.tensor(dst))


def tokens(count: int, seed: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, DIMS.vocab_size, (count,), generator=generator)


def distance(got: Tensor, wanted: Tensor) -> float:
    return ((got.double() - wanted).norm() / wanted.norm()).item()
