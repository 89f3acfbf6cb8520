"""How long the kernels of the chosen backend take, beside a copy and beside fla.

The time mix is the recurrence and all around it: what prepares its inputs, the group norm, the
bonus and the gate. `wkv` is the recurrence alone, which is what fla's functions compute, so times
of decoding have ours doing more.

Legend: T packed tokens, H heads, N head size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import fields
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks import gpu_peer
from benchmarks.gpu_device import Bench, Row
from engine.kernels import reference
from engine.kernels.backend import Batch, TimeMixRows, TimeMixWeights

Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]  # r, lw, k, v, a, b [T, H, N]


def decode_rows(bench: Bench) -> Iterator[Row]:
    """The time mix of single tokens, beside the time that copying its states would take.

    Of each step another part of the pool, so that states come from memory as they do with the
    layers of a model.
    """
    heads, size, num_slots = (2, 16, 4) if bench.is_tiny else (64, 64, 512)
    for state_dtype in (torch.float32, torch.float16):
        for num_rows in (1, 4) if bench.is_tiny else (1, 8, 32, 128, 256, 512):
            pool = torch.zeros(num_slots, heads, size, size, device=bench.device, dtype=state_dtype)
            batches = _batches(num_slots, num_rows, bench.device)
            row: Row = {"name": "time mix, one token", "rows": num_rows, "heads": heads,
                        "state": str(state_dtype).removeprefix("torch.")}  # fmt: skip
            with torch.no_grad():
                mixing = time_mix_inputs(bench, num_rows, heads, size)
                steps = [partial(bench.kernels.time_mix, *mixing, b, pool) for b in batches]
                seconds = bench.replayed_seconds(steps)
                row |= {
                    "us": seconds * 1e6,
                    "share_of_copy": bench.share_of_copy(2 * num_rows * pool[0].nbytes, seconds),
                }
                if gpu_peer.has_fla(bench) and state_dtype == torch.float32:
                    row["fla_us"] = _fla_decode_us(bench, pool, num_rows, len(batches))
            yield row


def _batches(num_slots: int, num_rows: int, device: torch.device) -> list[Batch]:
    """All slots, `num_rows` at a time, but no more than a graph takes quickly."""
    slots = torch.arange(num_slots, device=device)
    parts = [part.clone() for part in slots.split(num_rows)[: min(128, num_slots // num_rows)]]
    return [Batch((1,) * num_rows, part, part) for part in parts]


def _fla_decode_us(bench: Bench, pool: Tensor, num_rows: int, num_parts: int) -> float | str:
    heads, size = pool.shape[1:3]
    inputs = wkv_inputs(bench, num_rows, heads, size, bench.dtype)
    kk, rate = -inputs[4], torch.rand_like(inputs[4])
    parts = pool.split(num_rows)[:num_parts]
    steps = [partial(gpu_peer.one_token, inputs, kk, rate, part) for part in parts]
    return gpu_peer.microseconds(partial(bench.replayed_seconds, steps))


def prefill_rows(bench: Bench) -> Iterator[Row]:
    """Prompts of equal and of unequal lengths, without gradients."""
    heads, size = (2, 16) if bench.is_tiny else (64, 64)
    if bench.is_tiny:
        shapes: tuple[tuple[int, ...], ...] = ((20,), (3, 7))
    else:
        shapes = ((512,), (4096,), (512,) * 8, tuple(range(16, 528, 16)))
    for lengths in shapes:
        num_tokens = sum(lengths)
        pool = torch.zeros(len(lengths), heads, size, size, device=bench.device)
        slots = torch.arange(len(lengths), device=bench.device)
        batch = Batch(lengths, slots, slots)
        row: Row = {"name": "prompts", "sequences": len(lengths), "tokens": num_tokens,
                    "longest": max(lengths), "heads": heads}  # fmt: skip
        with torch.no_grad():
            mixing = time_mix_inputs(bench, num_tokens, heads, size)
            seconds = bench.seconds(partial(bench.kernels.time_mix, *mixing, batch, pool))
            row["time_mix_us"] = seconds * 1e6
            inputs = wkv_inputs(bench, num_tokens, heads, size, torch.float32)
            seconds = bench.seconds(partial(_wkv_of(bench), inputs, batch, pool))
            moved = sum(x.nbytes for x in inputs) + inputs[0].nbytes + 2 * pool.nbytes
            row |= {"wkv_us": seconds * 1e6, "share_of_copy": bench.share_of_copy(moved, seconds)}
            if gpu_peer.has_fla(bench):
                halves = wkv_inputs(bench, num_tokens, heads, size, bench.dtype)
                theirs = partial(gpu_peer.chunked, halves, pool, lengths)
                row["fla_us"] = gpu_peer.microseconds(partial(bench.seconds, theirs))
        yield row


def wkv_rows(bench: Bench) -> Iterator[Row]:
    """Training's share of a layer, forward and backward: the recurrence, and the time mix."""
    batch_size, length, heads, size = (2, 20, 2, 16) if bench.is_tiny else (8, 4096, 64, 64)
    shape, lengths = [batch_size, length, heads], (length,) * batch_size
    num_tokens = batch_size * length
    slots = torch.zeros(batch_size, dtype=torch.int64, device=bench.device)
    pool = torch.zeros(1, heads, size, size, device=bench.device)
    batch = Batch(lengths, slots, slots)

    inputs = wkv_inputs(bench, num_tokens, heads, size, torch.float32)
    _track(inputs)
    seconds = bench.seconds(_both_ways(partial(_wkv_of(bench), inputs, batch, pool), inputs), 5)
    yield {"name": "wkv, forward + backward", "shape": shape, "ms": seconds * 1e3}
    if gpu_peer.has_fla(bench):
        inputs = wkv_inputs(bench, num_tokens, heads, size, bench.dtype)
        _track(inputs)
        theirs = partial(gpu_peer.chunked, inputs, None, lengths)
        took = gpu_peer.microseconds(partial(bench.seconds, _both_ways(theirs, inputs), 5))
        yield {"name": "wkv, forward + backward, fla", "shape": shape,
               "ms": took / 1e3 if isinstance(took, float) else took,
               "version": gpu_peer.fla_version()}  # fmt: skip
    del inputs
    rows, weights = time_mix_inputs(bench, num_tokens, heads, size)
    leaves = tuple(getattr(rows, field.name) for field in fields(rows))
    _track(leaves)
    ours = partial(bench.kernels.time_mix, rows, weights, batch, pool)
    seconds = bench.seconds(_both_ways(ours, leaves), 5)
    yield {"name": "time mix, forward + backward", "shape": shape, "ms": seconds * 1e3}


def _track(tensors: tuple[Tensor, ...]) -> None:
    for tensor in tensors:
        tensor.requires_grad_(True)


def _both_ways(forward: Callable[[], Tensor], inputs: tuple[Tensor, ...]) -> Callable[[], object]:
    def run() -> object:
        y = forward()
        return torch.autograd.grad(y, inputs, torch.ones_like(y))

    return run


def _wkv_of(bench: Bench) -> Callable[[Inputs, Batch, Tensor], Tensor]:
    """y of the recurrence; without gradients, states go back to the pool."""
    if bench.kernels is reference:
        return _reference_wkv
    from engine.kernels.gpu.packed import PackedRows
    from engine.kernels.gpu.wkv import prefill, wkv7

    def compute(inputs: Inputs, batch: Batch, pool: Tensor) -> Tensor:
        rows = PackedRows.of_batch(batch)
        if torch.is_grad_enabled():
            return wkv7(inputs, rows, pool[batch.src_slot])[0]
        return prefill(inputs, rows, pool, batch.src_slot, pool, batch.dst_slot)

    return compute


def _reference_wkv(inputs: Inputs, batch: Batch, pool: Tensor) -> Tensor:
    y, last = reference.wkv7(*inputs, batch.lengths, pool[batch.src_slot])
    if not torch.is_grad_enabled():
        pool[batch.dst_slot] = last
    return y


def wkv_inputs(bench: Bench, num_tokens: int, heads: int, size: int, dtype: torch.dtype) -> Inputs:
    """As the model gives them: a normalised key to forget by, and a rate between 0 and 1."""
    r, d, k, v, kk, rate = (
        torch.randn(num_tokens, heads, size, device=bench.device) for _ in range(6)
    )
    kk = F.normalize(kk, dim=-1)
    inputs = r, reference.log_decay(d), k, v, -kk, kk * rate.sigmoid()
    r, lw, k, v, a, b = (x.to(dtype) for x in inputs)
    return r, lw, k, v, a, b


def time_mix_inputs(
    bench: Bench, num_tokens: int, heads: int, size: int
) -> tuple[TimeMixRows, TimeMixWeights]:
    width = heads * size
    rows = TimeMixRows(**{f.name: bench.randn(num_tokens, width) for f in fields(TimeMixRows)})
    shapes = {f.name: (width,) for f in fields(TimeMixWeights)} | {"r_k": (heads, size)}
    return rows, TimeMixWeights(**{name: bench.randn(*shape) for name, shape in shapes.items()})
