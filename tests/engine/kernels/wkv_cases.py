"""Inputs for WKV-7 that kernels are tested with: ordinary ones and the hardest. No formulas."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from engine.kernels import reference
from tests.engine.kernels.chunk_math import Inputs

TYPICAL, REPEATED, EXTREME = "typical", "one token repeated", "extreme decay"
KINDS = (TYPICAL, REPEATED, EXTREME)


def wkv_inputs(num_tokens: int, kind: str, heads: int = 2, size: int = 16) -> Inputs:
    """r, lw, k, v, a, b [T, H, N] in float64, as the model makes them."""
    generator = torch.Generator().manual_seed(num_tokens)
    shape = (num_tokens, heads, size)
    r, k, v, d, gate, kk = (torch.randn(shape, generator=generator).double() for _ in range(6))
    if kind == REPEATED:
        r, k, v, d, gate, kk = (x[:1].expand(shape) for x in (r, k, v, d, gate, kk))
        # Decay near 1 and rate near 1: the system to be solved has its worst condition.
        d, gate = d * 0 - 9, gate * 0 + 9
    if kind == EXTREME:
        d = d * 0 + 40  # sigmoid is 1 within float64
    kk = F.normalize(kk, dim=-1)
    return r, reference.log_decay(d), k, v, -kk, kk * torch.sigmoid(gate)


def wkv_states(num_slots: int, heads: int = 2, size: int = 16) -> Tensor:
    """States [slots, H, N, N] in float64."""
    generator = torch.Generator().manual_seed(num_slots)
    return torch.randn((num_slots, heads, size, size), generator=generator).double()


def token_by_token(inputs: Inputs, state_HNN: Tensor) -> tuple[Tensor, Tensor]:
    """The definition for one sequence: inputs [T, H, N], y [T, H, N] and the last state."""
    r, lw, k, v, a, b = (x.unsqueeze(0) for x in inputs)
    y, last = reference.wkv7_recurrent(r, lw, k, v, a, b, state_HNN.unsqueeze(0))
    return y[0], last[0]


def apply(function: Callable[[Tensor], Tensor], inputs: Inputs) -> Inputs:
    r, lw, k, v, a, b = (function(x) for x in inputs)
    return r, lw, k, v, a, b


def relative_error(got: Tensor, wanted: Tensor) -> float:
    """In the 2-norm; NaN anywhere gives NaN, which is below no tolerance."""
    scale = wanted.double().norm().clamp_min(1e-30)
    return float((got.double() - wanted.double()).norm() / scale)
