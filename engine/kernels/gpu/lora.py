"""The low-rank products of a time mix for few rows, in two Triton launches where torch takes 13.

The first launch leads all inputs into their ranks, the second leads them out again. Few rows wait
for the weights alone, and ranks are narrow, so inputs are divided among programs: each writes its
part of the sums, which the second launch adds in a fixed order before the activation. No atomics,
the same result each time; and a row's result does not depend on how many rows there are.
Specification: `reference.lora`, but that ranks are rounded once, after the activation.

Legend: M rows, C channels, P parts. Products are in the order of `_PRODUCTS`: the one with the
most to do begins, and the first layer lacks the last.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.backend import LoraWeights

MAX_ROWS = 16  # one tile of the tensor cores; more rows are torch's
_PRODUCTS = ("g", "w", "a", "v")

BLOCK_RANK = 32  # a multiple of which every released checkpoint's ranks are
BLOCK_CHANNELS = 128  # summed at once
# Programs for half of 132 multiprocessors: more parts cost the second launch, which reads them
# in every program, more than they save the first.
WANTED_PROGRAMS, MAX_PARTS = 64, 4
BLOCK_RANK_OUT = 32  # summed at once
NUM_WARPS = 4

_COMPUTE_TYPE = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float64: tl.float64}


@triton.jit
def _of_product(product, of_g, of_w, of_a, of_v):
    """A number of the product."""
    of_last = tl.where(product == 2, of_a, of_v)
    return tl.where(product == 0, of_g, tl.where(product == 1, of_w, of_last))


@triton.jit
def _pointer_of_product(product, g_ptr, w_ptr, a_ptr, v_ptr):
    if product == 0:
        pointer = g_ptr
    elif product == 1:
        pointer = w_ptr
    elif product == 2:
        pointer = a_ptr
    else:
        pointer = v_ptr
    return pointer


@triton.jit(do_not_specialize=["num_rows"])
def lora_in_kernel(
    xg_ptr,
    xw_ptr,
    xa_ptr,
    xv_ptr,
    g1_ptr,
    w1_ptr,
    a1_ptr,
    v1_ptr,
    parts_ptr,
    num_rows,
    num_channels,
    g_rank,
    w_rank,
    a_rank,
    v_rank,
    sum_of_ranks,
    blocks_per_part,
    BM: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
    COMPUTE: tl.constexpr,
    SUM: tl.constexpr,
):
    """Program (i, p): the i-th tile of BR ranks, channels p * blocks_per_part * BC ..

    parts [P, M, sum of ranks], the products side by side.
    """
    tile, part = tl.program_id(0), tl.program_id(1)
    g_end = tl.cdiv(g_rank, BR)
    w_end = g_end + tl.cdiv(w_rank, BR)
    a_end = w_end + tl.cdiv(a_rank, BR)
    product = (tile >= g_end).to(tl.int32) + (tile >= w_end) + (tile >= a_end)
    tile -= _of_product(product, 0, g_end, w_end, a_end)
    rank = _of_product(product, g_rank, w_rank, a_rank, v_rank)
    offset = _of_product(product, 0, g_rank, g_rank + w_rank, g_rank + w_rank + a_rank)
    x_ptr = _pointer_of_product(product, xg_ptr, xw_ptr, xa_ptr, xv_ptr)
    weight_ptr = _pointer_of_product(product, g1_ptr, w1_ptr, a1_ptr, v1_ptr)

    row, column = tl.arange(0, BM)[:, None], tile * BR + tl.arange(0, BR)[None, :]
    first = part * blocks_per_part * BC
    end = tl.minimum(first + blocks_per_part * BC, num_channels)
    lane = tl.arange(0, BC)
    total = tl.zeros((BM, BR), dtype=SUM)
    for start in range(first, end, BC):
        channel = start + lane
        mask = (row < num_rows) & (channel < end)[None, :]
        x = tl.load(x_ptr + row * num_channels + channel[None, :], mask=mask, other=0.0)
        mask = (channel < end)[:, None] & (column < rank)
        weight = tl.load(weight_ptr + channel[:, None] * rank + column, mask=mask, other=0.0)
        total += tl.dot(x.to(COMPUTE), weight.to(COMPUTE), input_precision="ieee", out_dtype=SUM)
    at = (part * num_rows + row) * sum_of_ranks + offset + column
    tl.store(parts_ptr + at, total, mask=(row < num_rows) & (column < rank))


@triton.jit(do_not_specialize=["num_rows"])
def lora_out_kernel(
    parts_ptr,
    g2_ptr,
    w2_ptr,
    a2_ptr,
    v2_ptr,
    w0_ptr,
    a0_ptr,
    v0_ptr,
    out_ptr,
    num_rows,
    num_channels,
    g_rank,
    w_rank,
    a_rank,
    v_rank,
    sum_of_ranks,
    P: tl.constexpr,
    BM: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
    COMPUTE: tl.constexpr,
    SUM: tl.constexpr,
):
    """Program (i, product): channels i * BC .. of one product; out [products, M, C]."""
    product = tl.program_id(1)
    rank = _of_product(product, g_rank, w_rank, a_rank, v_rank)
    offset = _of_product(product, 0, g_rank, g_rank + w_rank, g_rank + w_rank + a_rank)
    weight_ptr = _pointer_of_product(product, g2_ptr, w2_ptr, a2_ptr, v2_ptr)
    bias_ptr = _pointer_of_product(product, w0_ptr, w0_ptr, a0_ptr, v0_ptr)
    # The gate's activation is a sigmoid, and the decay's is tanh(x) = 2 sigmoid(2x) - 1: near 0
    # that is off by an ulp of 1, as d is anyhow once the bias, which is of that size, is added.
    slope = tl.where(product == 1, 2.0, 1.0)

    row = tl.arange(0, BM)[:, None]
    column = tl.program_id(0) * BC + tl.arange(0, BC)[None, :]
    lane = tl.arange(0, BR)
    total = tl.zeros((BM, BC), dtype=SUM)
    for start in range(0, rank, BR):
        at_rank = start + lane
        mask = (at_rank < rank)[:, None] & (column < num_channels)
        weight = tl.load(weight_ptr + at_rank[:, None] * num_channels + column, mask, other=0.0)
        at = row * sum_of_ranks + offset + at_rank[None, :]
        mask = (row < num_rows) & (at_rank < rank)[None, :]
        h = tl.load(parts_ptr + at, mask=mask, other=0.0)
        for part in tl.static_range(1, P):
            h += tl.load(parts_ptr + part * num_rows * sum_of_ranks + at, mask=mask, other=0.0)
        h = tl.where(product <= 1, slope * tl.sigmoid(slope * h) - (slope - 1), h)
        total += tl.dot(h.to(COMPUTE), weight.to(COMPUTE), input_precision="ieee", out_dtype=SUM)
    mask = column < tl.where(product > 0, num_channels, 0)  # the gate has no bias
    total += tl.load(bias_ptr + column, mask=mask, other=0.0).to(SUM)
    at = (product * num_rows + row) * num_channels + column
    mask = (row < num_rows) & (column < num_channels)
    tl.store(out_ptr + at, total.to(out_ptr.dtype.element_ty), mask=mask)


def lora(
    x_w: Tensor,
    x_a: Tensor,
    x_v: Tensor | None,
    x_g: Tensor,
    weights: LoraWeights,
    num_parts: int | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """`Backend.lora` of at most `MAX_ROWS` rows, without gradients; inputs and weights of one type.

    Sums are in float32, or float64 for that type. `num_parts` at most: chosen if not given.
    """
    num_rows, num_channels = x_w.shape
    assert num_rows <= MAX_ROWS, f"{num_rows} rows"
    x = [x_g, x_w, x_a, x_w if x_v is None else x_v]
    into, out_of, biases = (
        [getattr(weights, f"{name}{i}").contiguous() for name in _PRODUCTS if (name, i) != ("g", 0)]
        for i in (1, 2, 0)
    )
    assert all(t.dtype == x_w.dtype for t in (*x, *into, *out_of, *biases)), x_w.dtype
    num_products = 3 if x_v is None else 4
    ranks = [w.shape[1] for w in into[:num_products]]
    ranks += [0] * (4 - num_products)
    dtype = torch.promote_types(x_w.dtype, torch.float32)
    num_tiles = sum(-(-rank // BLOCK_RANK) for rank in ranks)
    blocks = blocks_per_part(num_tiles, num_channels, num_parts)
    num_parts = -(-num_channels // (blocks * BLOCK_CHANNELS))
    parts = torch.empty(num_parts, num_rows, sum(ranks), dtype=dtype, device=x_w.device)
    out = torch.empty(num_products, num_rows, num_channels, dtype=x_w.dtype, device=x_w.device)
    shape = (num_rows, num_channels, *ranks, sum(ranks))
    constants = {
        "BM": MAX_ROWS,
        "COMPUTE": _COMPUTE_TYPE.get(x_w.dtype, tl.float32),
        "SUM": _COMPUTE_TYPE.get(dtype, tl.float32),
        "num_warps": NUM_WARPS,
        "num_stages": choose_num_stages(x_w.dtype.itemsize),
    }
    lora_in_kernel[(num_tiles, num_parts)](
        *(rows.contiguous() for rows in x),
        *into,
        parts,
        *shape,
        blocks,
        BR=BLOCK_RANK,
        BC=BLOCK_CHANNELS,
        **constants,
    )
    block = choose_block_out(num_channels)
    lora_out_kernel[(-(-num_channels // block), num_products)](
        parts,
        *out_of,
        *biases,
        out,
        *shape,
        P=num_parts,
        BR=BLOCK_RANK_OUT,
        BC=block,
        **constants,
    )
    g, d, a, *rest = out.unbind()
    return d, a, rest[0] if rest else None, g


def blocks_per_part(num_tiles: int, num_channels: int, num_parts: int | None = None) -> int:
    """Blocks of channels that one program sums, by shape alone."""
    num_blocks = -(-num_channels // BLOCK_CHANNELS)
    if num_parts is None:
        num_parts = min(MAX_PARTS, -(-WANTED_PROGRAMS // num_tiles))
    return -(-num_blocks // num_parts)


def choose_num_stages(itemsize: int) -> int:
    """What is on its way stays within 48 KiB, so that several programs share a multiprocessor."""
    return {8: 2, 4: 3}.get(itemsize, 4)


def choose_block_out(num_channels: int) -> int:
    """Channels of a program of the second launch, which reads all of a product's parts."""
    return 64 if num_channels >= 2048 else 32
