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


def adamw(
    weights: Tensor,
    grads: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    factor: Tensor,
    step: AdamWStep,
) -> None:
    """One pass over all four buffers; `grads` are afterwards what they were times `factor`."""
    if weights.device.type != "cpu" or weights.dtype != torch.float32:
        return optimizer.adamw(weights, grads, exp_avg, exp_avg_sq, factor, step)
    if factor.isnan():
        return None
    fused_adamw(
        [weights],
        [grads],
        [exp_avg],
        [exp_avg_sq],
        [],
        [torch.tensor(step.number - 1.0)],  # it adds the one
        fused=True,
        grad_scale=None if factor == 1 else factor.reciprocal(),
        amsgrad=False,
        beta1=step.beta1,
        beta2=step.beta2,
        lr=step.learning_rate,
        weight_decay=step.weight_decay,
        eps=step.eps,
        maximize=False,
    )
    return None
