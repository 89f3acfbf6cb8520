"""One token of the WKV-7 recurrence with all around it, in one Triton kernel. Knows one layer.

One program computes one head of one row: value residual, decay, normalised removal key, state
update, group norm, bonus and gate. The state is read and written once, everything else stays in
registers. Formulas: "RWKV-7 Goose", arXiv 2503.14456; specification: `reference.time_mix`.

Legend: as in `engine.kernels.backend`; B rows of one token each.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.backend import TimeMixRows, TimeMixWeights
from engine.kernels.reference import DECAY_SCALE, GROUP_NORM_EPS, KEY_NORM_EPS

# Of the pool's type, or float32 where it stores less.
_COMPUTE_TYPE = {torch.float64: tl.float64}


@triton.jit
def decode_kernel(
    r_ptr,
    k_ptr,
    v_ptr,
    d_ptr,
    a_ptr,
    g_ptr,
    v_first_ptr,
    m_ptr,
    k_k_ptr,
    k_a_ptr,
    r_k_ptr,
    norm_weight_ptr,
    norm_bias_ptr,
    y_ptr,
    pool_ptr,
    src_ptr,
    dst_ptr,
    slot_stride,
    num_heads,
    N: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    COMPUTE: tl.constexpr,
    DECAY_SCALE: tl.constexpr,
    GROUP_NORM_EPS: tl.constexpr,
    KEY_NORM_EPS: tl.constexpr,
):
    row, head = tl.program_id(0), tl.program_id(1)
    dst = tl.load(dst_ptr + row).to(tl.int64)
    if dst < 0:  # padding
        return
    src = tl.load(src_ptr + row).to(tl.int64)
    lane = tl.arange(0, N)
    channel = head * N + lane
    at = row.to(tl.int64) * num_heads * N + channel

    r = tl.load(r_ptr + at).to(COMPUTE)
    k = tl.load(k_ptr + at).to(COMPUTE)
    v = tl.load(v_ptr + at).to(COMPUTE)
    rate = tl.sigmoid(tl.load(a_ptr + at).to(COMPUTE))
    w = tl.exp(DECAY_SCALE * tl.sigmoid(tl.load(d_ptr + at).to(COMPUTE)))
    if HAS_RESIDUAL:
        share = tl.sigmoid(tl.load(m_ptr + at).to(COMPUTE))
        v += (tl.load(v_first_ptr + at).to(COMPUTE) - v) * share
    kk = k * tl.load(k_k_ptr + channel).to(COMPUTE)
    kk = kk / tl.maximum(tl.sqrt(tl.sum(kk * kk, 0)), KEY_NORM_EPS)
    k *= 1 + (rate - 1) * tl.load(k_a_ptr + channel).to(COMPUTE)

    # [key, value]: sums over keys, and every value channel on its own. Strides of slots exceed
    # 2**31 elements together, so slots are int64 before they become offsets.
    tile = head * N * N + lane[:, None] * N + lane[None, :]
    state = tl.load(pool_ptr + src * slot_stride + tile).to(COMPUTE)
    removed = tl.sum(state * kk[:, None], 0)
    state = w[:, None] * state - (kk * rate)[:, None] * removed[None, :] + k[:, None] * v[None, :]
    tl.store(pool_ptr + dst * slot_stride + tile, state.to(pool_ptr.dtype.element_ty))
    y = tl.sum(state * r[:, None], 0)

    centred = y - tl.sum(y, 0) / N
    scale = 1 / tl.sqrt(tl.sum(centred * centred, 0) / N + GROUP_NORM_EPS)
    y = centred * scale * tl.load(norm_weight_ptr + channel).to(COMPUTE)
    y += tl.load(norm_bias_ptr + channel).to(COMPUTE)
    bonus = tl.sum(r * k * tl.load(r_k_ptr + channel).to(COMPUTE), 0)
    y = (y + bonus * v) * tl.load(g_ptr + at).to(COMPUTE)
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty))


def decode(
    rows: TimeMixRows, weights: TimeMixWeights, src_slot: Tensor, dst_slot: Tensor, pool: Tensor
) -> Tensor:
    """`Backend.time_mix` for B sequences of one token each; y [B, C].

    `src_slot` and `dst_slot` [B]; a row whose dst is negative is padding: nothing of it is read or
    written, and its y is undefined. The pool [slots, H, N, N] may be a view of one layer; each
    slot of it must be contiguous, and N a power of two.
    """
    num_heads, size = weights.r_k.shape
    assert pool.stride()[1:] == (size * size, size, 1), f"strides {pool.stride()} of a pool"
    first, mixed = rows.v_first, rows.m
    has_residual = first is not None and mixed is not None
    inputs = [rows.r, rows.k, rows.v, rows.d, rows.a, rows.g]
    inputs += [first, mixed] if first is not None and mixed is not None else [rows.v, rows.v]
    inputs += [weights.k_k, weights.k_a, weights.r_k, weights.norm_weight, weights.norm_bias]
    y = torch.empty_like(rows.r, memory_format=torch.contiguous_format)
    decode_kernel[(rows.r.shape[0], num_heads)](
        *(x.contiguous() for x in inputs),
        y,
        pool,
        src_slot,
        dst_slot,
        pool.stride(0),
        num_heads,
        N=size,
        HAS_RESIDUAL=has_residual,
        COMPUTE=_COMPUTE_TYPE.get(pool.dtype, tl.float32),
        DECAY_SCALE=DECAY_SCALE,
        GROUP_NORM_EPS=GROUP_NORM_EPS,
        KEY_NORM_EPS=KEY_NORM_EPS,
        num_warps=choose_num_warps(size),
    )
    return y


def choose_num_warps(head_size: int) -> int:
    """Two hold a state of 64 * 64 without spilling; small heads fit into one."""
    return 2 if head_size >= 64 else 1
