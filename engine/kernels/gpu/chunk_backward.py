"""WKV-7 in chunks on a GPU, backward: two Triton kernels of training; no tensors, no autograd.

`chunk_chain` goes from the last chunk to the first with the gradient of the state in registers,
and does only what has to wait for it; `chunk_gradients` then computes all chunks at once. Derived
and tested in plain torch in tests/engine/kernels/chunk_math.py. Legend, layout and precision are
those of `chunk`. Every number has one writer, so that the result is the same each time.
"""

from __future__ import annotations

import triton
import triton.language as tl

from engine.kernels.gpu.chunk import inverse_of, put, tile


@triton.jit
def chunk_chain(
    r_pointer,
    lw_pointer,
    a_pointer,
    b_pointer,
    d_y_pointer,
    starts_pointer,
    chunk_starts_pointer,
    d_last_pointer,
    d_x_pointer,
    d_states_pointer,
    d_first_pointer,
    num_heads,
    N: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    PRECISION: tl.constexpr,
    SOLVE_PRECISION: tl.constexpr,
):
    """Program (h, j, s): value columns j * V .. of head h, for sequence s.

    d_last and d_first [S, H, N, N]: gradients of the states after and before each sequence.
    d_states [chunks, H, N, N] get the gradient of the state after every chunk, and d_x [T, H, N]
    that of the right-hand side of the system which a chunk solves.
    """
    head = tl.program_id(0)
    sequence = tl.program_id(2).to(tl.int64)
    start = tl.load(starts_pointer + sequence)
    end = tl.load(starts_pointer + sequence + 1)
    chunk = tl.load(chunk_starts_pointer + sequence + 1)
    token = start + (end - start + C - 1) // C * C

    c = tl.arange(0, C)
    key = tl.arange(0, N)
    value = tl.program_id(1) * V + tl.arange(0, V)
    one = tl.arange(0, C)[:, None]
    other = tl.arange(0, C)[None, :]
    by_key = c[:, None] * (num_heads * N) + head * N + key[None, :]
    by_value = c[None, :] * (num_heads * N) + head * N + value[:, None]
    by_both = head * (N * N) + key[None, :] * N + value[:, None]

    d_state = tl.load(d_last_pointer + sequence * (num_heads * N * N) + by_both)
    while token > start:
        token -= C
        chunk -= 1
        tl.store(d_states_pointer + chunk * (num_heads * N * N) + by_both, d_state)
        base = token * (num_heads * N)
        mask = c[:, None] < end - token
        value_mask = c[None, :] < end - token
        lw = tile(lw_pointer + base, by_key, mask)
        sums = tl.cumsum(lw, 0)
        whole = tl.exp(tl.sum(lw, 0))
        b = tile(b_pointer + base, by_key, mask) * tl.exp(-sums)
        a = tile(a_pointer + base, by_key, mask) * tl.exp(sums - lw)
        r = tile(r_pointer + base, by_key, mask) * tl.exp(sums)
        d_y = tile(d_y_pointer + base, by_value, value_mask)
        ab = tl.dot(b, tl.trans(a), input_precision=PRECISION)  # [writer, reader]
        inverse = tl.trans(inverse_of(tl.where(one < other, ab, 0.0), C))
        b = tl.trans(b)
        rb = tl.where(one >= other, tl.dot(r, b, input_precision=PRECISION), 0.0)
        d_state = d_state * whole[None, :]
        d_u = tl.dot(d_state, b, input_precision=PRECISION)
        d_u = tl.dot(d_y, rb, d_u, input_precision=PRECISION)
        d_x = tl.dot(d_u, inverse, input_precision=SOLVE_PRECISION)
        put(d_x_pointer + base, by_value, d_x, value_mask)
        d_state = tl.dot(d_x, a, d_state, input_precision=PRECISION)
        d_state = tl.dot(d_y, r, d_state, input_precision=PRECISION)
    tl.store(d_first_pointer + sequence * (num_heads * N * N) + by_both, d_state)


@triton.jit
def _scaled(pointer, lw_pointer, at, mask, SIGN: tl.constexpr, OWN: tl.constexpr):
    """A tile [N, C] times e^(SIGN * sums of log decay), without the token's own if not OWN."""
    lw = tile(lw_pointer, at, mask)
    sums = tl.cumsum(lw, 1)
    return tile(pointer, at, mask) * tl.exp(SIGN * (sums if OWN else sums - lw))


@triton.jit
def _reader(state, d_read, u, v, b, k, seen, PRECISION: tl.constexpr):
    """What a reader, r or a, gets of the gradient of what it has read, and the gradients
    [reader, writer] of how it sees u and v."""
    read_CV = tl.trans(d_read)
    d_b = tl.where(seen, tl.dot(read_CV, u, input_precision=PRECISION), 0.0)
    d_k = tl.where(seen, tl.dot(read_CV, v, input_precision=PRECISION), 0.0)
    d = tl.dot(state, d_read, input_precision=PRECISION)
    d = tl.dot(b, tl.trans(d_b), d, input_precision=PRECISION)
    d = tl.dot(k, tl.trans(d_k), d, input_precision=PRECISION)
    return d, d_b, d_k


@triton.jit
def chunk_gradients(
    r_pointer,
    lw_pointer,
    k_pointer,
    v_pointer,
    a_pointer,
    b_pointer,
    d_y_pointer,
    chunk_tokens_pointer,
    checkpoints_pointer,
    u_pointer,
    d_states_pointer,
    d_x_pointer,
    d_r_pointer,
    d_lw_pointer,
    d_k_pointer,
    d_v_pointer,
    d_a_pointer,
    d_b_pointer,
    num_heads,
    N: tl.constexpr,
    C: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Program (i, h): the gradients of all inputs of chunk i for head h.

    chunk_tokens [chunks + 1] int64: first token of each chunk, and the end; checkpoints and u as
    `chunk_forward` leaves them, d_states and d_x as `chunk_chain` does.
    """
    chunk = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    token = tl.load(chunk_tokens_pointer + chunk)
    num_tokens = tl.load(chunk_tokens_pointer + chunk + 1) - token

    n = tl.arange(0, N)
    c = tl.arange(0, C)[None, :]
    reader = tl.arange(0, C)[:, None]
    writer = tl.arange(0, C)[None, :]
    # Everything of a token is a column here: [N, C].
    at = c * (num_heads * N) + head * N + n[:, None]
    by_both = head * (N * N) + n[:, None] * N + n[None, :]
    base = token * (num_heads * N)
    state_base = chunk * (num_heads * N * N)
    mask = c < num_tokens

    # Each part loads anew what it needs: together it would not fit into registers.
    b = _scaled(b_pointer + base, lw_pointer + base, at, mask, -1, True)
    k = _scaled(k_pointer + base, lw_pointer + base, at, mask, -1, True)
    u = tile(u_pointer + base, at, mask)
    v = tile(v_pointer + base, at, mask)
    state = tl.load(checkpoints_pointer + state_base + by_both)
    # An exponent gets factor times gradient.
    d_y = tile(d_y_pointer + base, at, mask)
    d_r, d_rb, d_rk = _reader(state, d_y, u, v, b, k, reader >= writer, PRECISION)
    lw = tile(lw_pointer + base, at, mask)
    d_r *= tl.exp(tl.cumsum(lw, 1))
    put(d_r_pointer + base, at, d_r, mask)
    d_sums = d_r * tile(r_pointer + base, at, mask)

    d_x = tile(d_x_pointer + base, at, mask)
    d_a, d_ab, d_ak = _reader(state, d_x, u, v, b, k, reader > writer, PRECISION)
    lw = tile(lw_pointer + base, at, mask)
    d_a *= tl.exp(tl.cumsum(lw, 1) - lw)
    put(d_a_pointer + base, at, d_a, mask)
    own = d_a * tile(a_pointer + base, at, mask)
    # The decay of token s is in the sums of s and all after it, but for `remove` not in s.
    d_lw = tl.cumsum(d_sums + own, 1, reverse=True) - own

    whole = tl.exp(tl.sum(tile(lw_pointer + base, at, mask), 1))[:, None]
    d_scaled = whole * tl.load(d_states_pointer + state_base + by_both)
    # The state after the chunk is a multiple of the whole chunk's decay.
    d_whole = tl.sum(tl.load(checkpoints_pointer + state_base + by_both) * d_scaled, 1)
    k = _scaled(k_pointer + base, lw_pointer + base, at, mask, -1, True)
    r = _scaled(r_pointer + base, lw_pointer + base, at, mask, 1, True)
    a = _scaled(a_pointer + base, lw_pointer + base, at, mask, 1, False)
    ak = tl.dot(tl.trans(a), k, input_precision=PRECISION)
    rk = tl.dot(tl.trans(r), k, input_precision=PRECISION)
    d_v = tl.dot(tl.trans(d_scaled), k, input_precision=PRECISION)
    d_y = tile(d_y_pointer + base, at, mask)
    d_v = tl.dot(d_y, tl.where(reader >= writer, rk, 0.0), d_v, input_precision=PRECISION)
    d_x = tile(d_x_pointer + base, at, mask)
    d_v = tl.dot(d_x, tl.where(reader > writer, ak, 0.0), d_v, input_precision=PRECISION)
    put(d_v_pointer + base, at, d_v, mask)

    d_b = tl.dot(d_scaled, tile(u_pointer + base, at, mask), input_precision=PRECISION)
    b = _scaled(b_pointer + base, lw_pointer + base, at, mask, -1, True)
    d_whole += tl.sum(b * d_b, 1)
    d_b = tl.dot(a, d_ab, d_b, input_precision=PRECISION)
    d_b = tl.dot(r, d_rb, d_b, input_precision=PRECISION)
    d_sums = d_b * b
    write = tl.exp(-tl.cumsum(tile(lw_pointer + base, at, mask), 1))
    put(d_b_pointer + base, at, d_b * write, mask)

    d_k = tl.dot(d_scaled, tile(v_pointer + base, at, mask), input_precision=PRECISION)
    k = _scaled(k_pointer + base, lw_pointer + base, at, mask, -1, True)
    d_whole += tl.sum(k * d_k, 1)
    d_k = tl.dot(a, d_ak, d_k, input_precision=PRECISION)
    d_k = tl.dot(r, d_rk, d_k, input_precision=PRECISION)
    d_sums += d_k * k
    write = tl.exp(-tl.cumsum(tile(lw_pointer + base, at, mask), 1))
    put(d_k_pointer + base, at, d_k * write, mask)
    d_lw += d_whole[:, None] - tl.cumsum(d_sums, 1, reverse=True)
    put(d_lw_pointer + base, at, d_lw, mask)
