"""WKV-7 in chunks on a GPU, forward: the Triton kernel of prefill and training; no tensors.

One program walks one sequence of one head, chunk by chunk, with the state in registers. The
algorithm is that of `reference.wkv7_chunked` ("RWKV-7 Goose", arXiv 2503.14456, in chunks as in
arXiv 2406.06484), derived and tested in plain torch in tests/engine/kernels/chunk_math.py.

States and all that has value channels lie transposed, value by value: a warp then owns 16 value
columns of every product, where products of 16 rows would be made again by each warp, and would
not fit its registers.

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
def tile(pointer, offsets, mask):
    """Rows of a chunk in float32. A row past the end is zero: with a decay of e^0 = 1, a key, a
    value and a removal of zero it leaves the state as it is."""
    return tl.load(pointer + offsets, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def put(pointer, offsets, value, mask):
    tl.store(pointer + offsets, value.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def inverse_of(upper, C: tl.constexpr):
    """(I - upper)⁻¹ by forward substitution, `upper` strictly upper triangular.

    Never by products of doublings: their terms grow like binomials where a token is repeated.
    """
    row = tl.arange(0, C)[:, None]
    column = tl.arange(0, C)[None, :]
    found = tl.where(row == column, 1.0, 0.0)
    for s in range(C - 1):
        weights = tl.sum(tl.where(row == s, upper, 0.0), 0)
        solved = tl.sum(tl.where(column == s, found, 0.0), 1)
        found += solved[:, None] * weights[None, :]
    return found


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
    u_pointer,
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
    from chunk_starts[s] on, and u [T, H, N] what every token removes, for the backward.
    """
    head = tl.program_id(0)
    sequence = tl.program_id(2)
    dst = tl.load(dst_pointer + sequence)
    if dst < 0:
        return
    src = tl.load(src_pointer + sequence)
    token = tl.load(starts_pointer + sequence)
    end = tl.load(starts_pointer + sequence + 1)

    c = tl.arange(0, C)
    key = tl.arange(0, N)
    value = tl.program_id(1) * V + tl.arange(0, V)
    writer = tl.arange(0, C)[:, None]
    reader = tl.arange(0, C)[None, :]
    by_key = c[:, None] * (num_heads * N) + head * N + key[None, :]
    by_value = c[None, :] * (num_heads * N) + head * N + value[:, None]
    by_both = head * (N * N) + key[None, :] * N + value[:, None]

    state = tl.load(source_pointer + src * source_stride + by_both).to(tl.float32)
    if HAS_CHECKPOINTS:
        chunk = tl.load(chunk_starts_pointer + sequence)
    while token < end:
        if HAS_CHECKPOINTS:
            tl.store(checkpoints_pointer + chunk * (num_heads * N * N) + by_both, state)
            chunk += 1
        base = token * (num_heads * N)
        mask = c[:, None] < end - token
        value_mask = c[None, :] < end - token
        lw = tile(lw_pointer + base, by_key, mask)
        sums = tl.cumsum(lw, 0)
        whole = tl.exp(tl.sum(lw, 0))
        write = tl.exp(-sums)
        b = tile(b_pointer + base, by_key, mask) * write
        k = tile(k_pointer + base, by_key, mask) * write
        r = tl.trans(tile(r_pointer + base, by_key, mask) * tl.exp(sums))
        a = tl.trans(tile(a_pointer + base, by_key, mask) * tl.exp(sums - lw))
        v = tile(v_pointer + base, by_value, value_mask)
        # [writer, reader]: how the tokens of the chunk see each other.
        ab = tl.where(writer < reader, tl.dot(b, a, input_precision=PRECISION), 0.0)
        inverse = inverse_of(ab, C)
        ak = tl.where(writer < reader, tl.dot(k, a, input_precision=PRECISION), 0.0)
        x = tl.dot(state, a, input_precision=PRECISION)
        x = tl.dot(v, ak, x, input_precision=PRECISION)
        u = tl.dot(x, inverse, input_precision=SOLVE_PRECISION)
        rb = tl.where(writer <= reader, tl.dot(b, r, input_precision=PRECISION), 0.0)
        rk = tl.where(writer <= reader, tl.dot(k, r, input_precision=PRECISION), 0.0)
        y = tl.dot(state, r, input_precision=PRECISION)
        y = tl.dot(u, rb, y, input_precision=PRECISION)
        y = tl.dot(v, rk, y, input_precision=PRECISION)
        put(y_pointer + base, by_value, y, value_mask)
        if HAS_CHECKPOINTS:
            put(u_pointer + base, by_value, u, value_mask)
        state = tl.dot(u, b, state, input_precision=PRECISION)
        state = whole[None, :] * tl.dot(v, k, state, input_precision=PRECISION)
        token += C
    target = target_pointer + dst * target_stride + by_both
    tl.store(target, state.to(target_pointer.dtype.element_ty))
