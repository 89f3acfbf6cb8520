"""Matrix products of rows, a block of 64 outputs and a chunk of rows at a time."""

from __future__ import annotations

from numba import float32, njit

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
MAX_CHUNK, MIN_CHUNK = 192, 96  # rows
CHUNK_BYTES = 1 << 19  # of the rows themselves: half of a usual second-level cache
LARGEST, ONE, ZERO = float32(127.0), float32(1.0), float32(0.0)


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
def tile_rows(kind, num_rows):
    """How many of the rows go into the next tile, so that all are nearly as high."""
    most = INT8_ROWS if kind == INT8 else FLOAT_ROWS
    num_tiles = (num_rows + most - 1) // most
    return (num_rows + num_tiles - 1) // num_tiles


@njit(cache=True, nogil=True)
def multiply(kind, matrix, block, rows, first, count, out):
    """A tile: rows `first` and on, times a block: float32 [count, 64] at `out`."""
    num_inputs, stride = matrix.num_inputs, rows.stride
    elements = block * num_inputs * BLOCK
    if kind == INT8:
        num_groups = stride // GROUP
        int8_tile(
            count,
            matrix.weights + elements,
            rows.values + first * stride,
            stride,
            num_inputs,
            out,
            matrix.scales + 4 * (elements // GROUP),
            rows.scales + 4 * first * num_groups,
            rows.corrections + 4 * first * num_groups,
        )
    elif kind == BFLOAT16:
        x = rows.values + 4 * first * stride
        bfloat16_tile(count, matrix.weights + 2 * elements, x, stride, num_inputs, out, 0, 0, 0)
    else:
        x = rows.values + 4 * first * stride
        float32_tile(count, matrix.weights + 4 * elements, x, stride, num_inputs, out, 0, 0, 0)


@njit(forceinline=True)
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
    most = largest(bits)
    inverse = splat(LARGEST / most if most > ZERO else ZERO)
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
    store_scalar(rows.scales, place, most * (ONE / LARGEST))
    store_int(rows.corrections, place, -128 * total_int((qa + qb) + (qc + qd)))
