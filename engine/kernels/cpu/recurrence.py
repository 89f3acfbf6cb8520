"""The WKV-7 recurrence forward and backward, token by token, with the state in the cache.

u = S^T A;  S' = diag(w) S + B u^T + key value^T;  y = S'^T r, S being [key, value], as in
`reference.wkv7_step`. With G the gradient of the loss by S', backward in time:

    G += r d_y^T                            d_u = G^T B
    d_r += S' d_y                           d_value += G^T key
    d_w = rows of (G * S) summed up         d_A = S d_u
    d_B = G u,  d_key += G value            G <- diag(w) G + A d_u^T,  of the token before

Forward keeps S before every SEGMENT tokens, and u and y of all. Backward computes the states of a
segment again from there: dividing by w instead would blow up rounding errors, by 1.8 each token.

Columns of S do not need each other, so 16 of them go through a segment together: forward as
[key, 16 values], where both products are sums of vectors, backward as [16 values, key], where all
but d_u and d_value are. A unit of work is a head of a sequence; it writes nothing that another one
does, so results do not depend on who computes it. Sums over tokens are in the order of time
within a segment, and a row of `partials` for each.
"""

from __future__ import annotations

import numpy as np
from numba import float32, njit

from engine.kernels.cpu.atomic import atomic_add
from engine.kernels.cpu.tokens import (
    D_A,
    D_B,
    D_KEY,
    D_R,
    D_VALUE,
    D_W,
    D_Y,
    KEY,
    NUM_PARTIALS,
    NUM_PLACES,
    VALUE,
    A,
    B,
    W,
    prepare,
    prepare_backward,
    read_out,
    read_out_backward,
)
from engine.kernels.cpu.vector import (
    fma,
    load,
    load_int64,
    load_scalar,
    load_splat,
    splat,
    store,
    store_scalar,
    total,
)

SEGMENT = 16
LANES = 16

# Addresses of float32 but for what is said; rows are [T, width], width = num_heads * size.
RUN = np.dtype(
    [
        (name, np.int64)
        for name in (
            *("num_tokens", "num_sequences", "num_heads", "size", "head_size", "width"),
            "taken",  # int32: units that somebody has begun
            *("starts", "segments"),  # int64 [S + 1]: first token and first segment of each
            *("src", "dst"),  # int64 [S]
            *("source", "source_slot", "target", "target_slot"),  # target 0: nothing is written
            *("r", "k", "v", "d", "a", "g", "v_first", "m"),  # v_first 0: the first layer
            *("k_k", "k_a", "r_k", "norm_weight", "norm_bias", "mask"),
            *("u", "y", "out"),
            "checkpoints",  # [segments, num_heads, size * size]; 0: none are kept
            "d_out",
            *("d_r", "d_k", "d_v", "d_d", "d_a", "d_g", "d_v_first", "d_m"),
            "partials",  # [segments, NUM_PARTIALS, width], zeros
            "d_state",  # [S, num_heads, size, size]; 0: nobody wants it
        )
    ]
)


def scratch_floats(size: int) -> int:
    """What a thread needs: states and tokens of a segment, and sums."""
    tokens = SEGMENT * NUM_PLACES * size
    history = (SEGMENT + 1) * LANES * size
    return size * size + tokens + SEGMENT + history + 3 * LANES * LANES


@njit(cache=True, nogil=True)
def forward(runs, scratch):
    """y, out, and states to where they belong, of all units that nobody else takes."""
    run = runs[0]
    while True:
        unit = atomic_add(run.taken, 0, 1)
        if unit >= run.num_sequences * run.num_heads:
            return
        seq, head = unit // run.num_heads, unit % run.num_heads
        if run.target == 0 or load_int64(run.dst, seq) >= 0:
            _forward(run, seq, head, scratch)


@njit(cache=True, nogil=True)
def _forward(run, seq, head, scratch):
    size = run.size
    area = size * size
    state, tokens = scratch, scratch + 4 * area
    _to_blocks(
        run.source + 4 * (load_int64(run.src, seq) * run.source_slot + head * area), size, state
    )
    end, segment = load_int64(run.starts, seq + 1), load_int64(run.segments, seq)
    for row in range(load_int64(run.starts, seq), end, SEGMENT):
        count = min(SEGMENT, end - row)
        if run.checkpoints != 0:
            kept = run.checkpoints + 4 * (segment * run.num_heads + head) * area
            for i in range(0, area, LANES):
                store(kept, i, load(state, i))
        for t in range(count):
            prepare(run, head, row + t, tokens + 4 * t * NUM_PLACES * size)
        for column in range(0, size, LANES):
            for t in range(count):
                token = tokens + 4 * t * NUM_PLACES * size
                _advance(run, head, row + t, column, token, state + 4 * column * size)
        for t in range(count):
            read_out(run, head, row + t, tokens + 4 * t * NUM_PLACES * size)
        segment += 1
    if run.target != 0:
        target = run.target + 4 * (load_int64(run.dst, seq) * run.target_slot + head * area)
        _from_blocks(state, size, target)


@njit(cache=True, nogil=True)
def _to_blocks(state, size, blocks):
    """[key, value] as [value / 16, key, 16]."""
    for column in range(0, size, LANES):
        for j in range(size):
            store(blocks, column * size + LANES * j, load(state, j * size + column))


@njit(cache=True, nogil=True)
def _from_blocks(blocks, size, state):
    for column in range(0, size, LANES):
        for j in range(size):
            store(state, j * size + column, load(blocks, column * size + LANES * j))


@njit(cache=True, nogil=True)
def _advance(run, head, row, column, token, state):
    """u, S and y of 16 values of a token; `state` is [key, 16]."""
    size = run.size
    o = row * run.width + head * size
    a, w, key, b = A * size, W * size, KEY * size, B * size
    u0, u1, u2, u3 = splat(0.0), splat(0.0), splat(0.0), splat(0.0)
    for j in range(0, size, 4):
        u0 = fma(load(state, LANES * j), load_splat(token, a + j), u0)
        u1 = fma(load(state, LANES * j + 16), load_splat(token, a + j + 1), u1)
        u2 = fma(load(state, LANES * j + 32), load_splat(token, a + j + 2), u2)
        u3 = fma(load(state, LANES * j + 48), load_splat(token, a + j + 3), u3)
    u = (u0 + u1) + (u2 + u3)
    value, y = load(token, VALUE * size + column), splat(0.0)
    for j in range(size):
        added = fma(u, load_splat(token, b + j), value * load_splat(token, key + j))
        s = fma(load(state, LANES * j), load_splat(token, w + j), added)
        store(state, LANES * j, s)
        y = fma(s, load_splat(run.r, o + j), y)
    store(run.u, o + column, u)
    store(run.y, o + column, y)


@njit(cache=True, nogil=True)
def backward(runs, scratch):
    """Gradients of all that came in, of all units that nobody else takes."""
    run = runs[0]
    while True:
        unit = atomic_add(run.taken, 0, 1)
        if unit >= run.num_sequences * run.num_heads:
            return
        _backward(run, unit // run.num_heads, unit % run.num_heads, scratch)


@njit(cache=True, nogil=True)
def _backward(run, seq, head, scratch):
    size = run.size
    area, token_bytes = size * size, 4 * NUM_PLACES * size
    d_state, tokens = scratch, scratch + 4 * area
    norms = tokens + SEGMENT * token_bytes
    history = norms + 4 * SEGMENT
    begin, segment = load_int64(run.starts, seq), load_int64(run.segments, seq)
    last = load_int64(run.segments, seq + 1) - 1
    for i in range(0, area, LANES):
        store(d_state, i, splat(0.0))
    for index in range(last, segment - 1, -1):
        row = begin + (index - segment) * SEGMENT
        count = min(SEGMENT, load_int64(run.starts, seq + 1) - row)
        partial = run.partials + 4 * index * NUM_PARTIALS * run.width
        kept = run.checkpoints + 4 * (index * run.num_heads + head) * area
        for t in range(count):
            token = tokens + t * token_bytes
            store_scalar(norms, t, prepare(run, head, row + t, token))
            for place in (D_W, D_A, D_B):
                for i in range(0, size, LANES):
                    store(token, place * size + i, splat(0.0))
            read_out_backward(run, head, row + t, token, partial)
        for column in range(0, size, LANES):
            at = 4 * column * size
            _segment_backward(
                run, head, row, count, column, tokens, kept + at, d_state + at, history
            )
        for t in range(count):
            norm = load_scalar(norms, t)
            prepare_backward(run, head, row + t, tokens + t * token_bytes, norm, partial)
    if run.d_state != 0:
        out = run.d_state + 4 * (seq * run.num_heads + head) * area
        for i in range(size):
            for j in range(size):
                store_scalar(out, j * size + i, load_scalar(d_state, i * size + j))


@njit(cache=True, nogil=True)
def _segment_backward(run, head, row, count, column, tokens, kept, d_state, history):
    """16 values through a segment: its states again, then backward; `d_state` is [16, key]."""
    size = run.size
    token_bytes, state_bytes = 4 * NUM_PLACES * size, 4 * LANES * size
    sums = history + (SEGMENT + 1) * state_bytes
    for j in range(size):
        for i in range(LANES):
            store_scalar(history, i * size + j, load_scalar(kept, LANES * j + i))
    for t in range(count):
        u = run.u + 4 * ((row + t) * run.width + head * size + column)
        _again(size, column, tokens + t * token_bytes, u, history + t * state_bytes)
    for i in range(2 * LANES):
        store(sums, LANES * i, splat(0.0))
    for t in range(count - 1, -1, -1):
        o = 4 * ((row + t) * run.width + head * size)
        token, before = tokens + t * token_bytes, history + t * state_bytes
        _through_sum(size, column, token, run.r + o, run.u + o, before, d_state, sums)
        _through_state(size, column, token, run.r + o, before, d_state, sums)


@njit(cache=True, nogil=True)
def _again(size, column, token, u, before):
    """The state after a token behind the one before it, both [16, key]."""
    after = before + 4 * LANES * size
    for j in range(0, size, LANES):
        w, b = load(token, W * size + j), load(token, B * size + j)
        key = load(token, KEY * size + j)
        for i in range(LANES):
            added = fma(load_splat(u, i), b, load_splat(token, VALUE * size + column + i) * key)
            store(after, i * size + j, fma(load(before, i * size + j), w, added))


@njit(cache=True, nogil=True)
def _through_sum(size, column, token, r, u, before, d_state, sums):
    """All that needs G and not d_u; d_u goes to the end of `sums`."""
    after, d_u = before + 4 * LANES * size, sums + 8 * LANES * LANES
    for j in range(0, size, LANES):
        r_j, b = load(r, j), load(token, B * size + j)
        key = load(token, KEY * size + j)
        d_w, d_b = load(token, D_W * size + j), load(token, D_B * size + j)
        d_key, d_r = load(token, D_KEY * size + j), load(token, D_R * size + j)
        for i in range(LANES):
            d_y = load_splat(token, D_Y * size + column + i)
            g = fma(r_j, d_y, load(d_state, i * size + j))
            d_r = fma(load(after, i * size + j), d_y, d_r)
            d_w = fma(load(before, i * size + j), g, d_w)
            d_b = fma(g, load_splat(u, column + i), d_b)
            d_key = fma(g, load_splat(token, VALUE * size + column + i), d_key)
            store(sums, LANES * i, fma(g, b, load(sums, LANES * i)))
            store(sums, LANES * (LANES + i), fma(g, key, load(sums, LANES * (LANES + i))))
        store(token, D_W * size + j, d_w)
        store(token, D_B * size + j, d_b)
        store(token, D_KEY * size + j, d_key)
        store(token, D_R * size + j, d_r)
    for i in range(LANES):
        store_scalar(d_u, i, total(load(sums, LANES * i)))
        at = D_VALUE * size + column + i
        d_value = total(load(sums, LANES * (LANES + i)))
        store_scalar(token, at, float32(load_scalar(token, at) + d_value))
        store(sums, LANES * i, splat(0.0))
        store(sums, LANES * (LANES + i), splat(0.0))


@njit(cache=True, nogil=True)
def _through_state(size, column, token, r, before, d_state, sums):
    """d_A, and G of the token before."""
    d_u = sums + 8 * LANES * LANES
    for j in range(0, size, LANES):
        r_j, w, a = load(r, j), load(token, W * size + j), load(token, A * size + j)
        d_a = load(token, D_A * size + j)
        for i in range(LANES):
            d_u_i = load_splat(d_u, i)
            d_a = fma(load(before, i * size + j), d_u_i, d_a)
            d_y = load_splat(token, D_Y * size + column + i)
            g = fma(r_j, d_y, load(d_state, i * size + j))
            store(d_state, i * size + j, fma(g, w, a * d_u_i))
        store(token, D_A * size + j, d_a)
