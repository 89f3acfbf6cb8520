"""LayerNorm, token shift and all lerps of a layer in one Triton kernel; no gradients.

One program computes one token, or some of its channels: it takes the statistics of the whole row
and of the one before, which come from the cache, and writes its channels of the J results. What
is normalised is rounded to the type of the pool, so that a token sees the same token before it
whether that was computed with it or comes from the pool. Specification: `reference.norm_mix`.

Legend: as in `engine.kernels.backend`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.backend import Batch
from engine.kernels.gpu.packed import PackedRows
from engine.kernels.reference import LAYER_NORM_EPS

MAX_WAYS = 6
# Enough programs for the multiprocessors of a large GPU, of channels enough for wide loads.
ENOUGH_PROGRAMS, FEWEST_CHANNELS = 256, 256
# Of the rows' type, or float32 where it is less.
COMPUTE_TYPE = {torch.float64: tl.float64}


@triton.jit
def statistics(
    x_ptr, token, num_channels, EPS: tl.constexpr, WIDTH: tl.constexpr, COMPUTE: tl.constexpr
):
    """Mean and reciprocal deviation of a row."""
    channel = tl.arange(0, WIDTH)
    mask = channel < num_channels
    x = tl.load(x_ptr + token * num_channels + channel, mask=mask, other=0.0).to(COMPUTE)
    mean = tl.sum(x, 0) / num_channels
    centred = tl.where(mask, x - mean, 0.0)
    return mean, 1 / tl.sqrt(tl.sum(centred * centred, 0) / num_channels + EPS)


@triton.jit
def _normalised(
    x_ptr,
    token,
    weight,
    bias,
    pool_ptr,
    channel,
    num_channels,
    EPS: tl.constexpr,
    WIDTH: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """Some channels of a row after LayerNorm, rounded as the pool would keep them."""
    mean, scale = statistics(x_ptr, token, num_channels, EPS, WIDTH, COMPUTE)
    mask = channel < num_channels
    x = tl.load(x_ptr + token * num_channels + channel, mask=mask, other=0.0).to(COMPUTE)
    normed = (x - mean) * scale * weight + bias
    return normed.to(pool_ptr.dtype.element_ty).to(COMPUTE)


@triton.jit
def _put(out_ptr, mu_ptr, at, channel, mask, normed, before, COMPUTE: tl.constexpr):
    mu = tl.load(mu_ptr + channel, mask=mask, other=0.0).to(COMPUTE)
    mixed = normed + (before - normed) * mu
    tl.store(out_ptr + at, mixed.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_tokens"])
def norm_mix_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    mu0_ptr,
    mu1_ptr,
    mu2_ptr,
    mu3_ptr,
    mu4_ptr,
    mu5_ptr,
    out_ptr,
    pool_ptr,
    src_ptr,
    dst_ptr,
    starts_ptr,
    sequences_ptr,
    slot_stride,
    num_tokens,
    num_channels,
    J: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    SINGLE: tl.constexpr,
    KEEPS: tl.constexpr,
    COMPUTE: tl.constexpr,
    EPS: tl.constexpr,
):
    """Program (t, c): channels c * BLOCK .. of token t.

    SINGLE: every sequence is one token, so starts and sequences are not read. KEEPS: the pool
    gets the last token of each sequence.
    """
    token = tl.program_id(0).to(tl.int64)
    sequence = token
    if not SINGLE:
        sequence = tl.load(sequences_ptr + token)
    dst = tl.load(dst_ptr + sequence)
    if dst < 0:  # padding
        return
    start = token
    if not SINGLE:
        start = tl.load(starts_ptr + sequence)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = channel < num_channels
    weight = tl.load(weight_ptr + channel, mask=mask, other=0.0).to(COMPUTE)
    bias = tl.load(bias_ptr + channel, mask=mask, other=0.0).to(COMPUTE)
    normed = _normalised(
        x_ptr, token, weight, bias, pool_ptr, channel, num_channels, EPS, WIDTH, COMPUTE
    )
    if token == start:
        # The slot may be read and written, so whoever reads it is who writes it: the first token's
        # program, which computes the last token again. Slots are int64, as offsets pass 2**31.
        src = tl.load(src_ptr + sequence)
        before = tl.load(pool_ptr + src * slot_stride + channel, mask=mask, other=0.0).to(COMPUTE)
        if KEEPS:
            last = normed
            if not SINGLE:
                final = tl.load(starts_ptr + sequence + 1) - 1
                last = _normalised(
                    x_ptr,
                    final,
                    weight,
                    bias,
                    pool_ptr,
                    channel,
                    num_channels,
                    EPS,
                    WIDTH,
                    COMPUTE,
                )
            tl.debug_barrier()  # all threads have read
            kept = last.to(pool_ptr.dtype.element_ty)
            tl.store(pool_ptr + dst * slot_stride + channel, kept, mask=mask)
    else:
        before = _normalised(
            x_ptr, token - 1, weight, bias, pool_ptr, channel, num_channels, EPS, WIDTH, COMPUTE
        )
    at = token * num_channels + channel
    _put(out_ptr, mu0_ptr, at, channel, mask, normed, before, COMPUTE)
    if J > 1:
        plane = num_tokens.to(tl.int64) * num_channels
        _put(out_ptr, mu1_ptr, at + plane, channel, mask, normed, before, COMPUTE)
        _put(out_ptr, mu2_ptr, at + 2 * plane, channel, mask, normed, before, COMPUTE)
        _put(out_ptr, mu3_ptr, at + 3 * plane, channel, mask, normed, before, COMPUTE)
        _put(out_ptr, mu4_ptr, at + 4 * plane, channel, mask, normed, before, COMPUTE)
        _put(out_ptr, mu5_ptr, at + 5 * plane, channel, mask, normed, before, COMPUTE)


def norm_mix(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mus: Sequence[Tensor],
    batch: Batch,
    pool: Tensor,
) -> Tensor:
    """`Backend.norm_mix` without gradients, for J = 1 or 6.

    The pool [slots, C] may be a view of one layer; only slots may be strided. Results of padding,
    which is a sequence of negative dst, are undefined.
    """
    is_single = max(batch.lengths) == 1
    rows = None if is_single else PackedRows.of_batch(batch)
    return launch(x, weight, bias, mus, pool, batch.src_slot, batch.dst_slot, rows, x.dtype, True)


def launch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mus: Sequence[Tensor],
    pool: Tensor,
    src_slot: Tensor,
    dst_slot: Tensor,
    rows: PackedRows | None,
    dtype: torch.dtype,
    keeps: bool,
) -> Tensor:
    """[J, T, C] of `dtype`. Without `rows` every sequence is one token."""
    num_tokens, num_channels = x.shape
    assert len(mus) in (1, MAX_WAYS), f"{len(mus)} ways of mixing"
    assert pool.shape[1] == num_channels, f"pool {pool.shape}"
    assert pool.stride(1) == 1, f"strides {pool.stride()} of a pool"
    assert src_slot.dtype == dst_slot.dtype == torch.int64, (src_slot.dtype, dst_slot.dtype)
    vectors = [v.reshape(-1).contiguous() for v in (weight, bias, *mus)]
    assert all(v.shape == (num_channels,) for v in vectors), [v.shape for v in vectors]
    out = torch.empty(len(mus), num_tokens, num_channels, dtype=dtype, device=x.device)
    width = triton.next_power_of_2(num_channels)
    block = choose_block(num_tokens, num_channels)
    norm_mix_kernel[(num_tokens, triton.cdiv(num_channels, block))](
        x.contiguous(),
        *vectors,
        *vectors[2:] * (MAX_WAYS - len(mus)),
        out,
        pool,
        src_slot,
        dst_slot,
        src_slot if rows is None else rows.starts,
        src_slot if rows is None else rows.sequences,
        pool.stride(0),
        num_tokens,
        num_channels,
        J=len(mus),
        WIDTH=width,
        BLOCK=block,
        SINGLE=rows is None,
        KEEPS=keeps,
        COMPUTE=COMPUTE_TYPE.get(x.dtype, tl.float32),
        EPS=LAYER_NORM_EPS,
        num_warps=choose_num_warps(width),
    )
    return out


def choose_block(num_tokens: int, num_channels: int) -> int:
    """Channels of one program: all where there are many tokens, fewer to occupy the GPU."""
    block = triton.next_power_of_2(num_channels)
    while block > FEWEST_CHANNELS and num_tokens * -(-num_channels // block) < ENOUGH_PROGRAMS:
        block //= 2
    return int(block)


def choose_num_warps(width: int) -> int:
    """8 channels of a row for each thread: a load of 16 bytes in half precision."""
    return min(max(width // 256, 1), 16)
