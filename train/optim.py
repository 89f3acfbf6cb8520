"""AdamW with RWKV-LM's parameter groups, on flat buffers. Knows names and shapes, not the loss.

All weights of a model are views into one buffer, and so are gradients and moments; a group is a
range of each. The backend computes a group in one go, and the norm of all gradients as one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from config.schema import TrainConfig
from engine.kernels.optimizer import AdamWStep
from engine.model.rwkv7 import RWKV7

ALIGNMENT = 64  # in elements, so that each weight begins at a multiple of 256 bytes


@dataclass(frozen=True, slots=True)
class Group:
    """What a parameter's name and shape decide."""

    lr_scale: float
    has_decay: bool


def group_of(name: str, shape: Iterable[int]) -> Group:
    """Decay for weight matrices only; twice the learning rate for the decay bias `w0`.

    LoRA matrices, `r_k` and every vector are not decayed.
    """
    if name.endswith(".att.w0"):
        return Group(2.0, False)
    return Group(1.0, name.endswith(".weight") and sum(d > 1 for d in shape) >= 2)


@dataclass(frozen=True, slots=True)
class Outcome:
    """Of one step: what was read from the device, and whether the weights have changed."""

    loss: float
    grad_norm: float

    @property
    def is_finite(self) -> bool:
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


class AdamW:
    """The optimiser of one model, whose parameters and gradients it moves into its buffers.

    The model must be on its device, and `model.kernels` chosen. Gradients add up in `grads`.
    """

    def __init__(self, model: RWKV7, cfg: TrainConfig) -> None:
        self.num_steps = 0  # steps that changed the weights
        self._cfg, self._model = cfg, model
        members: dict[Group, dict[str, nn.Parameter]] = {}
        for name, parameter in model.named_parameters():
            members.setdefault(group_of(name, parameter.shape), {})[name] = parameter
        size = sum(_aligned(parameter.numel()) for parameter in model.parameters())
        like = model.emb.weight
        self.weights, self.grads, self.exp_avg, self.exp_avg_sq = (
            torch.zeros(size, dtype=like.dtype, device=like.device) for _ in range(4)
        )
        self.groups: dict[Group, slice] = {}
        self._places: dict[str, slice] = {}
        end = 0
        for group, parameters in members.items():
            start = end
            for name, parameter in parameters.items():
                place = self._places[name] = slice(end, end + parameter.numel())
                self.weights[place] = parameter.detach().flatten()
                parameter.data = self.weights[place].view(parameter.shape)
                parameter.grad = self.grads[place].view(parameter.shape)
                end += _aligned(parameter.numel())
            self.groups[group] = slice(start, end)

    def zero_grad(self) -> None:
        self.grads.zero_()

    def step(self, loss: Tensor, learning_rate: float) -> Outcome:
        """Change the weights by `grads`, clipped, unless these or the loss are not finite.

        Waits for the device once, at its end, to read the loss and the gradients' norm together.
        """
        kernels, cfg = self._model.kernels, self._cfg
        factor, norm = kernels.clip_factor(self.grads, loss, cfg.gradient_clip_val)
        for group, place in self.groups.items():
            buffers = (self.weights, self.grads, self.exp_avg, self.exp_avg_sq)
            step = AdamWStep(
                learning_rate=learning_rate * group.lr_scale,
                weight_decay=cfg.weight_decay if group.has_decay else 0.0,
                beta1=cfg.adam_beta1,
                beta2=cfg.adam_beta2,
                eps=cfg.adam_eps,
                number=self.num_steps + 1,
            )
            weights, grads, exp_avg, exp_avg_sq = (buffer[place] for buffer in buffers)
            kernels.adamw(weights, grads, exp_avg, exp_avg_sq, factor, step)
        outcome = Outcome(*torch.stack([loss.detach().to(norm.dtype), norm]).tolist())
        self.num_steps += outcome.is_finite
        return outcome

    def moments(self) -> dict[str, Tensor]:
        """The state as `NAME:MOMENT` and `NAME:step`, each moment of its parameter's shape."""
        found: dict[str, Tensor] = {}
        for name, parameter in self._model.named_parameters():
            place = self._places[name]
            found[f"{name}:exp_avg"] = self.exp_avg[place].view(parameter.shape)
            found[f"{name}:exp_avg_sq"] = self.exp_avg_sq[place].view(parameter.shape)
            found[f"{name}:step"] = torch.tensor(float(self.num_steps))
        return found

    def load_moments(self, tensors: Mapping[str, Tensor]) -> None:
        """The inverse of `moments`. A parameter that has none there never had a gradient."""
        for name, place in self._places.items():
            if f"{name}:step" in tensors:
                self.exp_avg[place] = tensors[f"{name}:exp_avg"].flatten().to(self.exp_avg)
                self.exp_avg_sq[place] = tensors[f"{name}:exp_avg_sq"].flatten().to(self.exp_avg)
                self.num_steps = int(tensors[f"{name}:step"])


def _aligned(num_elements: int) -> int:
    return -(-num_elements // ALIGNMENT) * ALIGNMENT
