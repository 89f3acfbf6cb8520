"""Gradients of LayerNorm with token shift and lerps by two Triton kernels; autograd around them.

One kernel is for rows, one for parameters: the sums of both do not fit the registers together.
Parameters get partial sums from runs of tokens, and those are added in one order, so gradients
are the same every time.

Legend: as in `engine.kernels.backend`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.backend import Batch
from engine.kernels.gpu.norm_mix import COMPUTE_TYPE, MAX_WAYS, launch, statistics
from engine.kernels.gpu.packed import PackedRows
from engine.kernels.reference import LAYER_NORM_EPS

MAX_RUNS = 256  # of tokens; each costs J + 2 partial rows
# Eight sums for each channel, and all they are made of, stay in registers.
BLOCK, BLOCK_WARPS = 256, 4


@triton.jit
def _row(pointer, at, mask, COMPUTE: tl.constexpr):
    return tl.load(pointer + at, mask=mask, other=0.0).to(COMPUTE)


@triton.jit
def _way(d_out_ptr, mu_ptr, at, channel, mask, d_normed, d_before, COMPUTE: tl.constexpr):
    """One result's gradient, and what token and predecessor get together with its share."""
    d_out = _row(d_out_ptr, at, mask, COMPUTE)
    share = d_out * _row(mu_ptr, channel, mask, COMPUTE)
    return d_out, d_normed + (d_out - share), d_before + share


@triton.jit
def _both(
    total, d_out_ptr, mu_ptr, at, channel, mask, num_channels, followed, COMPUTE: tl.constexpr
):
    """What a token gets from its own result and from that of the next, if there is one."""
    mu = _row(mu_ptr, channel, mask, COMPUTE)
    total += _row(d_out_ptr, at, mask, COMPUTE) * (1 - mu)
    return total + _row(d_out_ptr, at + num_channels, mask & followed, COMPUTE) * mu


@triton.jit
def _share(total, d_out_ptr, mu_ptr, at, channel, mask, COMPUTE: tl.constexpr):
    return total + _row(d_out_ptr, at, mask, COMPUTE) * _row(mu_ptr, channel, mask, COMPUTE)


@triton.jit(do_not_specialize=["num_tokens"])
def rows_backward_kernel(
    x_ptr,
    weight_ptr,
    mu0_ptr,
    mu1_ptr,
    mu2_ptr,
    mu3_ptr,
    mu4_ptr,
    mu5_ptr,
    d_out_ptr,
    starts_ptr,
    sequences_ptr,
    statistics_ptr,
    d_x_ptr,
    d_first_ptr,
    num_tokens,
    num_channels,
    J: tl.constexpr,
    WIDTH: tl.constexpr,
    COMPUTE: tl.constexpr,
    EPS: tl.constexpr,
):
    """Program t: the gradient of token t, and of what came before its sequence if it is the first
    of it: d_first [S, C]. Leaves the mean and reciprocal deviation of each token, [T, 2]."""
    token = tl.program_id(0).to(tl.int64)
    sequence = tl.load(sequences_ptr + token)
    channel = tl.arange(0, WIDTH)
    mask = channel < num_channels
    at = token * num_channels + channel
    plane = (token * 0 + num_tokens) * num_channels  # 64 bits wide, as `token` is
    followed = token + 1 < tl.load(starts_ptr + sequence + 1)
    d_normed = tl.zeros([WIDTH], COMPUTE)
    d_normed = _both(
        d_normed, d_out_ptr, mu0_ptr, at, channel, mask, num_channels, followed, COMPUTE
    )
    if J > 1:
        d_normed = _both(
            d_normed, d_out_ptr, mu1_ptr, at + plane, channel, mask, num_channels, followed, COMPUTE
        )
        d_normed = _both(
            d_normed,
            d_out_ptr,
            mu2_ptr,
            at + 2 * plane,
            channel,
            mask,
            num_channels,
            followed,
            COMPUTE,
        )
        d_normed = _both(
            d_normed,
            d_out_ptr,
            mu3_ptr,
            at + 3 * plane,
            channel,
            mask,
            num_channels,
            followed,
            COMPUTE,
        )
        d_normed = _both(
            d_normed,
            d_out_ptr,
            mu4_ptr,
            at + 4 * plane,
            channel,
            mask,
            num_channels,
            followed,
            COMPUTE,
        )
        d_normed = _both(
            d_normed,
            d_out_ptr,
            mu5_ptr,
            at + 5 * plane,
            channel,
            mask,
            num_channels,
            followed,
            COMPUTE,
        )
    mean, scale = statistics(x_ptr, token, num_channels, EPS, WIDTH, COMPUTE)
    tl.store(statistics_ptr + 2 * token, mean)
    tl.store(statistics_ptr + 2 * token + 1, scale)
    unit = tl.where(mask, (_row(x_ptr, at, mask, COMPUTE) - mean) * scale, 0.0)
    d_unit = d_normed * _row(weight_ptr, channel, mask, COMPUTE)
    d_mean = tl.sum(d_unit, 0) / num_channels
    d_scale = tl.sum(d_unit * unit, 0) / num_channels
    d_x = scale * (d_unit - d_mean - unit * d_scale)
    tl.store(d_x_ptr + at, d_x.to(d_x_ptr.dtype.element_ty), mask=mask)
    if token == tl.load(starts_ptr + sequence):
        d_first = tl.zeros([WIDTH], COMPUTE)
        d_first = _share(d_first, d_out_ptr, mu0_ptr, at, channel, mask, COMPUTE)
        if J > 1:
            d_first = _share(d_first, d_out_ptr, mu1_ptr, at + plane, channel, mask, COMPUTE)
            d_first = _share(d_first, d_out_ptr, mu2_ptr, at + 2 * plane, channel, mask, COMPUTE)
            d_first = _share(d_first, d_out_ptr, mu3_ptr, at + 3 * plane, channel, mask, COMPUTE)
            d_first = _share(d_first, d_out_ptr, mu4_ptr, at + 4 * plane, channel, mask, COMPUTE)
            d_first = _share(d_first, d_out_ptr, mu5_ptr, at + 5 * plane, channel, mask, COMPUTE)
        d_first = d_first.to(d_first_ptr.dtype.element_ty)
        tl.store(d_first_ptr + sequence * num_channels + channel, d_first, mask=mask)


@triton.jit(do_not_specialize=["num_tokens", "tokens_per_program"])
def parameters_backward_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    mu0_ptr,
    mu1_ptr,
    mu2_ptr,
    mu3_ptr,
    mu4_ptr,
    mu5_ptr,
    first_ptr,
    d_out_ptr,
    starts_ptr,
    sequences_ptr,
    statistics_ptr,
    partials_ptr,
    num_tokens,
    num_channels,
    tokens_per_program,
    J: tl.constexpr,
    BLOCK: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """Program (p, c): channels c * BLOCK .. of tokens p * tokens_per_program .., from the last to
    the first, so that what a token's successor sends back is at hand. Row p of the partials
    [P, 2 + J, C] gets their part of the gradients of weight, bias and the J weights of mixing."""
    program = tl.program_id(0).to(tl.int64)
    begin = program * tokens_per_program
    end = tl.minimum(begin + tokens_per_program, num_tokens)
    plane = (begin * 0 + num_tokens) * num_channels
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = channel < num_channels
    weight = _row(weight_ptr, channel, mask, COMPUTE)
    bias = _row(bias_ptr, channel, mask, COMPUTE)
    zero = tl.zeros([BLOCK], COMPUTE)
    d_weight = zero
    d_bias = zero
    d_mu0 = zero
    d_mu1 = zero
    d_mu2 = zero
    d_mu3 = zero
    d_mu4 = zero
    d_mu5 = zero
    from_next = zero
    token = tl.minimum(end, num_tokens - 1)  # the token after the run only sends back
    while token >= begin:
        at = token * num_channels + channel
        sequence = tl.load(sequences_ptr + token)
        is_first = token == tl.load(starts_ptr + sequence)
        counts = mask & (token < end)
        mean = tl.load(statistics_ptr + 2 * token)
        unit = (_row(x_ptr, at, mask, COMPUTE) - mean) * tl.load(statistics_ptr + 2 * token + 1)
        if is_first:
            before = _row(first_ptr, sequence * num_channels + channel, mask, COMPUTE)
        else:
            before = _row(x_ptr, at - num_channels, mask, COMPUTE)
            before = (before - tl.load(statistics_ptr + 2 * token - 2)) * tl.load(
                statistics_ptr + 2 * token - 1
            )
            before = before * weight + bias
        moved = tl.where(counts, before - (unit * weight + bias), 0.0)
        d_out, d_normed, d_before = _way(
            d_out_ptr, mu0_ptr, at, channel, mask, from_next, zero, COMPUTE
        )
        d_mu0 += d_out * moved
        if J > 1:
            d_out, d_normed, d_before = _way(
                d_out_ptr, mu1_ptr, at + plane, channel, mask, d_normed, d_before, COMPUTE
            )
            d_mu1 += d_out * moved
            d_out, d_normed, d_before = _way(
                d_out_ptr, mu2_ptr, at + 2 * plane, channel, mask, d_normed, d_before, COMPUTE
            )
            d_mu2 += d_out * moved
            d_out, d_normed, d_before = _way(
                d_out_ptr, mu3_ptr, at + 3 * plane, channel, mask, d_normed, d_before, COMPUTE
            )
            d_mu3 += d_out * moved
            d_out, d_normed, d_before = _way(
                d_out_ptr, mu4_ptr, at + 4 * plane, channel, mask, d_normed, d_before, COMPUTE
            )
            d_mu4 += d_out * moved
            d_out, d_normed, d_before = _way(
                d_out_ptr, mu5_ptr, at + 5 * plane, channel, mask, d_normed, d_before, COMPUTE
            )
            d_mu5 += d_out * moved
        d_normed = tl.where(counts, d_normed, 0.0)
        d_weight += d_normed * unit
        d_bias += d_normed
        from_next = tl.where(is_first, zero, d_before)
        token -= 1

    at = program * ((2 + J) * num_channels) + channel
    tl.store(partials_ptr + at, d_weight, mask=mask)
    tl.store(partials_ptr + at + num_channels, d_bias, mask=mask)
    tl.store(partials_ptr + at + 2 * num_channels, d_mu0, mask=mask)
    if J > 1:
        tl.store(partials_ptr + at + 3 * num_channels, d_mu1, mask=mask)
        tl.store(partials_ptr + at + 4 * num_channels, d_mu2, mask=mask)
        tl.store(partials_ptr + at + 5 * num_channels, d_mu3, mask=mask)
        tl.store(partials_ptr + at + 6 * num_channels, d_mu4, mask=mask)
        tl.store(partials_ptr + at + 7 * num_channels, d_mu5, mask=mask)


def norm_mix(
    x: Tensor, weight: Tensor, bias: Tensor, mus: Sequence[Tensor], batch: Batch, pool: Tensor
) -> Tensor:
    """`Backend.norm_mix` under autograd: the pool is read, and not written.

    Gradients of everything, the pool included. Under autocast the result has its type, as all
    that reads it are matrix products: rounding here is their rounding, for half the memory.
    """
    dtype = x.dtype
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
    rows, first = PackedRows.of_batch(batch), pool[batch.src_slot]
    out: Tensor = _NormMix.apply(rows, dtype, x, first, weight, bias, *mus)  # type: ignore[no-untyped-call]
    return out


class _NormMix(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows: PackedRows,
        dtype: torch.dtype,
        x: Tensor,
        first: Tensor,
        weight: Tensor,
        bias: Tensor,
        *mus: Tensor,
    ) -> Tensor:
        ctx.rows = rows
        x = x.contiguous()
        ctx.save_for_backward(x, first, weight, bias, *mus)
        order = torch.arange(first.shape[0], device=x.device)
        return launch(x, weight, bias, mus, first, order, order, rows, dtype, False)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows: PackedRows = ctx.rows
        x, first, *parameters = ctx.saved_tensors
        num_channels, d_out = x.shape[1], grads[0].contiguous()
        vectors = [v.reshape(-1).contiguous() for v in parameters]
        weight, bias, *mus = vectors
        mus += mus * (MAX_WAYS - len(mus))
        width = triton.next_power_of_2(num_channels)
        constants = {"J": len(parameters) - 2, "COMPUTE": COMPUTE_TYPE.get(x.dtype, tl.float32)}
        dtype = torch.promote_types(x.dtype, torch.float32)
        statistics_T2 = x.new_empty(rows.num_tokens, 2, dtype=dtype)
        d_x, d_first = torch.empty_like(x), torch.empty_like(first)
        rows_backward_kernel[(rows.num_tokens,)](
            x,
            weight,
            *mus,
            d_out,
            rows.starts,
            rows.sequences,
            statistics_T2,
            d_x,
            d_first,
            rows.num_tokens,
            num_channels,
            **constants,
            WIDTH=width,
            EPS=LAYER_NORM_EPS,
            num_warps=choose_row_warps(width),
        )
        tokens_per_program = -(-rows.num_tokens // MAX_RUNS)
        num_runs = -(-rows.num_tokens // tokens_per_program)
        partials = x.new_empty(num_runs, len(parameters), num_channels, dtype=dtype)
        parameters_backward_kernel[(num_runs, triton.cdiv(num_channels, BLOCK))](
            x,
            weight,
            bias,
            *mus,
            first,
            d_out,
            rows.starts,
            rows.sequences,
            statistics_T2,
            partials,
            rows.num_tokens,
            num_channels,
            tokens_per_program,
            **constants,
            BLOCK=BLOCK,
            num_warps=BLOCK_WARPS,
        )
        sums = partials.sum(0)
        d_parameters = [d.view(p.shape).to(p.dtype) for d, p in zip(sums, parameters, strict=True)]
        return (None, None, d_x, d_first, *d_parameters)


def choose_row_warps(width: int) -> int:
    """Fewer channels for each thread than forward: more is held."""
    return min(max(width // 128, 1), 16)
