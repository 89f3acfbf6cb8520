"""All that RWKV-7 computes of a token after its recurrence, in one Triton launch each way.

Group norm of y per head, the bonus of the current token, and the gate. Specification:
`reference.readout` and the gate after it. One program computes some tokens of one head, in
float32. Legend as in `prepare`, as are the conventions on padding.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.backend import TimeMixWeights
from engine.kernels.gpu.prepare import (
    NUM_WARPS,
    load_tile,
    store_tile,
    tokens_of,
    tokens_per_program,
)
from engine.kernels.reference import GROUP_NORM_EPS


@triton.jit
def _normalised(y, N: tl.constexpr, EPS: tl.constexpr):
    """y with mean 0 and variance 1 per token, and what it was multiplied by."""
    y -= (tl.sum(y, 1) / N)[:, None]
    scale = (1 / tl.sqrt(tl.sum(y * y, 1) / N + EPS))[:, None]
    return y * scale, scale


@triton.jit
def readout_kernel(
    y_pointer,
    r_pointer,
    k_pointer,
    v_pointer,
    g_pointer,
    r_k_pointer,
    weight_pointer,
    bias_pointer,
    out_pointer,
    sequences_pointer,
    dst_pointer,
    num_tokens,
    num_heads,
    N: tl.constexpr,
    TOKENS: tl.constexpr,
    PADS: tl.constexpr,
    EPS: tl.constexpr,
):
    """Program (i, h). Tokens of a sequence whose dst is negative are neither read nor written."""
    token, mask = tokens_of(num_tokens, sequences_pointer, dst_pointer, TOKENS, PADS)
    channel = tl.program_id(1) * N + tl.arange(0, N)
    at = token * (num_heads * N) + channel[None, :]
    z, _ = _normalised(load_tile(y_pointer, at, mask), N, EPS)
    z *= tl.load(weight_pointer + channel).to(tl.float32)[None, :]
    z += tl.load(bias_pointer + channel).to(tl.float32)[None, :]
    r_k = tl.load(r_k_pointer + channel).to(tl.float32)[None, :]
    product = load_tile(r_pointer, at, mask) * load_tile(k_pointer, at, mask) * r_k
    z += tl.sum(product, 1)[:, None] * load_tile(v_pointer, at, mask)
    store_tile(out_pointer, at, z * load_tile(g_pointer, at, mask), mask)


@triton.jit
def readout_backward_kernel(
    y_pointer,
    r_pointer,
    k_pointer,
    v_pointer,
    g_pointer,
    r_k_pointer,
    weight_pointer,
    bias_pointer,
    d_out_pointer,
    d_y_pointer,
    d_r_pointer,
    d_k_pointer,
    d_v_pointer,
    d_g_pointer,
    d_r_k_pointer,
    d_weight_pointer,
    d_bias_pointer,
    num_tokens,
    num_heads,
    N: tl.constexpr,
    TOKENS: tl.constexpr,
    EPS: tl.constexpr,
):
    """Program (i, h). Sums over its tokens go to row i of d_r_k, d_weight and d_bias [P, C]."""
    token, mask = tokens_of(num_tokens, d_y_pointer, d_y_pointer, TOKENS, False)
    channel = tl.program_id(1) * N + tl.arange(0, N)
    at = token * (num_heads * N) + channel[None, :]
    partial = tl.program_id(0).to(tl.int64) * (num_heads * N) + channel
    normed, scale = _normalised(load_tile(y_pointer, at, mask), N, EPS)
    weight = tl.load(weight_pointer + channel).to(tl.float32)[None, :]
    r_k = tl.load(r_k_pointer + channel).to(tl.float32)[None, :]
    r = load_tile(r_pointer, at, mask)
    k = load_tile(k_pointer, at, mask)
    v = load_tile(v_pointer, at, mask)
    bonus = tl.sum(r * k * r_k, 1)[:, None]
    z = normed * weight + tl.load(bias_pointer + channel).to(tl.float32)[None, :] + bonus * v

    d_out = load_tile(d_out_pointer, at, mask)
    store_tile(d_g_pointer, at, d_out * z, mask)
    d_z = d_out * load_tile(g_pointer, at, mask)
    tl.store(d_weight_pointer + partial, tl.sum(d_z * normed, 0))
    tl.store(d_bias_pointer + partial, tl.sum(d_z, 0))
    d_normed = d_z * weight
    along = (tl.sum(d_normed * normed, 1) / N)[:, None]
    d_y = scale * (d_normed - (tl.sum(d_normed, 1) / N)[:, None] - normed * along)
    store_tile(d_y_pointer, at, d_y, mask)
    store_tile(d_v_pointer, at, d_z * bonus, mask)
    d_bonus = tl.sum(d_z * v, 1)[:, None]
    store_tile(d_r_pointer, at, d_bonus * k * r_k, mask)
    store_tile(d_k_pointer, at, d_bonus * r * r_k, mask)
    tl.store(d_r_k_pointer + partial, tl.sum(d_bonus * r * k, 0))


def readout(
    y: Tensor,
    r: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    weights: TimeMixWeights,
    padding: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """[T, C] as `r`; r, k and v are those of the recurrence. Differentiable without padding."""
    inputs = (y, r, k, v, g, weights.r_k, weights.norm_weight, weights.norm_bias)
    tensors = [x.contiguous() for x in inputs]
    size = weights.r_k.shape[-1]
    if torch.is_grad_enabled() and any(x.requires_grad for x in inputs):
        assert padding is None, "training has no padding"
        out: Tensor = _Readout.apply(size, *tensors)  # type: ignore[no-untyped-call]
        return out
    return _forward(size, tensors, padding)


def _forward(size: int, tensors: list[Tensor], padding: tuple[Tensor, Tensor] | None) -> Tensor:
    num_tokens, width = tensors[1].shape
    out = torch.empty_like(tensors[1])
    sequences, dst = padding or (out, out)
    tokens = tokens_per_program(size)
    readout_kernel[(triton.cdiv(num_tokens, tokens), width // size)](
        *tensors,
        out,
        sequences,
        dst,
        num_tokens,
        width // size,
        N=size,
        TOKENS=tokens,
        PADS=padding is not None,
        EPS=GROUP_NORM_EPS,
        num_warps=NUM_WARPS,
    )
    return out


class _Readout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, size: int, *tensors: Tensor) -> Tensor:
        ctx.size = size
        ctx.save_for_backward(*tensors)
        return _forward(size, list(tensors), None)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors
        num_tokens, width = tensors[1].shape
        tokens = tokens_per_program(ctx.size)
        blocks = triton.cdiv(num_tokens, tokens)
        found = [torch.empty_like(x) for x in tensors[:5]]
        partial = torch.empty(3, blocks, width, device=grads[0].device)
        readout_backward_kernel[(blocks, width // ctx.size)](
            *tensors,
            grads[0].contiguous(),
            *found,
            *partial.unbind(),
            num_tokens,
            width // ctx.size,
            N=ctx.size,
            TOKENS=tokens,
            EPS=GROUP_NORM_EPS,
            num_warps=NUM_WARPS,
        )
        sums = zip(partial.sum(1), tensors[5:], strict=True)
        return (None, *found, *(x.view(like.shape).to(like.dtype) for x, like in sums))
