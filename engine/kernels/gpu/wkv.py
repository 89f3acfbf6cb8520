"""WKV-7 over packed sequences by the Triton kernels in chunks: checks, launches, autograd.

Importing this needs triton; `reference.wkv7` is the same without it. Knows tensors and slots,
not who holds them.

Legend: T packed tokens of all sequences, S sequences, H heads, N head size.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from engine.kernels.gpu import chunk, chunk_backward
from engine.kernels.gpu.packed import CHUNK_LEN, PackedRows

HEAD_SIZES = (16, 32, 64)  # states of larger heads do not fit the registers of a program

# Of matrix products, and of the one that applies the inverse. "tf32" keeps 11 bits of operands,
# more than the bfloat16 they come from, and cuts off the rest; "ieee" does without tensor cores.
# What each costs is in docs/architecture.md. AMD's compiler has not both, and its GPUs multiply
# float32.
IS_AMD = torch.version.hip is not None
PRECISION, SOLVE_PRECISION = ("ieee", "ieee") if IS_AMD else ("tf32", "tf32x3")


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
    """y [T, H, N] in float32; states go from source[src_slot] to target[dst_slot].

    `source` and `target` [slots, H, N, N] may be one tensor, and a layer of a pool: only the
    slots may be strided. Slots are int64 [S] on the device; a negative dst_slot marks padding,
    whose y is left undefined. No sequence may write a slot that another one reads.
    `value_block` value columns are computed by a program, as many as `launch_of` says by default.
    """
    return _forward(inputs, rows, source, src_slot, target, dst_slot, value_block=value_block)


def wkv7(inputs: Inputs, rows: PackedRows, first_SHNN: Tensor) -> tuple[Tensor, Tensor]:
    """y [T, H, N] float32 and the states [S, H, N, N] after each sequence, both differentiable.

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
        u = torch.empty(v.shape, device=first.device)
        y = _forward((r, lw, k, v, a, b), rows, first, order, last, order, (u, checkpoints))
        ctx.rows = rows
        ctx.save_for_backward(*inputs, u, checkpoints)
        return y, last

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        d_y, d_last = (x.contiguous() for x in grads)
        r, lw, k, v, a, b, u, checkpoints = ctx.saved_tensors
        d_inputs, d_first = _backward(
            (r, lw, k, v, a, b), ctx.rows, u, checkpoints, d_y, d_last.float()
        )
        return (None, d_first, *d_inputs)


def _backward(
    inputs: Inputs,
    rows: PackedRows,
    u: Tensor,
    checkpoints: Tensor,
    d_y: Tensor,
    d_last: Tensor,
) -> tuple[list[Tensor], Tensor]:
    """Gradients of the inputs, each of its input's type, and of the states before."""
    r, lw, _, _, a, b = inputs
    num_heads, size = _checked_shape((*inputs, u, d_y), rows)
    launch = launch_of(size, capability_of(d_y.device))
    d_inputs = [torch.empty_like(x) for x in inputs]
    d_first, d_x, d_states = (torch.empty_like(x) for x in (d_last, u, checkpoints))
    chunk_backward.chunk_chain[(num_heads, size // launch.value_block, rows.num_sequences)](
        *(r, lw, a, b, d_y, rows.starts, rows.chunk_starts, d_last, d_x, d_states, d_first),
        num_heads,
        N=size,
        V=launch.value_block,
        C=CHUNK_LEN,
        PRECISION=PRECISION,
        SOLVE_PRECISION=SOLVE_PRECISION,
        num_warps=launch.num_warps,
    )
    chunk_backward.chunk_gradients[(rows.num_chunks, num_heads)](
        *(*inputs, d_y, rows.chunk_tokens, checkpoints, u, d_states, d_x, *d_inputs),
        num_heads,
        N=size,
        C=CHUNK_LEN,
        PRECISION=PRECISION,
        num_warps=gradient_warps(size, capability_of(d_y.device)),
    )
    return d_inputs, d_first


def _forward(
    inputs: Inputs,
    rows: PackedRows,
    source: Tensor,
    src_slot: Tensor,
    target: Tensor,
    dst_slot: Tensor,
    saved: tuple[Tensor, Tensor] | None = None,
    value_block: int | None = None,
) -> Tensor:
    num_heads, size = _checked_shape(inputs, rows)
    for states, slots in ((source, src_slot), (target, dst_slot)):
        assert states.shape[1:] == (num_heads, size, size), states.shape
        assert states.stride()[1:] == (size * size, size, 1), states.stride()
        assert slots.dtype == torch.int64, slots.dtype
        assert slots.shape == (rows.num_sequences,), slots.shape
    launch = launch_of(size, capability_of(source.device), value_block)
    y = torch.empty(inputs[3].shape, device=source.device)
    u, checkpoints = saved or (y, y)
    chunk.chunk_forward[(num_heads, size // launch.value_block, rows.num_sequences)](
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
        u,
        checkpoints,
        num_heads,
        N=size,
        V=launch.value_block,
        C=CHUNK_LEN,
        HAS_CHECKPOINTS=saved is not None,
        PRECISION=PRECISION,
        SOLVE_PRECISION=SOLVE_PRECISION,
        num_warps=launch.num_warps,
    )
    return y


def _checked_shape(tensors: tuple[Tensor, ...], rows: PackedRows) -> tuple[int, int]:
    """H and N of packed tensors."""
    _, num_heads, size = tensors[0].shape
    assert size in HEAD_SIZES, f"head size {size} is none of {HEAD_SIZES}"
    for x in tensors:
        assert x.shape == (rows.num_tokens, num_heads, size), x.shape
        assert x.is_contiguous()
    return num_heads, size


class Launch(NamedTuple):
    value_block: int  # value columns of a program
    num_warps: int


def launch_of(size: int, capability: tuple[int, int], value_block: int | None = None) -> Launch:
    """How programs that hold a state are cut; nothing of it uses the stack.

    A warp has 16 value columns of each product, so that all columns take no longer than some of
    them and the work within a chunk is done once. On sm_120 that does not fit its registers.
    """
    if value_block is None:
        value_block = 16 if capability[0] == 12 else size
    return Launch(value_block, max(2, size // 16))


def gradient_warps(size: int, capability: tuple[int, int]) -> int:
    """Of programs for one chunk: what leaves nothing on the stack where rows are of 16 bits."""
    return max(1, size // (16 if capability == (8, 9) else 8))


def capability_of(device: torch.device) -> tuple[int, int]:
    """As `torch.cuda` has it; that of an H100 under the interpreter."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)
