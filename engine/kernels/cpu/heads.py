"""The time mix of one sequence and a few heads, token by token, with the state in the cache.

Formulas as in engine/kernels/reference.py: u = S^T a; S <- diag(w) S + b u^T + k v^T; y = S^T r,
S being [key, value]. While a token's S is written, the next token's u is summed up, so a prompt
passes once over the state for each token. A column of S never needs another one.

Everything of a token is one after the other in the thread's scratch, N float32 each.
"""

from __future__ import annotations

import math

from numba import float32, njit

from engine.kernels.cpu.linear import put
from engine.kernels.cpu.records import READ
from engine.kernels.cpu.team import next_item
from engine.kernels.cpu.vector import (
    exp,
    fma,
    load,
    load_int64,
    load_splat,
    sigmoid,
    splat,
    store,
    total,
)
from engine.kernels.reference import DECAY_SCALE, GROUP_NORM_EPS, KEY_NORM_EPS

# Places in the scratch, in units of N; those of a token come twice, for this one and the next.
DECAY, KEYS, A, B, R, V = range(6)
NUM_OF_TOKEN = 6
U, Y = 12, 13
SCRATCH_SIZES = 14
SCALE, EPS, KEY_EPS = float32(DECAY_SCALE), float32(GROUP_NORM_EPS), float32(KEY_NORM_EPS)


@njit(cache=True, nogil=True)
def heads_of_unit(head_size):
    """Heads that are done together, since int8 rows are rounded 64 values at a time."""
    return max(1, 64 // head_size)


@njit(cache=True, nogil=True)
def mix_heads(model, layer, index, run, rows, seq, unit, scratch):
    """All tokens of a sequence through the heads of a unit."""
    size = model.head_size
    first = unit * heads_of_unit(size)
    last = min(first + heads_of_unit(size), model.num_heads)
    begin, end = load_int64(run.starts, seq), load_int64(run.starts, seq + 1)
    layer_at = index * model.num_heads * size * size
    source = run.wkv + 4 * (load_int64(run.src, seq) * run.wkv_slot + layer_at)
    target = run.wkv + 4 * (load_int64(run.dst, seq) * run.wkv_slot + layer_at)
    for head in range(first, last):
        state_at = 4 * head * size * size
        _mix_head(
            model,
            layer,
            index,
            run,
            head,
            begin,
            end,
            source + state_at,
            target + state_at,
            scratch,
        )
    for row in range(begin, end):
        y = run.r + 4 * row * model.padded
        for i in range(first * size, last * size, 64):
            c0, c1, c2, c3 = load(y, i), load(y, i + 16), load(y, i + 32), load(y, i + 48)
            put(model.kind, rows, row, i // 64, c0, c1, c2, c3)


@njit(cache=True, nogil=True)
def _mix_head(model, layer, index, run, head, begin, end, source, target, scratch):
    size = model.head_size
    token_bytes = 4 * NUM_OF_TOKEN * size
    here, there = scratch, scratch + token_bytes
    u, y = scratch + 4 * U * size, scratch + 4 * Y * size
    bonus = _prepare(model, layer, index, run, head, begin, here)
    _read(source, size, here + 4 * A * size, u)
    for row in range(begin, end):
        next_bonus = float32(0.0)
        if row + 1 < end:
            next_bonus = _prepare(model, layer, index, run, head, row + 1, there)
            _advance(source, target, size, here, there, u, y)
        else:
            _finish(source, target, size, here, u, y)
        _read_out(model, layer, run, head, row, bonus, here + 4 * V * size, y)
        source, bonus = target, next_bonus
        here, there = there, here


@njit(cache=True, nogil=True)
def _prepare(model, layer, index, run, head, row, token):
    """Decay, key, a, b, r and v of a token; returns the bonus, sum of r * k * r_k."""
    size = model.head_size
    c = head * size
    o = row * model.padded + c
    one = splat(1.0)
    squares, bonus = splat(0.0), splat(0.0)
    w, keys, a = token, token + 4 * KEYS * size, token + 4 * A * size
    b, r, v = token + 4 * B * size, token + 4 * R * size, token + 4 * V * size
    for i in range(0, size, 16):
        decay = sigmoid(load(run.d, o + i) + load(layer.w0, c + i))
        store(w, i, exp(decay * splat(SCALE)))
        rate = sigmoid(load(run.a, o + i) + load(layer.a0, c + i))
        key = load(run.k, o + i)
        kk = key * load(layer.k_k, c + i)
        squares = fma(kk, kk, squares)
        key = key * fma(rate - one, load(layer.k_a, c + i), one)
        value = load(run.v, o + i)
        if index == 0:
            store(run.v_first, o + i, value)
        else:
            share = sigmoid(load(run.m, o + i) + load(layer.v0, c + i))
            value = fma(load(run.v_first, o + i) - value, share, value)
        receptance = load(run.r, o + i)
        bonus = fma(receptance * key, load(layer.r_k, c + i), bonus)
        store(keys, i, key)
        store(a, i, kk)
        store(b, i, rate)
        store(r, i, receptance)
        store(v, i, value)
    norm = float32(math.sqrt(total(squares)))
    inverse = splat(float32(1.0) / (KEY_EPS if norm < KEY_EPS else norm))
    zero = splat(0.0)
    for i in range(0, size, 16):
        kk = load(a, i) * inverse
        store(a, i, zero - kk)
        store(b, i, load(b, i) * kk)
    return total(bonus)


@njit(cache=True, nogil=True)
def _read(state, size, a, u):
    """u = S^T a."""
    width = 64 if size % 64 == 0 else 16
    for column in range(0, size, width):
        if width == 64:
            u0, u1, u2, u3 = splat(0.0), splat(0.0), splat(0.0), splat(0.0)
            for j in range(size):
                at = j * size + column
                value = load_splat(a, j)
                u0 = fma(load(state, at), value, u0)
                u1 = fma(load(state, at + 16), value, u1)
                u2 = fma(load(state, at + 32), value, u2)
                u3 = fma(load(state, at + 48), value, u3)
            store(u, column, u0)
            store(u, column + 16, u1)
            store(u, column + 32, u2)
            store(u, column + 48, u3)
        else:
            u0 = splat(0.0)
            for j in range(size):
                u0 = fma(load(state, j * size + column), load_splat(a, j), u0)
            store(u, column, u0)


@njit(forceinline=True)
def _moved(state, at, w, b, k, u, v):
    return fma(load(state, at), w, fma(u, b, v * k))


@njit(cache=True, nogil=True)
def _advance(source, target, size, token, following, u, y):
    """S and y of a token, and u of the following one."""
    ks, bs, rs = token + 4 * KEYS * size, token + 4 * B * size, token + 4 * R * size
    v, a = token + 4 * V * size, following + 4 * A * size
    width = 64 if size % 64 == 0 else 16
    for column in range(0, size, width):
        if width == 64:
            u0, u1 = load(u, column), load(u, column + 16)
            u2, u3 = load(u, column + 32), load(u, column + 48)
            v0, v1 = load(v, column), load(v, column + 16)
            v2, v3 = load(v, column + 32), load(v, column + 48)
            y0, y1, y2, y3 = splat(0.0), splat(0.0), splat(0.0), splat(0.0)
            n0, n1, n2, n3 = splat(0.0), splat(0.0), splat(0.0), splat(0.0)
            for j in range(size):
                at = j * size + column
                w, b, k = load_splat(token, j), load_splat(bs, j), load_splat(ks, j)
                r, n = load_splat(rs, j), load_splat(a, j)
                s0 = _moved(source, at, w, b, k, u0, v0)
                s1 = _moved(source, at + 16, w, b, k, u1, v1)
                s2 = _moved(source, at + 32, w, b, k, u2, v2)
                s3 = _moved(source, at + 48, w, b, k, u3, v3)
                store(target, at, s0)
                store(target, at + 16, s1)
                store(target, at + 32, s2)
                store(target, at + 48, s3)
                y0, y1, y2, y3 = fma(s0, r, y0), fma(s1, r, y1), fma(s2, r, y2), fma(s3, r, y3)
                n0, n1, n2, n3 = fma(s0, n, n0), fma(s1, n, n1), fma(s2, n, n2), fma(s3, n, n3)
            store(u, column, n0)
            store(u, column + 16, n1)
            store(u, column + 32, n2)
            store(u, column + 48, n3)
            store(y, column, y0)
            store(y, column + 16, y1)
            store(y, column + 32, y2)
            store(y, column + 48, y3)
        else:
            u0, v0, y0, n0 = load(u, column), load(v, column), splat(0.0), splat(0.0)
            for j in range(size):
                at = j * size + column
                w, b, k = load_splat(token, j), load_splat(bs, j), load_splat(ks, j)
                s0 = _moved(source, at, w, b, k, u0, v0)
                store(target, at, s0)
                y0 = fma(s0, load_splat(rs, j), y0)
                n0 = fma(s0, load_splat(a, j), n0)
            store(u, column, n0)
            store(y, column, y0)


@njit(cache=True, nogil=True)
def _finish(source, target, size, token, u, y):
    """S and y of the last token."""
    ks, bs, rs = token + 4 * KEYS * size, token + 4 * B * size, token + 4 * R * size
    v = token + 4 * V * size
    width = 64 if size % 64 == 0 else 16
    for column in range(0, size, width):
        if width == 64:
            u0, u1 = load(u, column), load(u, column + 16)
            u2, u3 = load(u, column + 32), load(u, column + 48)
            v0, v1 = load(v, column), load(v, column + 16)
            v2, v3 = load(v, column + 32), load(v, column + 48)
            y0, y1, y2, y3 = splat(0.0), splat(0.0), splat(0.0), splat(0.0)
            for j in range(size):
                at = j * size + column
                w, b, k = load_splat(token, j), load_splat(bs, j), load_splat(ks, j)
                r = load_splat(rs, j)
                s0 = _moved(source, at, w, b, k, u0, v0)
                s1 = _moved(source, at + 16, w, b, k, u1, v1)
                s2 = _moved(source, at + 32, w, b, k, u2, v2)
                s3 = _moved(source, at + 48, w, b, k, u3, v3)
                store(target, at, s0)
                store(target, at + 16, s1)
                store(target, at + 32, s2)
                store(target, at + 48, s3)
                y0, y1, y2, y3 = fma(s0, r, y0), fma(s1, r, y1), fma(s2, r, y2), fma(s3, r, y3)
            store(y, column, y0)
            store(y, column + 16, y1)
            store(y, column + 32, y2)
            store(y, column + 48, y3)
        else:
            u0, v0, y0 = load(u, column), load(v, column), splat(0.0)
            for j in range(size):
                at = j * size + column
                w, b, k = load_splat(token, j), load_splat(bs, j), load_splat(ks, j)
                s0 = _moved(source, at, w, b, k, u0, v0)
                store(target, at, s0)
                y0 = fma(s0, load_splat(rs, j), y0)
            store(y, column, y0)


@njit(cache=True, nogil=True)
def _read_out(model, layer, run, head, row, bonus, v, y):
    """Group norm of y, plus the bonus times v, times the gate: in place of the receptance."""
    size = model.head_size
    c = head * size
    o = row * model.padded + c
    sums = splat(0.0)
    for i in range(0, size, 16):
        sums = sums + load(y, i)
    mean = splat(total(sums) / float32(size))
    squares = splat(0.0)
    for i in range(0, size, 16):
        moved = load(y, i) - mean
        squares = fma(moved, moved, squares)
    variance = total(squares) / float32(size)
    scale = splat(float32(1.0) / float32(math.sqrt(variance + EPS)))
    times = splat(bonus)
    for i in range(0, size, 16):
        normed = (load(y, i) - mean) * scale
        normed = fma(normed, load(layer.ln_x_weight, c + i), load(layer.ln_x_bias, c + i))
        store(run.r, o + i, fma(times, load(v, i), normed) * load(run.g, o + i))


@njit(cache=True, nogil=True)
def mix_all_heads(team, num_threads, model, layer, index, rows, run, scratch):
    units = (model.num_heads + heads_of_unit(model.head_size) - 1) // heads_of_unit(model.head_size)
    num_units = units * run.num_seqs
    size = max(1, num_units // (16 * num_threads)) if run.num_rows == run.num_seqs else 1
    while True:
        item = next_item(team)
        if item * size >= num_units:
            return
        for unit in range(item * size, min(item * size + size, num_units)):
            mix_heads(model, layer, index, run, rows[READ], unit // units, unit % units, scratch)
