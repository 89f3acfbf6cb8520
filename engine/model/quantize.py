"""Matrices of int8 with one scale for each group of 64 inputs: how they are made, and the layer.

It knows one matrix at a time, not files and not which GPU computes it. Symmetric, so that a weight
of zero stays zero: weight = int8 * scale, with scale the largest of the group / 127.

Legend: O outputs, I inputs of a matrix, G = I / 64 groups.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from engine.kernels import reference
from engine.kernels.backend import INT8_GROUP, Backend

ELEMENTS_AT_ONCE = 1 << 22  # 16 MiB of float32, so that a matrix never exists in it as a whole
LARGEST = 127


class Int8Linear(nn.Module):
    """A linear layer without bias: weight int8 [O, I], scale float16 [O, G]. Not trainable."""

    weight: Tensor
    scale: Tensor

    def __init__(self, weight_OI: Tensor, scale_OG: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight_OI)
        self.register_buffer("scale", scale_OG)
        self.kernels: Backend = reference

    def forward(self, x: Tensor) -> Tensor:
        return self.kernels.int8_linear(x, self.weight, self.scale)


def can_quantize(num_inputs: int) -> bool:
    return num_inputs % INT8_GROUP == 0


def quantize(weight_OI: Tensor, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """int8 [O, I] and float16 [O, G], both on `device`, of a matrix that may be elsewhere.

    Works through a few rows at a time. Raises ValueError for what no scale can express.
    """
    num_outputs, num_inputs = weight_OI.shape
    assert can_quantize(num_inputs), f"{num_inputs} inputs are no multiple of {INT8_GROUP}"
    packed = torch.empty(num_outputs, num_inputs, dtype=torch.int8, device=device)
    scales = torch.empty(num_outputs, num_inputs // INT8_GROUP, dtype=torch.float16, device=device)
    step = max(1, ELEMENTS_AT_ONCE // num_inputs)
    for first in range(0, num_outputs, step):
        rows = slice(first, first + step)
        groups_RGJ = weight_OI[rows].to(device).float().unflatten(1, (-1, INT8_GROUP))
        scale_RG = scales_of(groups_RGJ.abs().amax(-1))
        # A group of zeros has a scale of 0, and int8 of 0 / 1.
        divisor_RG1 = scale_RG.float().masked_fill(scale_RG == 0, 1.0).unsqueeze(-1)
        rounded = (groups_RGJ / divisor_RG1).round_().clamp_(-LARGEST, LARGEST)
        packed[rows] = rounded.flatten(1).to(torch.int8)
        scales[rows] = scale_RG
    return packed, scales


def scales_of(largest: Tensor) -> Tensor:
    """Of groups with such magnitudes, in float16; never so much rounded down that one is cut.

    Raises ValueError for what no scale can express.
    """
    exact = largest / LARGEST
    scale = exact.half()
    is_cut = scale.float() * (LARGEST + 0.5) < exact * LARGEST
    above = torch.nextafter(scale, torch.full_like(scale, torch.inf))
    scale = torch.where(is_cut, above, scale)
    if not torch.isfinite(scale).all():
        reason = "infinity, NaN, or a value beyond 8e6, which a scale in float16 cannot express"
        raise ValueError(f"holds {reason}")
    return scale


def replace_linears(model: nn.Module) -> None:
    """Every nn.Linear of a module without weights becomes an Int8Linear without weights."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                assert child.weight.is_meta, f"{name} has weights; quantize them one by one"
                num_outputs, num_inputs = child.weight.shape
                weight = torch.empty(num_outputs, num_inputs, dtype=torch.int8, device="meta")
                shape = (num_outputs, num_inputs // INT8_GROUP)
                scale = torch.empty(shape, dtype=torch.float16, device="meta")
                setattr(parent, name, Int8Linear(weight, scale))
