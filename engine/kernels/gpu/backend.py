"""The backend for GPUs: Triton kernels where there are some, the reference elsewhere.

Importing it needs triton. It knows which kernel serves which batch, not what they compute.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from engine.kernels import reference
from engine.kernels.backend import Batch, LoraWeights, TimeMixRows, TimeMixWeights
from engine.kernels.gpu.adamw import adamw, clip_factor
from engine.kernels.gpu.cross_entropy import cross_entropy_l2wrap
from engine.kernels.gpu.decode import decode
from engine.kernels.gpu.int8 import int8_channel_mix, int8_linear
from engine.kernels.gpu.lora import MAX_ROWS as MAX_LORA_ROWS
from engine.kernels.gpu.lora import lora as lora_of_few_rows
from engine.kernels.gpu.norm_mix import norm_mix as norm_mix_forward
from engine.kernels.gpu.norm_mix_grad import norm_mix as norm_mix_with_gradients
from engine.kernels.gpu.squared_relu import squared_relu
from engine.kernels.gpu.time_mix import time_mix_chunked
from engine.kernels.gpu.wkv import HEAD_SIZES

__all__ = [
    "adamw",
    "channel_mix",
    "clip_factor",
    "cross_entropy_l2wrap",
    "int8_channel_mix",
    "int8_linear",
    "lora",
    "norm_mix",
    "time_mix",
]


def norm_mix(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mus: Sequence[Tensor],
    batch: Batch,
    shift_pool: Tensor,
) -> Tensor:
    if torch.is_grad_enabled():
        return norm_mix_with_gradients(x, weight, bias, mus, batch, shift_pool)
    return norm_mix_forward(x, weight, bias, mus, batch, shift_pool)


def lora(
    x_w: Tensor, x_a: Tensor, x_v: Tensor | None, x_g: Tensor, weights: LoraWeights
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    is_training = torch.is_grad_enabled() or torch.is_autocast_enabled(x_w.device.type)
    if is_training or x_w.shape[0] > MAX_LORA_ROWS:
        return reference.lora(x_w, x_a, x_v, x_g, weights)
    return lora_of_few_rows(x_w, x_a, x_v, x_g, weights)


def time_mix(rows: TimeMixRows, weights: TimeMixWeights, batch: Batch, wkv_pool: Tensor) -> Tensor:
    if max(batch.lengths) == 1 and not torch.is_grad_enabled():
        return decode(rows, weights, batch.src_slot, batch.dst_slot, wkv_pool)
    if wkv_pool.dtype == torch.float64 or weights.r_k.shape[-1] not in HEAD_SIZES:
        return reference.time_mix(rows, weights, batch, wkv_pool)
    return time_mix_chunked(rows, weights, batch, wkv_pool)


def channel_mix(hidden_TF: Tensor, value_CF: Tensor) -> Tensor:
    if torch.is_grad_enabled():
        return reference.channel_mix(hidden_TF, value_CF)
    return F.linear(squared_relu(hidden_TF), value_CF)
