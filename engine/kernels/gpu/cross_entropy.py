"""Head, cross-entropy and L2Wrap over chunks of rows: torch's products, one Triton kernel between.

The logits of a chunk become their own gradient in place, so neither those of all rows nor a second
tensor of that size ever exists. Both gradients are ready after the forward: the backward only
scales them. Specification: `reference.cross_entropy_l2wrap`. Knows no model.

Legend: M rows of a chunk or of all chunks, V vocabulary, C channels.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.reference import L2WRAP_FACTOR

BLOCK, NUM_WARPS = 2048, 8  # 8 values of a row per thread
LOGITS_BYTES_PER_CHUNK = 512 * 2**20
_COMPUTE_TYPE = {torch.float64: tl.float64}


@triton.jit
def cross_entropy_kernel(
    logits_ptr,
    target_ptr,
    loss_ptr,
    V: tl.constexpr,  # also as Triton 3.6 interprets no loop to an argument
    HAS_GRADIENT: tl.constexpr,
    HAS_L2WRAP: tl.constexpr,
    L2WRAP_FACTOR: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(target_ptr + row)
    logits_ptr += row * V
    lane = tl.arange(0, BLOCK)

    # Of each lane: the largest logit so far, where it was first seen, and the sum of exponentials
    # relative to it. It begins at a finite number, so that -inf - -inf never arises.
    top = tl.full((BLOCK,), -3.0e38, COMPUTE)
    total = tl.zeros((BLOCK,), COMPUTE)
    top_column = tl.zeros((BLOCK,), tl.int32)
    wanted = tl.zeros((BLOCK,), COMPUTE)
    for start in range(0, V, BLOCK):
        column = start + lane
        x = tl.load(logits_ptr + column, mask=column < V, other=-float("inf")).to(COMPUTE)
        larger = tl.maximum(top, x)
        total = total * tl.exp(top - larger) + tl.exp(x - larger)
        top_column = tl.where(x > top, column, top_column)
        wanted = tl.where(column == target, x, wanted)
        top = larger
    row_top = tl.max(top, 0)
    log_sum = row_top + tl.log(tl.sum(total * tl.exp(top - row_top), 0))
    tl.store(loss_ptr + row, log_sum - tl.sum(wanted, 0))

    if HAS_GRADIENT:
        # Every logit has been read by now: the sums above have made the threads wait.
        first_top = tl.min(tl.where(top == row_top, top_column, V), 0)
        for start in range(0, V, BLOCK):
            column = start + lane
            inside = column < V
            x = tl.load(logits_ptr + column, mask=inside, other=-float("inf")).to(COMPUTE)
            gradient = tl.exp(x - log_sum) - tl.where(column == target, 1.0, 0.0)
            if HAS_L2WRAP:
                gradient += tl.where(column == first_top, row_top * L2WRAP_FACTOR, 0.0)
            gradient = gradient.to(logits_ptr.dtype.element_ty)
            tl.store(logits_ptr + column, gradient, mask=inside)


def cross_entropy_l2wrap(
    hidden_MC: Tensor,
    weight_VC: Tensor,
    targets_M: Tensor,
    l2wrap: bool = True,
    rows_per_chunk: int | None = None,
) -> Tensor:
    """As the reference: products in the type of `hidden`, the loss in float32 at least.

    Targets are int64 in [0, V). Gradients are the same in every run.
    """
    rows_per_chunk = rows_per_chunk or choose_rows_per_chunk(weight_VC.shape[0], hidden_MC.dtype)
    if not torch.is_grad_enabled():
        return _run(hidden_MC, weight_VC, targets_M, l2wrap, rows_per_chunk, None, None)
    loss: Tensor = _CrossEntropyL2Wrap.apply(  # type: ignore[no-untyped-call]
        hidden_MC, weight_VC, targets_M, l2wrap, rows_per_chunk
    )
    return loss


def choose_rows_per_chunk(vocab_size: int, dtype: torch.dtype) -> int:
    """Rows whose logits fill half a gigabyte: the weight's gradient is read once per chunk."""
    return max(1, LOGITS_BYTES_PER_CHUNK // (vocab_size * dtype.itemsize))


class _CrossEntropyL2Wrap(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        l2wrap: bool,
        rows_per_chunk: int,
    ) -> Tensor:
        gradients = torch.empty_like(hidden), torch.zeros_like(weight)
        loss = _run(hidden, weight, targets, l2wrap, rows_per_chunk, *gradients)
        ctx.save_for_backward(*gradients)
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        # In place: the weight's may be a gigabyte. A second backward through it is an error.
        return grad_hidden.mul_(upstream), grad_weight.mul_(upstream), None, None, None


def _run(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    l2wrap: bool,
    rows_per_chunk: int,
    grad_hidden: Tensor | None,
    grad_weight: Tensor | None,
) -> Tensor:
    """The mean loss; writes grad_hidden, and adds to grad_weight."""
    num_rows, vocab_size = hidden.shape[0], weight.shape[0]
    product, targets = weight.to(hidden.dtype), targets.contiguous()
    losses = torch.empty(
        num_rows, dtype=torch.promote_types(hidden.dtype, torch.float32), device=hidden.device
    )
    for first in range(0, num_rows, rows_per_chunk):
        rows = slice(first, first + rows_per_chunk)
        x = hidden[rows]
        logits = x @ product.T
        cross_entropy_kernel[(logits.shape[0],)](
            logits,
            targets[rows],
            losses[rows],
            V=vocab_size,
            HAS_GRADIENT=grad_hidden is not None,
            HAS_L2WRAP=l2wrap,
            L2WRAP_FACTOR=L2WRAP_FACTOR,
            COMPUTE=_COMPUTE_TYPE.get(losses.dtype, tl.float32),
            BLOCK=min(BLOCK, max(16, triton.next_power_of_2(vocab_size))),
            num_warps=NUM_WARPS,
        )
        if grad_hidden is None or grad_weight is None:
            continue
        # 1 / M comes after the products, as it would leave little of probabilities in float16.
        torch.mm(logits, product, out=grad_hidden[rows]).div_(num_rows)
        grad_weight.add_(logits.T @ x, alpha=1 / num_rows)
    return losses.sum() / num_rows
