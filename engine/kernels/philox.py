"""Philox 4x32-10, the counter-based generator behind every draw. Knows integers only.

A draw is a function of (seed, position), so it cannot depend on slot, batch or neighbours, and
a preempted or resumed request needs no generator state. Source: Salmon et al., "Parallel random
numbers: as easy as 1, 2, 3", SC 2011; Triton's tl.rand and cuRAND use the same function.
"""

from __future__ import annotations

_MASK = 0xFFFFFFFF
_MULTIPLY_0, _MULTIPLY_1 = 0xD2511F53, 0xCD9E8D57
_WEYL_0, _WEYL_1 = 0x9E3779B9, 0xBB67AE85


def philox4x32(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, ...]:
    """Four 32-bit words for a 128-bit counter and a 64-bit key."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        product_0, product_1 = _MULTIPLY_0 * c0, _MULTIPLY_1 * c2
        c0, c1 = (product_1 >> 32) ^ c1 ^ k0, product_1 & _MASK
        c2, c3 = (product_0 >> 32) ^ c3 ^ k1, product_0 & _MASK
        k0, k1 = (k0 + _WEYL_0) & _MASK, (k1 + _WEYL_1) & _MASK
    return c0, c1, c2, c3


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) with 24 random bits, exact in float32; 0 <= seed < 2**64."""
    counter = (position & _MASK, position >> 32, 0, 0)
    return (philox4x32(counter, (seed & _MASK, seed >> 32))[0] >> 8) * 2.0**-24
