"""The backend of torch's RWKV7 on a CPU: the time mix by numba, everything else the reference's.

Importing it needs numba. It knows which of the two serves which types, not what they compute.
"""

from __future__ import annotations

import logging
from functools import cache

import torch
from torch import Tensor

from engine.kernels import reference
from engine.kernels.backend import Batch, TimeMixRows, TimeMixWeights
from engine.kernels.cpu.time_mix import is_float32
from engine.kernels.cpu.time_mix import time_mix as time_mix_of_float32
from engine.kernels.reference import adamw as adamw
from engine.kernels.reference import channel_mix as channel_mix
from engine.kernels.reference import clip_factor as clip_factor
from engine.kernels.reference import cross_entropy_l2wrap as cross_entropy_l2wrap
from engine.kernels.reference import int8_channel_mix as int8_channel_mix
from engine.kernels.reference import int8_linear as int8_linear
from engine.kernels.reference import lora as lora
from engine.kernels.reference import norm_mix as norm_mix

logger = logging.getLogger(__name__)

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


def time_mix(rows: TimeMixRows, weights: TimeMixWeights, batch: Batch, wkv_pool: Tensor) -> Tensor:
    if is_float32(rows, weights, wkv_pool):
        return time_mix_of_float32(rows, weights, batch, wkv_pool)
    _say_once(rows.r.dtype, wkv_pool.dtype)
    return reference.time_mix(rows, weights, batch, wkv_pool)


@cache
def _say_once(rows: torch.dtype, state: torch.dtype) -> None:
    logger.info("kernels: reference for the time mix (rows are %s, states %s)", rows, state)
