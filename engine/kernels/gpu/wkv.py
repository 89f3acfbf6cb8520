"""WKV-7 over packed sequences by the Triton kernels in chunks: checks, launches, autograd.

Importing this needs triton; `reference.wkv7` is the same without it. Knows tensors and slots,
not who holds them.

Legend: T packed tokens of all sequences, S sequences, H heads, N head size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from engine.kernels.gpu import chunk
from engine.kernels.gpu.packed import CHUNK_LEN, PackedRows

NUM_WARPS = 8

# Of matrix products, and of the one that applies the inverse. "tf32" rounds operands to 11 bits,
# more than the bfloat16 they come from; "ieee" does without tensor cores, and its programs do not
# fit the registers of sm_90 (856 bytes on the stack at 8 warps, where these use none).
PRECISION, SOLVE_PRECISION = "tf32", "tf32x3"


Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]  # r, lw, k, v, a, b [T, H, N]


def prefill(
    inputs: Inputs,
    rows: PackedRows,
    source: Tensor,
    src_slot: Tensor,
    target: Tensor,
    dst_slot: Tensor,
    value_block: int | None = None,
) -> Tensor:
    """y [T, H, N]; the state of sequence s goes from source[src_slot[s]] to target[dst_slot[s]].

    `source` and `target` [slots, H, N, N] may be one tensor, and a layer of a pool: only the
    slots may be strided. Slots are int64 [S] on the device; a negative dst_slot marks padding,
    whose y is left undefined. No sequence may write a slot that another one reads.
    `value_block` value columns are computed by a program: fewer give more programs, each of
    which repeats the work within the chunk; all columns where it is None.
    """
    return _forward(inputs, rows, source, src_slot, target, dst_slot, None, value_block)


def wkv7(inputs: Inputs, rows: PackedRows, first_SHNN: Tensor) -> tuple[Tensor, Tensor]:
    """y [T, H, N] and the states [S, H, N, N] after each sequence, both differentiable.

    Gradients of the six inputs and of the states before, the same in every run. From forward to
    backward it keeps a state in float32 for each chunk: 16 bytes for each of the T*H*N channels
    where N is 64.
    """
    y, last = _WKV7.apply(rows, first_SHNN, *inputs)  # type: ignore[no-untyped-call]
    return y, last


class _WKV7(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: PackedRows, first: Tensor, *inputs: Tensor
    ) -> tuple[Tensor, Tensor]:
        assert first.dtype == torch.float32, first.dtype
        r, lw, k, v, a, b = inputs
        order = torch.arange(rows.num_sequences, device=first.device)
        last = torch.empty(first.shape, device=first.device)
        checkpoints = torch.empty(rows.num_chunks, *first.shape[1:], device=first.device)
        y = _forward((r, lw, k, v, a, b), rows, first, order, last, order, checkpoints)
        ctx.rows = rows
        ctx.save_for_backward(*inputs, checkpoints, last)
        return y, last

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows: PackedRows = ctx.rows
        d_y, d_last = (x.contiguous() for x in grads)
        *inputs, checkpoints, last = ctx.saved_tensors
        num_heads, size = _checked_shape((*inputs, d_y), rows)
        d_inputs = [torch.empty_like(x) for x in inputs]
        d_first = torch.empty_like(last)
        chunk.chunk_backward[(num_heads, rows.num_sequences)](
            *inputs,
            d_y,
            rows.starts,
            rows.chunk_starts,
            checkpoints,
            last,
            d_last,
            *d_inputs,
            d_first,
            num_heads,
            N=size,
            C=CHUNK_LEN,
            PRECISION=PRECISION,
            SOLVE_PRECISION=SOLVE_PRECISION,
            num_warps=NUM_WARPS,
        )
        return (None, d_first, *d_inputs)


def _forward(
    inputs: Inputs,
    rows: PackedRows,
    source: Tensor,
    src_slot: Tensor,
    target: Tensor,
    dst_slot: Tensor,
    checkpoints: Tensor | None,
    value_block: int | None = None,
) -> Tensor:
    num_heads, size = _checked_shape(inputs, rows)
    for states, slots in ((source, src_slot), (target, dst_slot)):
        assert states.shape[1:] == (num_heads, size, size), states.shape
        assert states.stride()[1:] == (size * size, size, 1), states.stride()
        assert slots.dtype == torch.int64, slots.dtype
        assert slots.shape == (rows.num_sequences,), slots.shape
    value_block = value_block or size
    y = torch.empty_like(inputs[3])
    chunk.chunk_forward[(num_heads, size // value_block, rows.num_sequences)](
        *inputs,
        y,
        rows.starts,
        rows.chunk_starts,
        source,
        source.stride(0),
        src_slot,
        target,
        target.stride(0),
        dst_slot,
        y if checkpoints is None else checkpoints,
        num_heads,
        N=size,
        V=value_block,
        C=CHUNK_LEN,
        HAS_CHECKPOINTS=checkpoints is not None,
        PRECISION=PRECISION,
        SOLVE_PRECISION=SOLVE_PRECISION,
        num_warps=NUM_WARPS,
    )
    return y


def _checked_shape(tensors: tuple[Tensor, ...], rows: PackedRows) -> tuple[int, int]:
    """H and N of packed tensors. Head sizes are powers of two from 16 on, as tl.dot has it."""
    _, num_heads, size = tensors[0].shape
    assert size >= 16, f"head size {size} is below 16"
    assert size & (size - 1) == 0, f"head size {size} is no power of two"
    for x in tensors:
        assert x.shape == (rows.num_tokens, num_heads, size), x.shape
        assert x.is_contiguous()
    return num_heads, size
