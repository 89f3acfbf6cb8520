"""Phases of a step that are matrix products, block by block, and what is done with each tile."""

from __future__ import annotations

from numba import float32, njit

from engine.kernels.cpu.linear import chunk_rows, multiply, put, tile_rows
from engine.kernels.cpu.mixing import keep_last
from engine.kernels.cpu.records import (
    A1,
    FFN_HIDDEN,
    FFN_MIXED,
    G1,
    KEY,
    MIXED_A,
    MIXED_G,
    MIXED_K,
    MIXED_R,
    MIXED_V,
    MIXED_W,
    RANK_A,
    RANK_G,
    RANK_V,
    RANK_W,
    RECEPTANCE,
    VALUE,
    W1,
    W2,
)
from engine.kernels.cpu.team import next_item
from engine.kernels.cpu.vector import (
    at_least,
    load,
    load_scalar,
    sigmoid,
    splat,
    store,
    store_scalar,
    tanh,
)


@njit(cache=True, nogil=True)
def project(team, model, matrices, first, index, rows, run, scratch):
    """Receptance, key and value, and the way into the ranks. The first layer has no V1."""
    num_inputs = model.padded
    size = chunk_rows(model.kind, run.num_rows, num_inputs)
    num_blocks = 0
    num_matrices = 6 if index == 0 else 7
    for which in range(num_matrices):
        num_blocks += matrices[first + which].num_blocks
    num_chunks = (run.num_rows + size - 1) // size
    while True:
        item = next_item(team)
        if item >= num_chunks * num_blocks:
            return
        begin = item // num_blocks * size
        count = min(size, run.num_rows - begin)
        block, which = item % num_blocks, 0
        while block >= matrices[first + which].num_blocks:
            block -= matrices[first + which].num_blocks
            which += 1
        row, end = begin, begin + count
        while row < end:
            n = tile_rows(model.kind, end - row)
            _project_tile(model, matrices[first + which], which, block, rows, run, row, n, scratch)
            row += n


@njit(cache=True, nogil=True)
def _project_tile(model, matrix, which, block, rows, run, row, n, scratch):
    kind = model.kind
    if which == RECEPTANCE:
        multiply(kind, matrix, block, rows[MIXED_R], row, n, scratch)
        _copy(scratch, row, n, block, run.r, model.padded)
    elif which == KEY:
        multiply(kind, matrix, block, rows[MIXED_K], row, n, scratch)
        _copy(scratch, row, n, block, run.k, model.padded)
    elif which == VALUE:
        multiply(kind, matrix, block, rows[MIXED_V], row, n, scratch)
        _copy(scratch, row, n, block, run.v, model.padded)
    elif which == W1:
        multiply(kind, matrix, block, rows[MIXED_W], row, n, scratch)
        for i in range(0, 64 * n, 16):
            store(scratch, i, tanh(load(scratch, i)))
        _put_all(kind, scratch, row, n, block, rows[RANK_W])
    elif which == A1:
        multiply(kind, matrix, block, rows[MIXED_A], row, n, scratch)
        _put_all(kind, scratch, row, n, block, rows[RANK_A])
    elif which == G1:
        multiply(kind, matrix, block, rows[MIXED_G], row, n, scratch)
        for i in range(0, 64 * n, 16):
            store(scratch, i, sigmoid(load(scratch, i)))
        for r in range(n):  # the sigmoid of padding is not 0
            for i in range(matrix.num_outputs - 64 * block, 64):
                store_scalar(scratch, 64 * r + i, float32(0.0))
        _put_all(kind, scratch, row, n, block, rows[RANK_G])
    else:
        multiply(kind, matrix, block, rows[MIXED_V], row, n, scratch)
        _put_all(kind, scratch, row, n, block, rows[RANK_V])


@njit(cache=True, nogil=True)
def _copy(scratch, begin, count, block, out, stride):
    for r in range(count):
        at = (begin + r) * stride + 64 * block
        for i in range(0, 64, 16):
            store(out, at + i, load(scratch, 64 * r + i))


@njit(cache=True, nogil=True)
def _put_all(kind, scratch, begin, count, block, rows):
    for r in range(count):
        i = 64 * r
        a, b, c, d = (
            load(scratch, i),
            load(scratch, i + 16),
            load(scratch, i + 32),
            load(scratch, i + 48),
        )
        put(kind, rows, begin + r, block, a, b, c, d)


@njit(cache=True, nogil=True)
def leave_ranks(team, model, matrices, first, index, rows, run, scratch):
    """Decay, rate, gate and value residual before their sigmoids, and the kept last tokens."""
    num_ways = 3 if index == 0 else 4
    blocks = model.padded // 64
    size = chunk_rows(model.kind, run.num_rows, 256)
    num_items = (run.num_rows + size - 1) // size * blocks * num_ways
    while True:
        item = next_item(team)
        if item >= num_items + run.num_seqs:
            return
        if item >= num_items:
            keep_last(model, run, item - num_items, index, 0)
            continue
        begin = item // (blocks * num_ways) * size
        count = min(size, run.num_rows - begin)
        way, block = item // blocks % num_ways, item % blocks
        matrix = matrices[first + W2 + way]
        if way == 0:
            out = run.d
        elif way == 1:
            out = run.a
        elif way == 2:
            out = run.g
        else:
            out = run.m
        row, end = begin, begin + count
        while row < end:
            n = tile_rows(model.kind, end - row)
            multiply(model.kind, matrix, block, rows[RANK_W + way], row, n, scratch)
            _copy(scratch, row, n, block, out, model.padded)
            row += n


@njit(cache=True, nogil=True)
def add_product(team, model, matrix, rows, run, scratch):
    """x += rows times a matrix."""
    size = chunk_rows(model.kind, run.num_rows, matrix.num_inputs)
    num_items = (run.num_rows + size - 1) // size * matrix.num_blocks
    while True:
        item = next_item(team)
        if item >= num_items:
            return
        begin, block = item // matrix.num_blocks * size, item % matrix.num_blocks
        count = min(size, run.num_rows - begin)
        row, end = begin, begin + count
        while row < end:
            n = tile_rows(model.kind, end - row)
            multiply(model.kind, matrix, block, rows, row, n, scratch)
            for r in range(n):
                at = (row + r) * model.padded + 64 * block
                for i in range(0, 64, 16):
                    store(run.x, at + i, load(run.x, at + i) + load(scratch, 64 * r + i))
            row += n


@njit(cache=True, nogil=True)
def square_hidden(team, model, matrix, index, rows, run, scratch):
    """Squared ReLU of the channel mix, and the kept last tokens."""
    size = chunk_rows(model.kind, run.num_rows, matrix.num_inputs)
    num_items = (run.num_rows + size - 1) // size * matrix.num_blocks
    zero = splat(0.0)
    while True:
        item = next_item(team)
        if item >= num_items + run.num_seqs:
            return
        if item >= num_items:
            keep_last(model, run, item - num_items, index, 1)
            continue
        begin, block = item // matrix.num_blocks * size, item % matrix.num_blocks
        count = min(size, run.num_rows - begin)
        row, end = begin, begin + count
        while row < end:
            n = tile_rows(model.kind, end - row)
            multiply(model.kind, matrix, block, rows[FFN_MIXED], row, n, scratch)
            for i in range(0, 64 * n, 16):
                value = at_least(load(scratch, i), zero)
                store(scratch, i, value * value)
            _put_all(model.kind, scratch, row, n, block, rows[FFN_HIDDEN])
            row += n


@njit(cache=True, nogil=True)
def prepare_head(team, model, rows, run):
    while True:
        row = next_item(team)
        if row >= run.num_rows:
            return
        x = run.hidden + 4 * row * model.channels
        zero = splat(0.0)
        for group in range(model.padded // 64):
            i = 64 * group
            a = load(x, i)
            b = load(x, i + 16) if i + 16 < model.channels else zero
            c = load(x, i + 32) if i + 32 < model.channels else zero
            d = load(x, i + 48) if i + 48 < model.channels else zero
            put(model.kind, rows, row, group, a, b, c, d)


@njit(cache=True, nogil=True)
def multiply_head(team, model, matrix, rows, run, scratch):
    """Logits; the last block may be wider than the vocabulary."""
    size = chunk_rows(model.kind, run.num_rows, matrix.num_inputs)
    num_items = (run.num_rows + size - 1) // size * matrix.num_blocks
    while True:
        item = next_item(team)
        if item >= num_items:
            return
        begin, block = item // matrix.num_blocks * size, item % matrix.num_blocks
        count = min(size, run.num_rows - begin)
        row, end = begin, begin + count
        while row < end:
            n = tile_rows(model.kind, end - row)
            multiply(model.kind, matrix, block, rows, row, n, scratch)
            if 64 * block + 64 <= model.vocab_size:
                _copy(scratch, row, n, block, run.logits, model.vocab_size)
            else:
                for r in range(n):
                    at = (row + r) * model.vocab_size
                    for i in range(64 * block, model.vocab_size):
                        store_scalar(run.logits, at + i, load_scalar(scratch, 64 * (r - block) + i))
            row += n
