"""The specification of what ends a training step: clipping and AdamW, on flat buffers, in torch.

Knows neither names nor parameters. Formulas: "Decoupled Weight Decay Regularization", arXiv
1711.05101, with the bias corrections of torch.optim.AdamW.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

NORM_EPS = 1e-6  # torch.nn.utils.clip_grad_norm_ has it, too
_BLOCK = 2**16  # summed by itself: float32 loses less in a sum of few


@dataclass(frozen=True, slots=True, kw_only=True)
class AdamWStep:
    """Of one group of weights; `number` counts steps from 1."""

    learning_rate: float
    weight_decay: float
    beta1: float
    beta2: float
    eps: float
    number: int

    @property
    def correction1(self) -> float:
        return 1 - self.beta1**self.number

    @property
    def correction2(self) -> float:
        return 1 - self.beta2**self.number


def clip_factor(grads: Tensor, loss: Tensor, max_norm: float) -> tuple[Tensor, Tensor]:
    """What all gradients are to be multiplied by, and their norm; scalars on their device.

    The factor is NaN where the loss or the norm is not finite.
    """
    norms = torch.stack([torch.linalg.vector_norm(block) for block in grads.split(_BLOCK)])
    norm = torch.linalg.vector_norm(norms)
    factor = (max_norm / (norm + NORM_EPS)).clamp(max=1)
    return torch.where(norm.isfinite() & loss.isfinite(), factor, math.nan), norm


@torch.no_grad()
def adamw(
    weights: Tensor,
    grads: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    factor: Tensor,
    step: AdamWStep,
) -> None:
    """One step in place, with the gradients times `factor`; none at all where that is NaN."""
    if factor.isnan():
        return
    g = grads * factor
    exp_avg.lerp_(g, 1 - step.beta1)
    exp_avg_sq.mul_(step.beta2).addcmul_(g, g, value=1 - step.beta2)
    scale = exp_avg_sq.sqrt().div_(math.sqrt(step.correction2)).add_(step.eps)
    weights.mul_(1 - step.learning_rate * step.weight_decay)
    weights.addcdiv_(exp_avg, scale, value=-step.learning_rate / step.correction1)
