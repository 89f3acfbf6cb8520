"""AdamW by torch's own fused kernel, where that is the fastest: float32 on a CPU.

Specification: `engine.kernels.optimizer.adamw`, which it leaves everything else to. It differs by
rounding alone: a few parts in ten million of each step.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim.adamw import adamw as fused_adamw

from engine.kernels import optimizer
from engine.kernels.optimizer import AdamWStep

BLOCK = 2**18  # of clipped gradients at once: a mebibyte, which a core's cache holds


def adamw(
    weights: Tensor,
    grads: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    factor: Tensor,
    step: AdamWStep,
) -> None:
    """One pass over all four buffers; clipped gradients exist a block at a time."""
    if weights.device.type != "cpu" or weights.dtype != torch.float32:
        optimizer.adamw(weights, grads, exp_avg, exp_avg_sq, factor, step)
    elif factor == 1:
        _step(weights, grads, exp_avg, exp_avg_sq, step)
    elif not factor.isnan():
        buffers = (weights, grads, exp_avg, exp_avg_sq)
        for w, g, m, v in zip(*(x.split(BLOCK) for x in buffers), strict=True):
            _step(w, g * factor, m, v, step)  # the kernel's `grad_scale` would change `grads`


def _step(w: Tensor, g: Tensor, m: Tensor, v: Tensor, step: AdamWStep) -> None:
    fused_adamw(
        [w],
        [g],
        [m],
        [v],
        [],
        [torch.tensor(step.number - 1.0)],  # it adds the one
        fused=True,
        amsgrad=False,
        beta1=step.beta1,
        beta2=step.beta2,
        lr=step.learning_rate,
        weight_decay=step.weight_decay,
        eps=step.eps,
        maximize=False,
    )
