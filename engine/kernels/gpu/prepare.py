"""All that RWKV-7 computes of a token before its recurrence, in one Triton launch each way.

Value residual, decay, normalised removal key and the key's update: from `TimeMixRows` to the
inputs of `wkv`. Formulas: "RWKV-7 Goose", arXiv 2503.14456; specification: the first half of
`reference.time_mix`. One program computes TOKENS tokens of one head, in float32.

Legend: T packed tokens, S sequences, H heads, N head size, C = H*N channels, P token blocks.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.backend import TimeMixRows, TimeMixWeights
from engine.kernels.reference import DECAY_SCALE, KEY_NORM_EPS

NUM_WARPS = 4


class Prepared(NamedTuple):
    """What the recurrence takes beside r, all [T, C] in float32 but a `v` without residual."""

    lw: Tensor
    k: Tensor
    v: Tensor
    a: Tensor
    b: Tensor


@triton.jit
def load_tile(pointer, at, mask):
    return tl.load(pointer + at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def store_tile(pointer, at, value, mask):
    tl.store(pointer + at, value.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def tokens_of(num_tokens, sequences_pointer, dst_pointer, TOKENS: tl.constexpr, PADS: tl.constexpr):
    """The tokens of a program as a column, and which of them exist and are no padding."""
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    mask = token < num_tokens
    if PADS:
        sequence = tl.load(sequences_pointer + token, mask=mask, other=0)
        mask = mask & (tl.load(dst_pointer + sequence, mask=mask, other=-1) >= 0)
    return token[:, None], mask[:, None]


@triton.jit
def _removal_key(k, k_k, EPS: tl.constexpr):
    """The normalised key, and what it was divided by."""
    kk = k * k_k
    norm = tl.maximum(tl.sqrt(tl.sum(kk * kk, 1)), EPS)[:, None]
    return kk / norm, norm


@triton.jit
def prepare_kernel(
    k_pointer,
    v_pointer,
    d_pointer,
    a_pointer,
    v_first_pointer,
    m_pointer,
    k_k_pointer,
    k_a_pointer,
    lw_out_pointer,
    k_out_pointer,
    v_out_pointer,
    a_out_pointer,
    b_out_pointer,
    sequences_pointer,
    dst_pointer,
    num_tokens,
    num_heads,
    N: tl.constexpr,
    TOKENS: tl.constexpr,
    PADS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    DECAY_SCALE: tl.constexpr,
    KEY_NORM_EPS: tl.constexpr,
):
    """Program (i, h). Tokens of a sequence whose dst is negative are neither read nor written."""
    token, mask = tokens_of(num_tokens, sequences_pointer, dst_pointer, TOKENS, PADS)
    channel = tl.program_id(1) * N + tl.arange(0, N)
    at = token * (num_heads * N) + channel[None, :]
    k = load_tile(k_pointer, at, mask)
    rate = tl.sigmoid(load_tile(a_pointer, at, mask))
    kk, _ = _removal_key(k, tl.load(k_k_pointer + channel).to(tl.float32)[None, :], KEY_NORM_EPS)
    store_tile(a_out_pointer, at, -kk, mask)
    store_tile(b_out_pointer, at, kk * rate, mask)
    k_a = tl.load(k_a_pointer + channel).to(tl.float32)[None, :]
    store_tile(k_out_pointer, at, k * (1 + (rate - 1) * k_a), mask)
    lw = DECAY_SCALE * tl.sigmoid(load_tile(d_pointer, at, mask))
    store_tile(lw_out_pointer, at, lw, mask)
    if HAS_RESIDUAL:
        v = load_tile(v_pointer, at, mask)
        share = tl.sigmoid(load_tile(m_pointer, at, mask))
        v += (load_tile(v_first_pointer, at, mask) - v) * share
        store_tile(v_out_pointer, at, v, mask)


@triton.jit
def prepare_backward_kernel(
    k_pointer,
    v_pointer,
    d_pointer,
    a_pointer,
    v_first_pointer,
    m_pointer,
    k_k_pointer,
    k_a_pointer,
    d_lw_out_pointer,
    d_k_out_pointer,
    d_v_out_pointer,
    d_a_out_pointer,
    d_b_out_pointer,
    d_k_pointer,
    d_v_pointer,
    d_d_pointer,
    d_a_pointer,
    d_v_first_pointer,
    d_m_pointer,
    d_k_k_pointer,
    d_k_a_pointer,
    num_tokens,
    num_heads,
    N: tl.constexpr,
    TOKENS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    DECAY_SCALE: tl.constexpr,
    KEY_NORM_EPS: tl.constexpr,
):
    """Program (i, h). Sums over its tokens go to row i of d_k_k and d_k_a [P, C]."""
    token, mask = tokens_of(num_tokens, d_k_pointer, d_k_pointer, TOKENS, False)
    channel = tl.program_id(1) * N + tl.arange(0, N)
    at = token * (num_heads * N) + channel[None, :]
    partial = tl.program_id(0).to(tl.int64) * (num_heads * N) + channel
    k = load_tile(k_pointer, at, mask)
    rate = tl.sigmoid(load_tile(a_pointer, at, mask))
    k_k = tl.load(k_k_pointer + channel).to(tl.float32)[None, :]
    k_a = tl.load(k_a_pointer + channel).to(tl.float32)[None, :]
    kk, norm = _removal_key(k, k_k, KEY_NORM_EPS)

    d_b_out = load_tile(d_b_out_pointer, at, mask)
    d_k_out = load_tile(d_k_out_pointer, at, mask)
    d_rate = d_b_out * kk + d_k_out * k * k_a
    store_tile(d_a_pointer, at, d_rate * rate * (1 - rate), mask)
    d_kk = d_b_out * rate - load_tile(d_a_out_pointer, at, mask)
    # Of a key that is shorter than the least divisor, the divisor does not depend.
    along = tl.where(norm > KEY_NORM_EPS, tl.sum(d_kk * kk, 1)[:, None], 0.0)
    d_product = (d_kk - kk * along) / norm
    d_k = d_product * k_k + d_k_out * (1 + (rate - 1) * k_a)
    store_tile(d_k_pointer, at, d_k, mask)
    # Rows past the end were read as zeros, and count for nothing in the sums.
    tl.store(d_k_k_pointer + partial, tl.sum(d_product * k, 0))
    tl.store(d_k_a_pointer + partial, tl.sum(d_k_out * k * (rate - 1), 0))

    gate = tl.sigmoid(load_tile(d_pointer, at, mask))
    d_d = load_tile(d_lw_out_pointer, at, mask) * DECAY_SCALE * gate * (1 - gate)
    store_tile(d_d_pointer, at, d_d, mask)
    if HAS_RESIDUAL:
        d_v = load_tile(d_v_out_pointer, at, mask)
        v = load_tile(v_pointer, at, mask)
        share = tl.sigmoid(load_tile(m_pointer, at, mask))
        away = load_tile(v_first_pointer, at, mask) - v
        store_tile(d_v_pointer, at, d_v * (1 - share), mask)
        store_tile(d_v_first_pointer, at, d_v * share, mask)
        store_tile(d_m_pointer, at, d_v * away * share * (1 - share), mask)


def tokens_per_program(size: int) -> int:
    """Tiles of 1024 numbers: eight a thread."""
    return max(1, 1024 // size)


def prepare(
    rows: TimeMixRows,
    weights: TimeMixWeights,
    padding: tuple[Tensor, Tensor] | None = None,
) -> Prepared:
    """The inputs of the recurrence, differentiable where nothing is padding.

    `padding`: whose token each is [T] and the slot that each sequence writes [S], both int64; what
    belongs to a sequence of a negative slot is undefined. None where all is real.
    """
    inputs = [rows.k, rows.v, rows.d, rows.a, weights.k_k, weights.k_a]
    if rows.v_first is not None and rows.m is not None:
        inputs += [rows.v_first, rows.m]
    tensors = [x.contiguous() for x in inputs]
    size = weights.r_k.shape[-1]
    if torch.is_grad_enabled() and any(x.requires_grad for x in inputs):
        assert padding is None, "training has no padding"
        lw, k, v, a, b = _Prepare.apply(size, *tensors)  # type: ignore[no-untyped-call]
    else:
        lw, k, v, a, b = _forward(size, tensors, padding)
    return Prepared(lw, k, tensors[1] if v is None else v, a, b)


def _forward(
    size: int, tensors: list[Tensor], padding: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor]:
    k, v, d, a, k_k, k_a, *residual = tensors
    v_first, m = residual or (v, v)
    num_tokens, width = k.shape
    lw, k_out, a_out, b_out = (torch.empty_like(k, dtype=torch.float32) for _ in range(4))
    v_out = torch.empty_like(v, dtype=torch.float32) if residual else None
    sequences, dst = padding or (k, k)
    tokens = tokens_per_program(size)
    prepare_kernel[(triton.cdiv(num_tokens, tokens), width // size)](
        *(k, v, d, a, v_first, m, k_k, k_a),
        *(lw, k_out, v if v_out is None else v_out, a_out, b_out),
        sequences,
        dst,
        num_tokens,
        width // size,
        N=size,
        TOKENS=tokens,
        PADS=padding is not None,
        HAS_RESIDUAL=bool(residual),
        DECAY_SCALE=DECAY_SCALE,
        KEY_NORM_EPS=KEY_NORM_EPS,
        num_warps=NUM_WARPS,
    )
    return lw, k_out, v_out, a_out, b_out


class _Prepare(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, size: int, *tensors: Tensor) -> tuple[Tensor | None, ...]:
        ctx.size = size
        ctx.save_for_backward(*tensors)
        return _forward(size, list(tensors), None)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        k, v, d, a, k_k, k_a, *residual = ctx.saved_tensors
        v_first, m = residual or (v, v)
        num_tokens, width = k.shape
        tokens = tokens_per_program(ctx.size)
        blocks = triton.cdiv(num_tokens, tokens)
        d_k, d_d, d_a = (torch.empty_like(x) for x in (k, d, a))
        d_v, d_first, d_m = (torch.empty_like(x) if residual else k for x in (v, v_first, m))
        partial = torch.empty(2, blocks, width, device=k.device)
        prepare_backward_kernel[(blocks, width // ctx.size)](
            *(k, v, d, a, v_first, m, k_k, k_a),
            *(k if x is None else x.contiguous() for x in grads),
            *(d_k, d_v, d_d, d_a, d_first, d_m, partial[0], partial[1]),
            num_tokens,
            width // ctx.size,
            N=ctx.size,
            TOKENS=tokens,
            HAS_RESIDUAL=bool(residual),
            DECAY_SCALE=DECAY_SCALE,
            KEY_NORM_EPS=KEY_NORM_EPS,
            num_warps=NUM_WARPS,
        )
        d_k_k, d_k_a = partial.sum(1)
        found = (d_k, d_v if residual else None, d_d, d_a, d_k_k.to(k_k.dtype), d_k_a.to(k_a.dtype))
        return (None, *found, *((d_first, d_m) if residual else ()))
