"""LayerNorm, and each token moved towards the one before it, for one row at a time."""

from __future__ import annotations

import math

from numba import float32, njit

from engine.kernels.cpu.linear import put
from engine.kernels.cpu.vector import fma, load, splat, store, total

EPS = 1e-5


@njit(cache=True, nogil=True)
def layer_norm(x, channels, padded, weight, bias, out):
    """One row; where the weights are padded with zeros, so is what comes out."""
    sums = splat(0.0)
    for i in range(0, channels, 16):
        sums = sums + load(x, i)
    mean = splat(total(sums) / float32(channels))
    squares = splat(0.0)
    for i in range(0, channels, 16):
        moved = load(x, i) - mean
        squares = fma(moved, moved, squares)
    variance = total(squares) / float32(channels)
    scale = splat(float32(1.0) / float32(math.sqrt(variance + float32(EPS))))
    for i in range(0, padded, 16):
        store(out, i, fma((load(x, i) - mean) * scale, load(weight, i), load(bias, i)))


@njit(cache=True, nogil=True)
def mix(kind, x, previous, mu, padded, rows, row):
    """x + (previous - x) * mu, as one row that a matrix will multiply."""
    for group in range(padded // 64):
        i = 64 * group
        put(
            kind,
            rows,
            row,
            group,
            _moved(x, previous, mu, i),
            _moved(x, previous, mu, i + 16),
            _moved(x, previous, mu, i + 32),
            _moved(x, previous, mu, i + 48),
        )


@njit(forceinline=True)
def _moved(x, previous, mu, i):
    value = load(x, i)
    return fma(load(previous, i) - value, load(mu, i), value)
