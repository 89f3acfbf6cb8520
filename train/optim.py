"""AdamW with RWKV-LM's parameter groups. Knows names and shapes, not the loss."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from config.schema import TrainConfig


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


def make_optimizer(model: nn.Module, cfg: TrainConfig) -> torch.optim.AdamW:
    """One parameter group of torch per `Group`, each with its `lr_scale`."""
    members: dict[Group, list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        members.setdefault(group_of(name, parameter.shape), []).append(parameter)
    return torch.optim.AdamW(
        [
            {
                "params": parameters,
                "lr_scale": group.lr_scale,
                "weight_decay": cfg.weight_decay if group.has_decay else 0.0,
            }
            for group, parameters in members.items()
        ],
        lr=cfg.learning_rate_start,
        betas=(cfg.adam_beta1, cfg.adam_beta2),
        eps=cfg.adam_eps,
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group["lr_scale"]


MOMENTS = ("exp_avg", "exp_avg_sq", "step")


def moments(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """The optimiser's tensors as `NAME:MOMENT`; parameters that never had a gradient have none."""
    return {
        f"{name}:{key}": optimizer.state[parameter][key]
        for name, parameter in model.named_parameters()
        if parameter in optimizer.state
        for key in MOMENTS
    }


def load_moments(
    optimizer: torch.optim.Optimizer, model: nn.Module, tensors: dict[str, Tensor]
) -> None:
    """The inverse of `moments`, copied to each parameter's device."""
    for name, parameter in model.named_parameters():
        if f"{name}:step" in tensors:
            optimizer.state[parameter] = {
                key: tensors[f"{name}:{key}"].to("cpu" if key == "step" else parameter.device)
                for key in MOMENTS
            }
