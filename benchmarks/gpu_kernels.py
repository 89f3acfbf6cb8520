"""Kernels of the chosen backend: are they right on this device, and how long they take.

Right is what the reference gives in float64. Tolerances are relative to the whole, in the 2-norm.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, replace

import torch
from torch import Tensor

from benchmarks.gpu_device import Bench, Row
from engine.kernels import reference
from engine.kernels.backend import Backend, Batch, TimeMixRows, TimeMixWeights
from engine.kernels.optimizer import AdamWStep

TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 3e-2, torch.float16: 4e-3}  # tf32 in chunks


def correctness_rows(bench: Bench) -> Iterator[Row]:
    for what, check in (
        ("time mix, one token", lambda b: time_mix_error(b, (1,) * 5)),
        ("time mix, ragged", lambda b: time_mix_error(b, (17, 1, 40))),
        ("cross-entropy", cross_entropy_error),
        ("clip and AdamW", adamw_error),
    ):
        error, tolerance = check(bench)
        yield {"name": what, "error": error, "tolerance": tolerance, "is_right": error < tolerance}


def wkv_rows(bench: Bench) -> Iterator[Row]:
    """The time mix under autograd, forward and backward."""
    batch_size, length, heads, size = (2, 20, 2, 16) if bench.is_tiny else (8, 4096, 64, 64)
    rows, weights = time_mix_inputs(bench, batch_size * length, heads, size)
    names = [f.name for f in fields(TimeMixRows)]
    for name in names:
        getattr(rows, name).requires_grad_(True)
    slots = torch.zeros(batch_size, dtype=torch.int64, device=bench.device)
    pool = torch.zeros(1, heads, size, size, device=bench.device)

    def step() -> None:
        batch = Batch((length,) * batch_size, slots, slots)
        y = bench.kernels.time_mix(rows, weights, batch, pool)
        y.backward(torch.ones_like(y))

    shape = [batch_size, length, heads]
    yield {
        "name": "time mix, forward + backward",
        "shape": shape,
        "ms": bench.seconds(step, 5) * 1e3,
    }


def decode_rows(bench: Bench) -> Iterator[Row]:
    """The time mix of single tokens, beside the time that copying its states would take."""
    heads, size = (2, 16) if bench.is_tiny else (64, 64)
    for num_rows in (1, 4) if bench.is_tiny else (1, 8, 32, 128, 256, 512):
        rows, weights = time_mix_inputs(bench, num_rows, heads, size)
        pool = torch.zeros(num_rows, heads, size, size, device=bench.device)
        slots = torch.arange(num_rows, device=bench.device)
        batch = Batch((1,) * num_rows, slots, slots)
        with torch.no_grad():
            seconds = bench.seconds(
                lambda r=rows, w=weights, b=batch, p=pool: bench.kernels.time_mix(r, w, b, p)
            )
        share = 2 * pool.nbytes / bench.bytes_per_s / seconds if bench.bytes_per_s else None
        yield {"name": "time mix, one token", "rows": num_rows, "us": seconds * 1e6,
               "share_of_copy": share}  # fmt: skip


def time_mix_inputs(
    bench: Bench, num_tokens: int, heads: int, size: int
) -> tuple[TimeMixRows, TimeMixWeights]:
    width = heads * size
    rows = TimeMixRows(**{f.name: bench.randn(num_tokens, width) for f in fields(TimeMixRows)})
    shapes = {f.name: (width,) for f in fields(TimeMixWeights)} | {"r_k": (heads, size)}
    return rows, TimeMixWeights(**{name: bench.randn(*shape) for name, shape in shapes.items()})


@torch.no_grad()
def time_mix_error(bench: Bench, lengths: tuple[int, ...]) -> tuple[float, float]:
    heads, size = 2, 64
    rows, weights = time_mix_inputs(bench, sum(lengths), heads, size)
    slots = torch.arange(len(lengths), device=bench.device)
    batch = Batch(lengths, slots, slots)
    pool = torch.randn(len(lengths), heads, size, size, device=bench.device)
    exact = pool.double()
    exact_rows = replace(rows, **{f.name: getattr(rows, f.name).double() for f in fields(rows)})
    exact_weights = replace(
        weights, **{f.name: getattr(weights, f.name).double() for f in fields(weights)}
    )
    wanted = reference.time_mix(exact_rows, exact_weights, batch, exact)
    got = bench.kernels.time_mix(rows, weights, batch, pool)
    return max(_error(got, wanted), _error(pool, exact)), TOLERANCE[bench.dtype]


def cross_entropy_error(bench: Bench) -> tuple[float, float]:
    rows, width, vocab = (4, 16, 100) if bench.is_tiny else (600, 768, 65536)
    hidden, weight = bench.randn(rows, width), bench.randn(vocab, width) * width**-0.5
    targets = torch.randint(0, vocab, (rows,), device=bench.device)

    def run(kernels: Backend, x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        x, w = x.detach().requires_grad_(True), w.detach().requires_grad_(True)
        loss = kernels.cross_entropy_l2wrap(x, w, targets)
        return loss.detach(), *torch.autograd.grad(loss, (x, w))

    got = run(bench.kernels, hidden, weight)
    wanted = run(reference, hidden.double(), weight.double())
    return max(map(_error, got, wanted)), TOLERANCE[bench.dtype]


def adamw_error(bench: Bench) -> tuple[float, float]:
    ours = [torch.randn(100_003, device=bench.device) for _ in range(2)]
    ours += [torch.zeros_like(ours[0]) for _ in range(2)]
    exact = [x.double() for x in ours]
    step = AdamWStep(
        learning_rate=0.01, weight_decay=0.1, beta1=0.9, beta2=0.99, eps=1e-18, number=1
    )
    for kernels, (weights, grads, m, v) in ((bench.kernels, ours), (reference, exact)):
        factor, _ = kernels.clip_factor(grads, grads[:1].sum(), 1.0)
        kernels.adamw(weights, grads, m, v, factor, step)
    return max(map(_error, ours, exact)), 1e-5


def _error(got: Tensor, wanted: Tensor) -> float:
    return float((got.double() - wanted).norm() / wanted.norm())
