"""Products with matrices of int8 on a GPU, as Triton kernels. Knows one product at a time.

The weights stay int8 until they are in registers; there they become the type of the activations,
which holds every int8 exactly. Each group of 64 inputs is one matrix product of its own, summed in
float32 and scaled there, so nothing is rounded that the specification does not round
(`reference.int8_linear`).

Few rows wait for the weights alone, so their inputs are divided among programs until there are
enough to keep the memory busy. Each program writes its part of the sum, and a second kernel adds
the parts in a fixed order: no atomics, the same result each time.

Legend: M rows, I inputs, O outputs, G groups; BM rows and BO outputs of one program; P parts.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.backend import INT8_GROUP

# Enough programs for several on each of 132 to 160 multiprocessors.
WANTED_PROGRAMS = 512
LEAST_GROUPS_OF_PART = 4  # shorter sums are not worth writing down
REDUCED_AT_ONCE = 1024


class Launch(NamedTuple):
    """How a product is divided: tiles of BM rows and BO outputs, and parts of the sum."""

    block_rows: int
    block_outputs: int
    groups_per_part: int
    num_parts: int
    num_warps: int
    num_stages: int


def launch_of(num_rows: int, num_outputs: int, num_inputs: int) -> Launch:
    """By shape alone, so that a captured graph and a later call compute the same."""
    num_groups = num_inputs // INT8_GROUP
    if num_rows <= 16:
        return _divided(16, 64, -(-num_outputs // 64), num_groups, num_warps=4, num_stages=4)
    if num_rows <= 64:
        tiles = -(-num_rows // 32) * -(-num_outputs // 64)
        return _divided(32, 64, tiles, num_groups, num_warps=4, num_stages=4)
    # The sum and the product of a group are both in registers: 128 * 128 would not fit.
    return Launch(128, 64, num_groups, 1, num_warps=8, num_stages=3)


def _divided(
    block_rows: int,
    block_outputs: int,
    num_tiles: int,
    num_groups: int,
    num_warps: int,
    num_stages: int,
) -> Launch:
    wanted = -(-WANTED_PROGRAMS // num_tiles)
    groups = max(LEAST_GROUPS_OF_PART, -(-num_groups // wanted))
    num_parts = -(-num_groups // groups)
    return Launch(block_rows, block_outputs, groups, num_parts, num_warps, num_stages)


@triton.jit
def _inputs(x_ptr, at, mask, IS_SQUARED_RELU: tl.constexpr, COMPUTE: tl.constexpr):
    x = tl.load(x_ptr + at, mask=mask, other=0.0)
    if IS_SQUARED_RELU:
        x = tl.maximum(x.to(tl.float32), 0.0)
        x = (x * x).to(x_ptr.dtype.element_ty)  # as a product of its own would store it
    return x.to(COMPUTE)


@triton.jit
def int8_kernel(
    x_ptr,
    weight_ptr,
    scale_ptr,
    y_ptr,
    num_rows,
    num_outputs,
    num_inputs,
    groups_per_part,
    BM: tl.constexpr,
    BO: tl.constexpr,
    GROUP: tl.constexpr,
    IS_SQUARED_RELU: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """Program (i, j, p): outputs i * BO .., rows j * BM .., groups p * groups_per_part ..

    x [M, I], weight int8 [O, I], scale [O, G]; y [P, M, O], of float32 where P > 1.
    """
    part = tl.program_id(2)
    num_groups = num_inputs // GROUP
    first = part * groups_per_part
    end = tl.minimum(first + groups_per_part, num_groups)

    row = tl.program_id(1) * BM + tl.arange(0, BM)
    output = tl.program_id(0) * BO + tl.arange(0, BO)
    lane = tl.arange(0, GROUP)
    has_row = (row < num_rows)[:, None]
    # Outputs past the last compute it again: their loads need no mask, and are not stored.
    read = tl.minimum(output, num_outputs - 1).to(tl.int64)
    x_at = row.to(tl.int64)[:, None] * num_inputs + first * GROUP + lane[None, :]
    weight_at = read[:, None] * num_inputs + first * GROUP + lane[None, :]
    scale_at = read * num_groups

    total = tl.zeros((BM, BO), dtype=tl.float32)
    # One group ahead: what is used after a product does not wait for memory.
    next_scale = tl.load(scale_ptr + scale_at + first)
    for group in range(first, end):
        scale = next_scale.to(tl.float32)
        next_scale = tl.load(scale_ptr + scale_at + tl.minimum(group + 1, end - 1))
        x = _inputs(x_ptr, x_at, has_row, IS_SQUARED_RELU, COMPUTE)
        weight = tl.load(weight_ptr + weight_at).to(COMPUTE)
        # Precision is a question of float32 alone, in which no GPU is configured to serve int8.
        total += tl.dot(x, tl.trans(weight), input_precision="ieee") * scale[None, :]
        x_at += GROUP
        weight_at += GROUP

    at = (part.to(tl.int64) * num_rows + row)[:, None] * num_outputs + output[None, :]
    is_real = has_row & (output < num_outputs)[None, :]
    tl.store(y_ptr + at, total.to(y_ptr.dtype.element_ty), mask=is_real)


@triton.jit
def add_parts(parts_ptr, y_ptr, num_parts, num_elements, BLOCK: tl.constexpr):
    """y [num_elements] = the sum of parts [P, num_elements], first to last."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < num_elements
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for _ in range(num_parts):
        total += tl.load(parts_ptr + at, mask=mask, other=0.0)
        parts_ptr += num_elements
    tl.store(y_ptr + at, total.to(y_ptr.dtype.element_ty), mask=mask)


def int8_linear(
    x: Tensor,
    weight_OI: Tensor,
    scale_OG: Tensor,
    is_squared_relu: bool = False,
    launch: Launch | None = None,
) -> Tensor:
    """`Backend.int8_linear`; with `is_squared_relu`, of relu(x)² instead of x.

    Computed in float32 whatever x is stored in, from products of its own type.
    """
    num_outputs, num_inputs = weight_OI.shape
    assert x.shape[-1] == num_inputs, f"{x.shape} of x, {weight_OI.shape} of the weight"
    assert num_inputs % INT8_GROUP == 0, f"{num_inputs} inputs are no multiple of {INT8_GROUP}"
    assert scale_OG.shape == (num_outputs, num_inputs // INT8_GROUP), scale_OG.shape
    assert weight_OI.is_contiguous()
    assert scale_OG.is_contiguous()
    x_MI = x.reshape(-1, num_inputs).contiguous()
    num_rows = x_MI.shape[0]
    y = torch.empty(num_rows, num_outputs, dtype=x.dtype, device=x.device)
    if num_rows == 0:
        return y.view(*x.shape[:-1], num_outputs)
    how = launch or launch_of(num_rows, num_outputs, num_inputs)
    target = y
    if how.num_parts > 1:
        shape = (how.num_parts, num_rows, num_outputs)
        target = torch.empty(shape, dtype=torch.float32, device=x.device)
    grid = (-(-num_outputs // how.block_outputs), -(-num_rows // how.block_rows), how.num_parts)
    int8_kernel[grid](
        x_MI,
        weight_OI,
        scale_OG,
        target,
        num_rows,
        num_outputs,
        num_inputs,
        how.groups_per_part,
        BM=how.block_rows,
        BO=how.block_outputs,
        GROUP=INT8_GROUP,
        IS_SQUARED_RELU=is_squared_relu,
        COMPUTE=_compute_type(x.dtype),
        num_warps=how.num_warps,
        num_stages=how.num_stages,
    )
    if how.num_parts > 1:
        add_parts[(-(-y.numel() // REDUCED_AT_ONCE),)](
            target, y, how.num_parts, y.numel(), BLOCK=REDUCED_AT_ONCE, num_warps=4
        )
    return y.view(*x.shape[:-1], num_outputs)


def int8_channel_mix(hidden_TF: Tensor, value_CF: Tensor, scale_CG: Tensor) -> Tensor:
    return int8_linear(hidden_TF, value_CF, scale_CG, is_squared_relu=True)


def _compute_type(dtype: torch.dtype) -> tl.dtype:
    return {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}.get(dtype, tl.float32)
