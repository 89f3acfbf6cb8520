"""Phases of a step that go row by row: embedding, token shift, the norm at the end."""

from __future__ import annotations

from numba import njit

from engine.kernels.cpu.norm import layer_norm, mix
from engine.kernels.cpu.records import FFN_MIXED, FLOAT32
from engine.kernels.cpu.team import next_item
from engine.kernels.cpu.vector import load, load_bfloat16, load_int64, splat, store


@njit(cache=True, nogil=True)
def embed(team, model, run, scratch):
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
def mix_tokens(team, model, layer, index, rows, run, scratch):
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
def mix_channels(team, model, layer, index, rows, run, scratch):
    while True:
        row = next_item(team)
        if row >= run.num_rows:
            return
        seq = _sequence_of(run, row)
        before = _normed_rows(model, layer, index, 1, run, seq, row, scratch)
        mix(model.kind, scratch, before, layer.ffn_mu, model.padded, rows[FFN_MIXED], row)


@njit(cache=True, nogil=True)
def keep_last(model, run, seq, index, which):
    """The last token of a sequence into its slot, now that nobody reads the one before."""
    kept = _shift_at(model, run, run.dst, seq, index, which)
    last = (run.last_ffn if which else run.last) + 4 * seq * model.padded
    for i in range(0, model.channels, 16):
        store(kept, i, load(last, i))


@njit(cache=True, nogil=True)
def leave_rows(team, model, run, scratch):
    """The hidden rows that the caller gets."""
    while True:
        row = next_item(team)
        if row >= run.num_rows:
            return
        x = run.x + 4 * row * model.padded
        out = run.hidden + 4 * row * model.channels
        layer_norm(x, model.channels, model.channels, model.ln_out_weight, model.ln_out_bias, out)
