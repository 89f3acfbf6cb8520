"""WKV-7 in chunks on a GPU: the Triton kernels of prefill and training; no tensors, no autograd.

One program walks one sequence of one head, chunk by chunk, with the state in registers. The
algorithm is that of `reference.wkv7_chunked` ("RWKV-7 Goose", arXiv 2503.14456, in chunks as in
arXiv 2406.06484), derived and tested in plain torch in tests/engine/kernels/chunk_math.py.

All arithmetic is float32 whatever the inputs are stored in. PRECISION is that of matrix products
(`input_precision` of tl.dot); the inverse is made in float32 by forward substitution, and is
applied with at least "tf32x3", for one token repeated makes its entries cancel.

Legend: C tokens of a chunk, N head size, V value columns of one program. Packed inputs are
[T, H, N], states [slots, H, N, N] with row = key. Offsets into them are 64 bits wide.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _tile(pointer, base, offsets, mask):
    """Rows of a chunk in float32. A row past the end is zero: with a decay of e^0 = 1, a key, a
    value and a removal of zero it leaves the state as it is."""
    return tl.load(pointer + base + offsets, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _put(pointer, base, offsets, value, mask):
    tl.store(pointer + base + offsets, value.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def _inverse(lower, C: tl.constexpr):
    """(I - lower)⁻¹ by forward substitution, `lower` strictly lower triangular.

    Never by products of doublings: their terms grow like binomials where a token is repeated.
    """
    row = tl.arange(0, C)[:, None]
    found = tl.where(row == tl.arange(0, C)[None, :], 1.0, 0.0)
    for t in range(1, C):
        weights = tl.sum(tl.where(row == t, lower, 0.0), 0)
        found += tl.where(row == t, tl.sum(weights[:, None] * found, 0)[None, :], 0.0)
    return found


@triton.jit
def _attention(r, a, b, k, C: tl.constexpr, PRECISION: tl.constexpr):
    """How the tokens of a chunk see each other: ab, ak strictly before, rb, rk up to themselves."""
    reader = tl.arange(0, C)[:, None]
    writer = tl.arange(0, C)[None, :]
    b_NC = tl.trans(b)
    k_NC = tl.trans(k)
    ab = tl.where(reader > writer, tl.dot(a, b_NC, input_precision=PRECISION), 0.0)
    ak = tl.where(reader > writer, tl.dot(a, k_NC, input_precision=PRECISION), 0.0)
    rb = tl.where(reader >= writer, tl.dot(r, b_NC, input_precision=PRECISION), 0.0)
    rk = tl.where(reader >= writer, tl.dot(r, k_NC, input_precision=PRECISION), 0.0)
    return ab, ak, rb, rk


@triton.jit
def chunk_forward(
    r_pointer,
    lw_pointer,
    k_pointer,
    v_pointer,
    a_pointer,
    b_pointer,
    y_pointer,
    starts_pointer,
    chunk_starts_pointer,
    source_pointer,
    source_stride,
    src_pointer,
    target_pointer,
    target_stride,
    dst_pointer,
    checkpoints_pointer,
    num_heads,
    N: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    HAS_CHECKPOINTS: tl.constexpr,
    PRECISION: tl.constexpr,
    SOLVE_PRECISION: tl.constexpr,
):
    """Program (h, j, s): value columns j * V .. of head h, for sequence s.

    starts [S + 1] int64: first token of each sequence and the end; src, dst [S] int64: slots that
    states are read from and written to, a negative dst makes the sequence padding that costs
    nothing. Checkpoints [chunks, H, N, N] get the state before every chunk, those of sequence s
    from chunk_starts[s] on.
    """
    head = tl.program_id(0)
    sequence = tl.program_id(2)
    dst = tl.load(dst_pointer + sequence)
    if dst < 0:
        return
    src = tl.load(src_pointer + sequence)
    token = tl.load(starts_pointer + sequence)
    end = tl.load(starts_pointer + sequence + 1)

    c = tl.arange(0, C)[:, None]
    key = tl.arange(0, N)
    value = tl.program_id(1) * V + tl.arange(0, V)
    rows = c * (num_heads * N) + head * N  # within the chunk's tokens
    by_key = rows + key[None, :]
    by_value = rows + value[None, :]
    by_both = head * (N * N) + key[:, None] * N + value[None, :]

    state = tl.load(source_pointer + src * source_stride + by_both).to(tl.float32)
    if HAS_CHECKPOINTS:
        chunk = tl.load(chunk_starts_pointer + sequence)
    while token < end:
        if HAS_CHECKPOINTS:
            tl.store(checkpoints_pointer + chunk * (num_heads * N * N) + by_both, state)
            chunk += 1
        base = token * (num_heads * N)
        mask = c < end - token
        lw = _tile(lw_pointer, base, by_key, mask)
        sums = tl.cumsum(lw, 0)
        whole = tl.exp(tl.sum(lw, 0))[:, None]
        write = tl.exp(-sums)
        r = _tile(r_pointer, base, by_key, mask) * tl.exp(sums)
        a = _tile(a_pointer, base, by_key, mask) * tl.exp(sums - lw)
        b = _tile(b_pointer, base, by_key, mask) * write
        k = _tile(k_pointer, base, by_key, mask) * write
        v = _tile(v_pointer, base, by_value, mask)
        ab, ak, rb, rk = _attention(r, a, b, k, C, PRECISION)

        x = tl.dot(a, state, input_precision=PRECISION)
        x = tl.dot(ak, v, x, input_precision=PRECISION)
        u = tl.dot(_inverse(ab, C), x, input_precision=SOLVE_PRECISION)
        y = tl.dot(r, state, input_precision=PRECISION)
        y = tl.dot(rb, u, y, input_precision=PRECISION)
        y = tl.dot(rk, v, y, input_precision=PRECISION)
        _put(y_pointer, base, by_value, y, mask)

        state = tl.dot(tl.trans(b), u, state, input_precision=PRECISION)
        state = whole * tl.dot(tl.trans(k), v, state, input_precision=PRECISION)
        token += C
    target = target_pointer + dst * target_stride + by_both
    tl.store(target, state.to(target_pointer.dtype.element_ty))


@triton.jit
def chunk_backward(
    r_pointer,
    lw_pointer,
    k_pointer,
    v_pointer,
    a_pointer,
    b_pointer,
    d_y_pointer,
    starts_pointer,
    chunk_starts_pointer,
    checkpoints_pointer,
    last_pointer,
    d_last_pointer,
    d_r_pointer,
    d_lw_pointer,
    d_k_pointer,
    d_v_pointer,
    d_a_pointer,
    d_b_pointer,
    d_first_pointer,
    num_heads,
    N: tl.constexpr,
    C: tl.constexpr,
    PRECISION: tl.constexpr,
    SOLVE_PRECISION: tl.constexpr,
):
    """Program (h, s): all gradients of head h of sequence s, from its last chunk to its first.

    Checkpoints as `chunk_forward` leaves them; last, d_last and d_first [S, H, N, N]: the state
    after each sequence, its gradient, and the gradient of the state before. Every number has one
    writer, so the result is the same each time.
    """
    head = tl.program_id(0)
    sequence = tl.program_id(1).to(tl.int64)
    start = tl.load(starts_pointer + sequence)
    end = tl.load(starts_pointer + sequence + 1)
    chunk = tl.load(chunk_starts_pointer + sequence + 1)
    token = start + (end - start + C - 1) // C * C

    c = tl.arange(0, C)[:, None]
    n = tl.arange(0, N)
    reader = tl.arange(0, C)[:, None]
    writer = tl.arange(0, C)[None, :]
    tile = c * (num_heads * N) + head * N + n[None, :]
    by_both = head * (N * N) + n[:, None] * N + n[None, :]
    whole_state = sequence * (num_heads * N * N) + by_both

    d_state = tl.load(d_last_pointer + whole_state)
    # What the exponent of the whole chunk's decay gets: the state after the chunk is a multiple
    # of that decay. Each chunk hands it to the one before, which ends in the state it began with.
    d_whole = tl.sum(tl.load(last_pointer + whole_state) * d_state, 1)
    while token > start:
        token -= C
        chunk -= 1
        base = token * (num_heads * N)
        mask = c < end - token
        state = tl.load(checkpoints_pointer + chunk * (num_heads * N * N) + by_both)
        lw = _tile(lw_pointer, base, tile, mask)
        sums = tl.cumsum(lw, 0)
        whole = tl.exp(tl.sum(lw, 0))[:, None]
        read = tl.exp(sums)
        remove = tl.exp(sums - lw)
        write = tl.exp(-sums)
        r = _tile(r_pointer, base, tile, mask) * read
        a = _tile(a_pointer, base, tile, mask) * remove
        b = _tile(b_pointer, base, tile, mask) * write
        k = _tile(k_pointer, base, tile, mask) * write
        v = _tile(v_pointer, base, tile, mask)
        d_y = _tile(d_y_pointer, base, tile, mask)
        ab, ak, rb, rk = _attention(r, a, b, k, C, PRECISION)
        inverse = _inverse(ab, C)
        x = tl.dot(a, state, input_precision=PRECISION)
        x = tl.dot(ak, v, x, input_precision=PRECISION)
        u = tl.dot(inverse, x, input_precision=SOLVE_PRECISION)

        d_scaled = whole * d_state
        d_u = tl.dot(b, d_scaled, input_precision=PRECISION)
        d_u = tl.dot(tl.trans(rb), d_y, d_u, input_precision=PRECISION)
        d_x = tl.dot(tl.trans(inverse), d_u, input_precision=SOLVE_PRECISION)
        d_v = tl.dot(k, d_scaled, input_precision=PRECISION)
        d_v = tl.dot(tl.trans(rk), d_y, d_v, input_precision=PRECISION)
        d_v = tl.dot(tl.trans(ak), d_x, d_v, input_precision=PRECISION)
        _put(d_v_pointer, base, tile, d_v, mask)

        u_NC = tl.trans(u)
        v_NC = tl.trans(v)
        d_ab = tl.where(reader > writer, tl.dot(d_x, u_NC, input_precision=PRECISION), 0.0)
        d_ak = tl.where(reader > writer, tl.dot(d_x, v_NC, input_precision=PRECISION), 0.0)
        d_rb = tl.where(reader >= writer, tl.dot(d_y, u_NC, input_precision=PRECISION), 0.0)
        d_rk = tl.where(reader >= writer, tl.dot(d_y, v_NC, input_precision=PRECISION), 0.0)

        # An exponent gets factor times gradient; the factors here are those scaled by it.
        state_VK = tl.trans(state)
        d_r = tl.dot(d_y, state_VK, input_precision=PRECISION)
        d_r = tl.dot(d_rb, b, d_r, input_precision=PRECISION)
        d_r = tl.dot(d_rk, k, d_r, input_precision=PRECISION)
        _put(d_r_pointer, base, tile, d_r * read, mask)
        d_sums = d_r * r
        d_a = tl.dot(d_x, state_VK, input_precision=PRECISION)
        d_a = tl.dot(d_ab, b, d_a, input_precision=PRECISION)
        d_a = tl.dot(d_ak, k, d_a, input_precision=PRECISION)
        _put(d_a_pointer, base, tile, d_a * remove, mask)
        d_own = d_a * a
        d_scaled_VK = tl.trans(d_scaled)
        d_b = tl.dot(u, d_scaled_VK, input_precision=PRECISION)
        d_b = tl.dot(tl.trans(d_ab), a, d_b, input_precision=PRECISION)
        d_b = tl.dot(tl.trans(d_rb), r, d_b, input_precision=PRECISION)
        _put(d_b_pointer, base, tile, d_b * write, mask)
        d_sums -= d_b * b
        d_k = tl.dot(v, d_scaled_VK, input_precision=PRECISION)
        d_k = tl.dot(tl.trans(d_ak), a, d_k, input_precision=PRECISION)
        d_k = tl.dot(tl.trans(d_rk), r, d_k, input_precision=PRECISION)
        _put(d_k_pointer, base, tile, d_k * write, mask)
        d_sums += d_own - d_k * k
        # The decay of token s is in the sums of s and all after it, but for `remove` not in s.
        d_lw = tl.cumsum(d_sums, 0, reverse=True) - d_own + d_whole[None, :]
        _put(d_lw_pointer, base, tile, d_lw, mask)

        d_state = tl.dot(tl.trans(a), d_x, d_scaled, input_precision=PRECISION)
        d_state = tl.dot(tl.trans(r), d_y, d_state, input_precision=PRECISION)
        d_whole = tl.sum(state * d_state, 1)
    tl.store(d_first_pointer + whole_state, d_state)
