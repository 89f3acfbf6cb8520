"""What the processor can do, as numba compiles for it, and what the kernels make of it.

NUMBA_CPU_NAME and NUMBA_CPU_FEATURES force another one: so are paths tested that this machine
would not take.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from numba.core import config
from numba.core.codegen import get_host_cpu_features

Int8Dot = Literal["avx512-vnni", "avx-vnni", "avx2", "plain"]


class Tile(NamedTuple):
    """What fits into the registers: rows times vectors of 16 outputs."""

    rows: int
    vectors: int  # 2 or 4


def _features() -> frozenset[str]:
    text = config.CPU_FEATURES if config.CPU_FEATURES is not None else get_host_cpu_features()
    return frozenset(part[1:] for part in text.split(",") if part.startswith("+"))


_FEATURES = _features()


def int8_dot() -> Int8Dot:
    """The instruction for sums of four products of bytes."""
    if {"avx512f", "avx512bw", "avx512vnni"} <= _FEATURES:
        return "avx512-vnni"
    if {"avx2", "avxvnni"} <= _FEATURES:
        return "avx-vnni"
    return "avx2" if "avx2" in _FEATURES else "plain"


def float_tile() -> Tile:
    if "avx512f" in _FEATURES:
        return Tile(6, 4)
    return Tile(3, 2) if {"avx2", "neon"} & _FEATURES else Tile(1, 2)


def int8_tile() -> Tile:
    if "avx512f" in _FEATURES:
        return Tile(4, 4)
    return Tile(2, 2) if {"avx2", "neon"} & _FEATURES else Tile(1, 2)


def description() -> str:
    """For the log."""
    if "avx512f" in _FEATURES:
        name = "AVX-512"
    else:
        name = "AVX2" if "avx2" in _FEATURES else "Neon" if "neon" in _FEATURES else "no SIMD known"
    return f"{name}, int8 by {int8_dot()}"
