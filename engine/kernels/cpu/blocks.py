"""Rows of a matrix turned into blocks of 64 outputs, as `tiles` reads them; and into int8.

Arrays are contiguous. A block is read row by row and written 16 inputs at a time: both lie in
the cache by then.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from engine.kernels.cpu.vector import (
    at_least,
    at_most,
    larger,
    largest,
    load,
    load_scalar,
    magnitude_bits,
    rounded,
    splat,
    store_bytes,
    store_scalar,
)

TURNED = 16  # inputs: one cache line of each row


@njit(cache=True, nogil=True, error_model="numpy")
def turn(rows, blocks, flipped):
    """uint32 [blocks, 64, width] to [blocks, width, 64], with the bits of `flipped` the other way.

    Of float32, and of int8, four inputs in a word.
    """
    for block in range(rows.shape[0]):
        for first in range(0, rows.shape[2], TURNED):
            for output in range(64):
                for k in range(first, first + TURNED):
                    blocks[block, k, output] = rows[block, output, k] ^ flipped


@njit(cache=True, nogil=True, error_model="numpy")
def turn_pairs(rows, blocks):
    """uint16 [blocks, 64, width] to words [blocks, width, 32], output j below output j + 16."""
    width = rows.shape[2]
    words = np.empty((32, width), np.uint32)
    for block in range(rows.shape[0]):
        for word in range(32):
            low = word // 16 * 32 + word % 16
            for k in range(width):
                words[word, k] = np.uint32(rows[block, low, k]) | (
                    np.uint32(rows[block, low + 16, k]) << np.uint32(16)
                )
        for first in range(0, width, TURNED):
            for word in range(32):
                for k in range(first, first + TURNED):
                    blocks[block, k, word] = words[word, k]


@njit(cache=True, nogil=True, error_model="numpy")
def largest_of_groups(values, num_groups, found):
    """The largest magnitude of every 64 float32, NaN above all; both are addresses."""
    for group in range(num_groups):
        at = 64 * group
        low = larger(magnitude_bits(load(values, at)), magnitude_bits(load(values, at + 16)))
        high = larger(magnitude_bits(load(values, at + 32)), magnitude_bits(load(values, at + 48)))
        store_scalar(found, group, largest(larger(low, high)))


@njit(cache=True, nogil=True, error_model="numpy")
def round_groups(values, scales, num_groups, found):
    """float32 [groups, 64] over finite float32 [groups] to int8, as `quantize` does it."""
    for group in range(num_groups):
        scale = load_scalar(scales, group)
        divisor = splat(scale if scale != 0.0 else 1.0)
        for i in range(64 * group, 64 * group + 64, 16):
            value = at_most(at_least(load(values, i) / divisor, splat(-127.0)), splat(127.0))
            store_bytes(found, i, rounded(value))
