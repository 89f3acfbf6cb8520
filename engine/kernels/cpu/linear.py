"""Matrix products of rows, a block of 64 outputs and a chunk of rows at a time."""

from __future__ import annotations

from numba import njit

from engine.kernels.cpu.records import BFLOAT16, INT8
from engine.kernels.cpu.tiles import (
    BLOCK,
    FLOAT_TILE,
    GROUP,
    INT8_TILE,
    bfloat16_tile,
    float32_tile,
    int8_tile,
)
from engine.kernels.cpu.vector import (
    larger,
    largest,
    magnitude_bits,
    rounded,
    splat,
    store,
    store_bytes,
    store_int,
    store_scalar,
    total_int,
)

FLOAT_ROWS, INT8_ROWS = FLOAT_TILE.rows, INT8_TILE.rows
MAX_CHUNK = 192  # rows: their products with one block are 48 KiB
MIN_CHUNK = 96
CHUNK_BYTES = 1 << 19  # of the rows themselves: half of a usual second-level cache
LARGEST = 127.0


@njit(cache=True, nogil=True)
def chunk_rows(kind, num_rows, num_inputs):
    """Rows that go through a block together: few enough to stay in the cache."""
    if num_rows <= MIN_CHUNK:
        return num_rows
    row_bytes = num_inputs if kind == INT8 else 4 * num_inputs
    most = min(MAX_CHUNK, max(MIN_CHUNK // 2, CHUNK_BYTES // row_bytes))
    num_chunks = (num_rows + most - 1) // most
    return ((num_rows + num_chunks - 1) // num_chunks + 5) // 6 * 6


@njit(cache=True, nogil=True)
def multiply(kind, matrix, block, rows, first, count, out):
    """Rows `first` and on, times a block: float32 [count, 64] at `out`."""
    for i in range(0, count * BLOCK, 16):
        store(out, i, splat(0.0))
    num_inputs, stride = matrix.num_inputs, rows.stride
    elements = block * num_inputs * BLOCK
    row = 0
    if kind == INT8:
        num_groups = stride // GROUP
        scales = matrix.scales + 4 * (elements // GROUP)
        while row < count:
            n = min(INT8_ROWS, count - row)
            at = first + row
            int8_tile(
                n,
                matrix.weights + elements,
                rows.values + at * stride,
                stride,
                num_inputs,
                out + row * 4 * BLOCK,
                scales,
                rows.scales + 4 * at * num_groups,
                rows.corrections + 4 * at * num_groups,
            )
            row += n
        return
    while row < count:
        n = min(FLOAT_ROWS, count - row)
        x = rows.values + 4 * (first + row) * stride
        y = out + row * 4 * BLOCK
        if kind == BFLOAT16:
            w = matrix.weights + 2 * elements
            bfloat16_tile(n, w, x, stride, num_inputs, y, 0, 0, 0)
        else:
            w = matrix.weights + 4 * elements
            float32_tile(n, w, x, stride, num_inputs, y, 0, 0, 0)
        row += n


@njit(cache=True, nogil=True)
def put(kind, rows, row, group, a, b, c, d):
    """64 values of a row, at column 64 * group: as they are, or as int8 with a scale.

    A value that is not finite makes a scale that is not, so no row gets sound by rounding.
    """
    at = row * rows.stride + group * GROUP
    if kind != INT8:
        store(rows.values, at, a)
        store(rows.values, at + 16, b)
        store(rows.values, at + 32, c)
        store(rows.values, at + 48, d)
        return
    bits = larger(
        larger(magnitude_bits(a), magnitude_bits(b)), larger(magnitude_bits(c), magnitude_bits(d))
    )
    scale = largest(bits) / LARGEST
    inverse = splat(1.0 / scale if scale > 0.0 else 0.0)
    qa, qb, qc, qd = (
        rounded(a * inverse),
        rounded(b * inverse),
        rounded(c * inverse),
        rounded(d * inverse),
    )
    store_bytes(rows.values, at, qa)
    store_bytes(rows.values, at + 16, qb)
    store_bytes(rows.values, at + 32, qc)
    store_bytes(rows.values, at + 48, qd)
    place = row * (rows.stride // GROUP) + group
    store_scalar(rows.scales, place, scale)
    store_int(rows.corrections, place, -128 * total_int(qa + qb + qc + qd))
