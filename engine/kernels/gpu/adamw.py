"""Clipping and AdamW on flat buffers by Triton: one launch per group of weights.

Nothing waits for the host: the factor of clipping stays on the device, and tells a step that is to
be skipped as well. Specification: `engine.kernels.optimizer`. Knows neither names nor parameters.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.optimizer import NORM_EPS, AdamWStep

BLOCK, NUM_WARPS = 1024, 4  # 8 values of float32 per thread: two loads of 16 bytes
NUM_PARTIALS = 1024  # sums of squares, one per program; sums of them do not depend on the GPU


@triton.jit
def sum_of_squares_kernel(
    grads_ptr, partials_ptr, num_elements, NUM_ROUNDS: tl.constexpr, BLOCK: tl.constexpr
):
    program = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for i in range(0, NUM_ROUNDS):
        at = (i * tl.num_programs(0) + program) * BLOCK + lane
        g = tl.load(grads_ptr + at, mask=at < num_elements, other=0.0)
        total += g * g
    tl.store(partials_ptr + program, tl.sum(total, 0))


@triton.jit
def clip_factor_kernel(
    partials_ptr,
    loss_ptr,
    factor_ptr,
    norm_ptr,
    max_norm,
    NUM_PARTIALS: tl.constexpr,
    NORM_EPS: tl.constexpr,
):
    norm = tl.sqrt(tl.sum(tl.load(partials_ptr + tl.arange(0, NUM_PARTIALS)), 0))
    loss = tl.load(loss_ptr).to(tl.float32)
    factor = tl.minimum(max_norm / (norm + NORM_EPS), 1.0)
    is_finite = (tl.abs(norm) < float("inf")) & (tl.abs(loss) < float("inf"))
    tl.store(factor_ptr, tl.where(is_finite, factor, float("nan")))
    tl.store(norm_ptr, norm)


@triton.jit
def adamw_kernel(
    weights_ptr,
    grads_ptr,
    exp_avg_ptr,
    exp_avg_sq_ptr,
    factor_ptr,
    num_elements,
    keep,  # 1 - learning rate * weight decay
    step_size,  # learning rate / correction1
    share1,  # 1 - beta1
    share2,  # 1 - beta2
    scale2,  # 1 / sqrt(correction2)
    eps,
    BLOCK: tl.constexpr,
):
    factor = tl.load(factor_ptr)
    if factor != factor:  # NaN: this step is skipped
        return
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < num_elements
    g = tl.load(grads_ptr + at, mask=inside, other=0.0) * factor
    m = tl.load(exp_avg_ptr + at, mask=inside, other=0.0)
    v = tl.load(exp_avg_sq_ptr + at, mask=inside, other=0.0)
    w = tl.load(weights_ptr + at, mask=inside, other=0.0)
    m += (g - m) * share1
    v += (g * g - v) * share2
    w = w * keep - step_size * m / (tl.sqrt(v) * scale2 + eps)
    tl.store(exp_avg_ptr + at, m, mask=inside)
    tl.store(exp_avg_sq_ptr + at, v, mask=inside)
    tl.store(weights_ptr + at, w, mask=inside)


def clip_factor(grads: Tensor, loss: Tensor, max_norm: float) -> tuple[Tensor, Tensor]:
    """`optimizer.clip_factor` for float32; the same in every run."""
    assert grads.dtype == torch.float32, grads.dtype
    assert grads.is_contiguous()
    partials = torch.empty(NUM_PARTIALS, device=grads.device)
    factor, norm = (torch.empty((), device=grads.device) for _ in range(2))
    num_rounds = triton.cdiv(grads.numel(), NUM_PARTIALS * BLOCK)
    sum_of_squares_kernel[(NUM_PARTIALS,)](
        grads, partials, grads.numel(), NUM_ROUNDS=num_rounds, BLOCK=BLOCK, num_warps=NUM_WARPS
    )
    clip_factor_kernel[(1,)](
        partials,
        loss.detach(),
        factor,
        norm,
        max_norm,
        NUM_PARTIALS=NUM_PARTIALS,
        NORM_EPS=NORM_EPS,
        num_warps=NUM_WARPS,
    )
    return factor, norm


def adamw(
    weights: Tensor,
    grads: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    factor: Tensor,
    step: AdamWStep,
) -> None:
    """`optimizer.adamw` for float32."""
    for x in (weights, grads, exp_avg, exp_avg_sq):
        assert x.dtype == torch.float32, x.dtype
        assert x.is_contiguous()
        assert x.shape == weights.shape
    adamw_kernel[(triton.cdiv(weights.numel(), BLOCK),)](
        weights,
        grads,
        exp_avg,
        exp_avg_sq,
        factor,
        weights.numel(),
        1 - step.learning_rate * step.weight_decay,
        step.learning_rate / step.correction1,
        1 - step.beta1,
        1 - step.beta2,
        1 / math.sqrt(step.correction2),
        step.eps,
        BLOCK=BLOCK,
        num_warps=NUM_WARPS,
    )
