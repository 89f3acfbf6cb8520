"""What the machine can do at best: bytes read from memory, and products, per second.

Small loops in numba, on the vectors and dot products of the kernels themselves, by as many threads;
the best of some tries. A peak is of registers only.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
from numba import njit

from engine.kernels.cpu import tiles
from engine.kernels.cpu.vector import fma, load, prefetch, splat, store
from engine.model.rwkv7 import ModelDims

READ_BYTES = 1 << 28  # of each thread: beyond any cache
NUM_TRIES = 8
NUM_INPUTS, NUM_ROUNDS = 256, 4000


class Limits(NamedTuple):
    """Per second, of all threads together."""

    bytes_read: float
    bytes_rewritten: float  # read, and written at the same place; each counts
    float_flop: float
    int8_flop: float


@njit(nogil=True)
def _read(address, count, out):
    a, b, c, d = splat(0.0), splat(0.0), splat(0.0), splat(0.0)
    for i in range(0, count, 64):
        for line in range(0, 256, 64):
            prefetch(address + 4 * i + tiles.PREFETCH_BYTES + line)
        a, b = a + load(address, i), b + load(address, i + 16)
        c, d = c + load(address, i + 32), d + load(address, i + 48)
    store(out, 0, (a + b) + (c + d))


@njit(nogil=True)
def _rewrite(address, count):
    factor = splat(0.5)
    for i in range(0, count, 16):
        value = load(address, i)
        store(address, i, fma(value, factor, value))


@njit(nogil=True)
def _float_tiles(w, x, rounds, out):
    for _ in range(rounds):
        tiles.float32_tile(FLOAT_ROWS, w, x, NUM_INPUTS, NUM_INPUTS, out, 0, 0, 0)


@njit(nogil=True)
def _int8_tiles(w, x, rounds, out, scales):
    for _ in range(rounds):
        tiles.int8_tile(INT8_ROWS, w, x, NUM_INPUTS, NUM_INPUTS, out, scales, scales, scales)


FLOAT_ROWS, INT8_ROWS = tiles.FLOAT_TILE.rows, tiles.INT8_TILE.rows


def limits(num_threads: int) -> Limits:
    memory = [np.ones(READ_BYTES // 4, np.float32) for _ in range(num_threads)]
    small = [np.ones(1 << 17, np.float32) for _ in range(num_threads)]
    outs = [np.ones(1 << 12, np.float32) for _ in range(num_threads)]
    count = READ_BYTES // 4
    with ThreadPoolExecutor(num_threads) as pool:

        def best(function: Callable[..., None], arguments: list[tuple[Any, ...]]) -> float:
            found = []
            for _ in range(NUM_TRIES):
                started = time.perf_counter()
                list(pool.map(lambda one: function(*one), arguments))
                found.append(time.perf_counter() - started)
            return min(found)

        at = [
            (m.ctypes.data, s.ctypes.data, o.ctypes.data)
            for m, s, o in zip(memory, small, outs, strict=True)
        ]
        read_s = best(_read, [(m, count, o) for m, _, o in at])
        rewrite_s = best(_rewrite, [(m, count) for m, _, _ in at])
        float_s = best(_float_tiles, [(s, s + 1024, NUM_ROUNDS, o) for _, s, o in at])
        int8_s = best(_int8_tiles, [(s, s + 1024, NUM_ROUNDS, o, s + 2048) for _, s, o in at])
    products = 2 * 64 * NUM_INPUTS * NUM_ROUNDS * num_threads
    return Limits(
        bytes_read=num_threads * READ_BYTES / read_s,
        bytes_rewritten=2 * num_threads * READ_BYTES / rewrite_s,
        float_flop=FLOAT_ROWS * products / float_s,
        int8_flop=INT8_ROWS * products / int8_s,
    )


def floor(dims: ModelDims, dtype: str, case: str, limit: Limits) -> float:
    """Tokens per second that no program can exceed: weights are read once for a step, all products
    are made, and each state is read and written; the states' time does not overlap."""
    C, F = dims.embedded_dim, dims.ffn_dim
    ranks = dims.w_lora_rank + dims.a_lora_rank + dims.v_lora_rank + dims.g_lora_rank
    layers = dims.num_cells * (4 * C * C + 2 * C * F + 2 * C * ranks)
    head = C * dims.vocab_size
    weight_bytes = {"fp32": 4.0, "bf16": 2.0, "int8": 1.0 + 4 / 64}[dtype]
    flop = limit.int8_flop if dtype == "int8" else limit.float_flop
    if case.startswith("prefill"):
        return flop / (2 * layers)
    size = int(case[1:])
    reading_s = (layers + head) * weight_bytes / limit.bytes_read
    computing_s = 2 * size * (layers + head) / flop
    state_bytes = 2 * 4 * size * dims.num_cells * C * dims.head_size
    return size / (max(reading_s, computing_s) + state_bytes / limit.bytes_rewritten)
