"""One step of the whole model, phase by phase: what every thread of a team does.

Rows are tokens; those of a sequence follow each other. A phase reads what the one before has
written, so all meet in between; within a phase items are independent, and no two write the same.
"""

from __future__ import annotations

from numba import float32, njit

from engine.kernels.cpu.heads import heads_of_unit, mix_heads
from engine.kernels.cpu.linear import chunk_rows, multiply, put, tile_rows
from engine.kernels.cpu.norm import layer_norm, mix
from engine.kernels.cpu.records import (
    A1,
    FFN_HIDDEN,
    FFN_KEY,
    FFN_MIXED,
    FFN_VALUE,
    FLOAT32,
    G1,
    HEAD,
    KEY,
    LAST,
    MIXED_A,
    MIXED_G,
    MIXED_K,
    MIXED_R,
    MIXED_V,
    MIXED_W,
    NUM_MATRICES,
    OUTPUT,
    RANK_A,
    RANK_G,
    RANK_V,
    RANK_W,
    READ,
    RECEPTANCE,
    VALUE,
    W1,
    W2,
)
from engine.kernels.cpu.team import announce, await_job, dismiss, meet, next_item
from engine.kernels.cpu.vector import (
    at_least,
    load,
    load_bfloat16,
    load_int64,
    load_scalar,
    sigmoid,
    splat,
    store,
    store_scalar,
    tanh,
)


@njit(cache=True, nogil=True)
def follow(team, thread, num_threads, model, layers, matrices, rows, run):
    """A member of the team, until it is dismissed."""
    job = 0
    while True:
        job = await_job(team, job)
        if job < 0:
            return
        _work(team, thread, num_threads, model[0], layers, matrices, rows, run[0])


@njit(cache=True, nogil=True)
def lead(team, num_threads, model, layers, matrices, rows, run):
    """Do the job in `run`, with the others."""
    announce(team)
    _work(team, 0, num_threads, model[0], layers, matrices, rows, run[0])


@njit(cache=True, nogil=True)
def send_home(team):
    dismiss(team)


@njit(cache=True, nogil=True)
def _work(team, thread, num_threads, model, layers, matrices, rows, run):
    scratch = run.scratch + 4 * thread * run.scratch_size
    if run.job == HEAD:
        _prepare_head(team, model, rows[LAST], run)
        meet(team, num_threads)
        _head(team, model, matrices[model.num_layers * NUM_MATRICES], rows[LAST], run, scratch)
        meet(team, num_threads)
        return
    _embed(team, model, run, scratch)
    meet(team, num_threads)
    for index in range(model.num_layers):
        layer = layers[index]
        first = index * NUM_MATRICES
        _mix_tokens(team, model, layer, index, rows, run, scratch)
        meet(team, num_threads)
        _project(team, model, matrices, first, index, rows, run, scratch)
        meet(team, num_threads)
        _leave_ranks(team, model, matrices, first, index, rows, run, scratch)
        meet(team, num_threads)
        _recur(team, num_threads, model, layer, index, rows, run, scratch)
        meet(team, num_threads)
        _add(team, model, matrices[first + OUTPUT], rows[READ], run, scratch)
        meet(team, num_threads)
        _mix_channels(team, model, layer, index, rows, run, scratch)
        meet(team, num_threads)
        _hidden(team, model, matrices[first + FFN_KEY], index, rows, run, scratch)
        meet(team, num_threads)
        _add(team, model, matrices[first + FFN_VALUE], rows[FFN_HIDDEN], run, scratch)
        meet(team, num_threads)
    _leave(team, model, run, scratch)
    meet(team, num_threads)


@njit(cache=True, nogil=True)
def _embed(team, model, run, scratch):
    """x = ln0(emb[token])."""
    while True:
        row = next_item(team)
        if row >= run.num_rows:
            return
        at = load_int64(run.tokens, row) * model.padded
        for i in range(0, model.padded, 16):
            if model.kind == FLOAT32:
                store(scratch, i, load(model.emb, at + i))
            else:
                store(scratch, i, load_bfloat16(model.emb, at + i))
        x = run.x + 4 * row * model.padded
        layer_norm(scratch, model.channels, model.padded, model.ln0_weight, model.ln0_bias, x)


@njit(cache=True, nogil=True)
def _shift_at(model, run, slots, seq, index, which):
    """Address of the token before a sequence, or of its last one."""
    layer_at = (2 * index + which) * model.channels
    return run.shift + 4 * (load_int64(slots, seq) * run.shift_slot + layer_at)


@njit(cache=True, nogil=True)
def _normed_rows(model, layer, index, which, run, seq, row, scratch):
    """Normalised: this token at `scratch`, and the address of the one before.

    The one before is normalised again, which costs less than to wait for who has done it.
    """
    padded, size = model.padded, 4 * model.padded
    weight = layer.ln2_weight if which else layer.ln1_weight
    bias = layer.ln2_bias if which else layer.ln1_bias
    layer_norm(run.x + row * size, model.channels, padded, weight, bias, scratch)
    before = scratch + size
    if row > load_int64(run.starts, seq):
        layer_norm(run.x + (row - 1) * size, model.channels, padded, weight, bias, before)
    else:
        kept = _shift_at(model, run, run.src, seq, index, which)
        for i in range(0, model.channels, 16):
            store(before, i, load(kept, i))
        for i in range(model.channels, padded, 16):
            store(before, i, splat(0.0))
    if row + 1 == load_int64(run.starts, seq + 1):
        last = run.last_ffn if which else run.last
        for i in range(0, padded, 16):
            store(last + seq * size, i, load(scratch, i))
    return before


@njit(cache=True, nogil=True)
def _sequence_of(run, row):
    low, high = 0, run.num_seqs
    while high - low > 1:
        middle = (low + high) // 2
        if load_int64(run.starts, middle) <= row:
            low = middle
        else:
            high = middle
    return low


@njit(cache=True, nogil=True)
def _mix_tokens(team, model, layer, index, rows, run, scratch):
    while True:
        row = next_item(team)
        if row >= run.num_rows:
            return
        seq = _sequence_of(run, row)
        before = _normed_rows(model, layer, index, 0, run, seq, row, scratch)
        for way in range(6):
            mu = layer.mus + 4 * way * model.padded
            mix(model.kind, scratch, before, mu, model.padded, rows[way], row)


@njit(cache=True, nogil=True)
def _mix_channels(team, model, layer, index, rows, run, scratch):
    while True:
        row = next_item(team)
        if row >= run.num_rows:
            return
        seq = _sequence_of(run, row)
        before = _normed_rows(model, layer, index, 1, run, seq, row, scratch)
        mix(model.kind, scratch, before, layer.ffn_mu, model.padded, rows[FFN_MIXED], row)


@njit(cache=True, nogil=True)
def _keep_last(model, run, seq, index, which):
    """The last token of a sequence into its slot, now that nobody reads the one before."""
    kept = _shift_at(model, run, run.dst, seq, index, which)
    last = (run.last_ffn if which else run.last) + 4 * seq * model.padded
    for i in range(0, model.channels, 16):
        store(kept, i, load(last, i))


@njit(cache=True, nogil=True)
def _project(team, model, matrices, first, index, rows, run, scratch):
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
def _leave_ranks(team, model, matrices, first, index, rows, run, scratch):
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
            _keep_last(model, run, item - num_items, index, 0)
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
def _recur(team, num_threads, model, layer, index, rows, run, scratch):
    units = (model.num_heads + heads_of_unit(model.head_size) - 1) // heads_of_unit(model.head_size)
    num_units = units * run.num_seqs
    size = max(1, num_units // (16 * num_threads)) if run.num_rows == run.num_seqs else 1
    while True:
        item = next_item(team)
        if item * size >= num_units:
            return
        for unit in range(item * size, min(item * size + size, num_units)):
            mix_heads(model, layer, index, run, rows[READ], unit // units, unit % units, scratch)


@njit(cache=True, nogil=True)
def _add(team, model, matrix, rows, run, scratch):
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
def _hidden(team, model, matrix, index, rows, run, scratch):
    """Squared ReLU of the channel mix, and the kept last tokens."""
    size = chunk_rows(model.kind, run.num_rows, matrix.num_inputs)
    num_items = (run.num_rows + size - 1) // size * matrix.num_blocks
    zero = splat(0.0)
    while True:
        item = next_item(team)
        if item >= num_items + run.num_seqs:
            return
        if item >= num_items:
            _keep_last(model, run, item - num_items, index, 1)
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
def _leave(team, model, run, scratch):
    """The hidden rows that the caller gets."""
    while True:
        row = next_item(team)
        if row >= run.num_rows:
            return
        x = run.x + 4 * row * model.padded
        out = run.hidden + 4 * row * model.channels
        layer_norm(x, model.channels, model.channels, model.ln_out_weight, model.ln_out_bias, out)


@njit(cache=True, nogil=True)
def _prepare_head(team, model, rows, run):
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
def _head(team, model, matrix, rows, run, scratch):
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
