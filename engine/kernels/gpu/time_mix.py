"""The time mix of prompts and of training by Triton kernels. Knows their order, no formulas.

Three parts: what is needed of each token, the recurrence in chunks, and what becomes of its
result. Without autograd states go from slot to slot in place; with it they go in and come out as
tensors, and nothing is stored.
"""

from __future__ import annotations

import torch
from torch import Tensor

from engine.kernels.backend import Batch, TimeMixRows, TimeMixWeights
from engine.kernels.gpu.packed import PackedRows
from engine.kernels.gpu.prepare import Prepared, prepare
from engine.kernels.gpu.readout import readout
from engine.kernels.gpu.wkv import Inputs, prefill, wkv7


def time_mix_chunked(
    rows: TimeMixRows, weights: TimeMixWeights, batch: Batch, wkv_pool: Tensor
) -> Tensor:
    """`Backend.time_mix` for sequences of any lengths, and under autograd.

    Sequences of a negative dst are padding and cost nothing; their y is undefined. Training has
    none. The pool holds at most float32, its states are contiguous, and N is of `HEAD_SIZES`.
    """
    packed = PackedRows.of_batch(batch)
    training = torch.is_grad_enabled()
    padding = None if training else (packed.sequences, batch.dst_slot)
    prepared = prepare(rows, weights, padding)
    r = rows.r.contiguous()
    inputs = _by_head(r, prepared, weights.r_k.shape)
    if training:
        r_, lw, k, v, a, b = inputs  # in half precision, v of the first layer would not fit
        inputs = r_, lw, k, v.float(), a, b
        y, _ = wkv7(inputs, packed, wkv_pool[batch.src_slot].float())
    else:
        y = prefill(inputs, packed, wkv_pool, batch.src_slot, wkv_pool, batch.dst_slot)
    return readout(y.view(r.shape), r, prepared.k, prepared.v, rows.g, weights, padding)


def _by_head(r: Tensor, prepared: Prepared, heads: torch.Size) -> Inputs:
    lw, k, v, a, b = (x.view(-1, *heads) for x in prepared)
    return r.view(-1, *heads), lw, k, v, a, b
