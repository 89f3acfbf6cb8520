"""Are the kernels of the chosen backend right on this device.

Right is what the reference gives in float64 for the same inputs. Errors are relative to the whole,
in the 2-norm; the tolerance is what the type of the inputs, in which results are kept, allows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, replace
from typing import TypeVar

import torch
from torch import Tensor

from benchmarks.gpu_device import Bench, CallingRecorder, Row
from benchmarks.gpu_kernels import time_mix_inputs
from benchmarks.gpu_lora import lora_inputs
from benchmarks.gpu_model import Decoding, random_model
from benchmarks.gpu_sampler import agreement
from engine.kernels import reference
from engine.kernels.backend import Backend, Batch, TimeMixRows, TimeMixWeights
from engine.kernels.optimizer import AdamWStep
from engine.model.quantize import quantize

TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 3e-2, torch.float16: 4e-3}  # tf32 in chunks

Tensors = TypeVar("Tensors", TimeMixRows, TimeMixWeights)


def correctness_rows(bench: Bench) -> Iterator[Row]:
    """A check that raises is a row as well, and the others go on."""
    tolerance = TOLERANCE[bench.dtype]
    checks: tuple[tuple[str, Callable[[], float], float], ...] = (
        ("norm mix, one token", lambda: norm_mix_error(bench, (1,) * 5, 6), tolerance),
        ("norm mix, ragged", lambda: norm_mix_error(bench, (17, 1, 40), 1), tolerance),
        ("norm mix, gradients", lambda: norm_mix_gradient_error(bench), tolerance),
        ("time mix, one token", lambda: time_mix_error(bench, (1,) * 5), tolerance),
        ("time mix, ragged", lambda: time_mix_error(bench, (17, 1, 40)), tolerance),
        ("time mix, one token again and again", lambda: repeated_token_error(bench), tolerance),
        ("time mix, gradients", lambda: time_mix_gradient_error(bench), tolerance),
        ("low-rank products", lambda: lora_error(bench), tolerance),
        ("channel mix", lambda: channel_mix_error(bench), tolerance),
        ("int8, 5 rows", lambda: int8_error(bench, 5), tolerance),
        ("int8, 300 rows", lambda: int8_error(bench, 300), tolerance),
        ("cross-entropy and gradients", lambda: cross_entropy_error(bench), tolerance),
        ("clip and AdamW", lambda: adamw_error(bench), 1e-5),
        ("sampler, draws unlike the host's", lambda: 1 - agreement(bench), 0.02),
        ("graphs and steps from Python", lambda: graph_error(bench), tolerance),
    )
    for name, check, limit in checks:
        try:
            error = check()
        except Exception as problem:
            reason = f"{type(problem).__name__}: {problem}".splitlines()[0]
            yield {"name": name, "failed": reason}
        else:
            yield {"name": name, "error": error, "tolerance": limit, "is_right": error < limit}


def norm_mix_inputs(bench: Bench, num_tokens: int, num_ways: int) -> tuple[Tensor, ...]:
    """x, weight, bias and the mus."""
    width = 64 if bench.is_tiny else 4096
    x, weight, bias = bench.randn(num_tokens, width), bench.randn(width), bench.randn(width)
    return x, weight, bias, *bench.randn(num_ways, width).unbind()


@torch.no_grad()
def lora_error(bench: Bench) -> float:
    x, weights = lora_inputs(bench, 5, 320, (96, 33, 32, 160))
    exact = replace(weights, **{f.name: getattr(weights, f.name).double() for f in fields(weights)})
    wanted = reference.lora(*(rows.double() for rows in x), exact)
    pairs = zip(bench.kernels.lora(*x, weights), wanted, strict=True)
    return max(_error(y, z) for y, z in pairs if y is not None and z is not None)


@torch.no_grad()
def norm_mix_error(bench: Bench, lengths: tuple[int, ...], num_ways: int) -> float:
    tensors = norm_mix_inputs(bench, sum(lengths), num_ways)
    batch, pool = _batch(bench, lengths), bench.randn(len(lengths), tensors[0].shape[1])
    x, weight, bias, *mus = [tensor.double() for tensor in tensors]
    exact = pool.double()
    wanted = reference.norm_mix(x, weight, bias, mus, batch, exact)
    x, weight, bias, *mus = tensors
    got = bench.kernels.norm_mix(x, weight, bias, mus, batch, pool)
    return max(_error(got, wanted), _error(pool, exact))


def norm_mix_gradient_error(bench: Bench) -> float:
    tensors = norm_mix_inputs(bench, 120, 6)
    batch, pool = _batch(bench, (60, 60)), torch.zeros_like(tensors[0][:2])

    def gradients(kernels: Backend, values: Sequence[Tensor]) -> tuple[Tensor, ...]:
        leaves = [value.detach().requires_grad_(True) for value in values]
        x, weight, bias, *mus = leaves
        y = kernels.norm_mix(x, weight, bias, mus, batch, pool.to(x.dtype))
        return torch.autograd.grad(y, leaves, _ramp(y))

    wanted = gradients(reference, [tensor.double() for tensor in tensors])
    return max(map(_error, gradients(bench.kernels, tensors), wanted))


@torch.no_grad()
def time_mix_error(
    bench: Bench, lengths: tuple[int, ...], rows: TimeMixRows | None = None
) -> float:
    heads, size = 2, 64
    drawn, weights = time_mix_inputs(bench, sum(lengths), heads, size)
    rows, batch = rows or drawn, _batch(bench, lengths)
    pool = torch.randn(len(lengths), heads, size, size, device=bench.device)
    exact = pool.double()
    wanted = reference.time_mix(_double(rows), _double(weights), batch, exact)
    got = bench.kernels.time_mix(rows, weights, batch, pool)
    return max(_error(got, wanted), _error(pool, exact))


def repeated_token_error(bench: Bench) -> float:
    """The same key over and over is where inverting a chunk by doubling products overflows."""
    rows, _ = time_mix_inputs(bench, 100, 2, 64)
    again = {f.name: getattr(rows, f.name)[:1].repeat(100, 1) for f in fields(rows)}
    return time_mix_error(bench, (100,), replace(rows, **again))


def time_mix_gradient_error(bench: Bench) -> float:
    heads, size, lengths = 2, 64, (40, 40)
    rows, weights = time_mix_inputs(bench, sum(lengths), heads, size)
    batch = _batch(bench, lengths)
    pool = torch.zeros(2, heads, size, size, device=bench.device)

    def gradients(kernels: Backend, given: TimeMixRows, with_: TimeMixWeights) -> list[Tensor]:
        parts = (given, with_)
        leaves = [
            getattr(part, f.name).detach().requires_grad_(True)
            for part in parts
            for f in fields(part)
        ]
        names = [f.name for f in fields(given)]
        given = TimeMixRows(**dict(zip(names, leaves, strict=False)))
        with_ = TimeMixWeights(
            **dict(zip([f.name for f in fields(with_)], leaves[len(names) :], strict=True))
        )
        y = kernels.time_mix(
            given, with_, batch, pool.to(torch.promote_types(given.r.dtype, pool.dtype))
        )
        return list(torch.autograd.grad(y, leaves, _ramp(y)))

    wanted = gradients(reference, _double(rows), _double(weights))
    return max(map(_error, gradients(bench.kernels, rows, weights), wanted))


@torch.no_grad()
def channel_mix_error(bench: Bench) -> float:
    width = 64 if bench.is_tiny else 1024
    hidden, value = bench.randn(7, 4 * width), bench.randn(width, 4 * width)
    wanted = reference.channel_mix(hidden.double(), value.double())
    return _error(bench.kernels.channel_mix(hidden, value), wanted)


@torch.no_grad()
def int8_error(bench: Bench, num_rows: int) -> float:
    """Of the product and of the channel mix, not of rounding weights to int8."""
    width = 128 if bench.is_tiny else 1024
    x = bench.randn(num_rows, 4 * width)
    weight, scale = quantize(bench.randn(width, 4 * width), bench.device)
    return max(
        _error(getattr(bench.kernels, name)(x, weight, scale),
               getattr(reference, name)(x.double(), weight, scale))
        for name in ("int8_linear", "int8_channel_mix")
    )  # fmt: skip


def cross_entropy_error(bench: Bench) -> float:
    rows, width, vocab = (4, 16, 100) if bench.is_tiny else (600, 768, 65536)
    hidden, weight = bench.randn(rows, width), bench.randn(vocab, width) * width**-0.5
    targets = bench.tokens(vocab, rows)

    def run(kernels: Backend, x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        x, w = x.detach().requires_grad_(True), w.detach().requires_grad_(True)
        loss = kernels.cross_entropy_l2wrap(x, w, targets)
        return loss.detach(), *torch.autograd.grad(loss, (x, w))

    got = run(bench.kernels, hidden, weight)
    wanted = run(reference, hidden.double(), weight.double())
    return max(map(_error, got, wanted))


def adamw_error(bench: Bench) -> float:
    ours = [torch.randn(100_003, device=bench.device) for _ in range(2)]
    ours += [torch.zeros_like(ours[0]) for _ in range(2)]
    exact = [x.double() for x in ours]
    step = AdamWStep(
        learning_rate=0.01, weight_decay=0.1, beta1=0.9, beta2=0.99, eps=1e-18, number=1
    )
    for kernels, (weights, grads, m, v) in ((bench.kernels, ours), (reference, exact)):
        factor, _ = kernels.clip_factor(grads, grads[:1].sum(), 1.0)
        kernels.adamw(weights, grads, m, v, factor, step)
    del ours[1], exact[1]  # gradients may be scaled in place or not
    return max(map(_error, ours, exact))


@torch.inference_mode()
def graph_error(bench: Bench) -> float:
    """Logits and states after two steps of three rows, which leave a row of padding."""
    model = random_model(bench, "tiny" if bench.is_tiny else "0.1b")
    found = []
    for recorder in (bench.recorder(), CallingRecorder()):
        torch.manual_seed(5)
        decoding = Decoding(bench, model, 4, recorder=recorder, draws=False)
        rows = decoding.rows_of(range(1, 4))
        for _ in range(2):
            decoding.graphs.to_logits(rows)
        found.append((decoding.graphs.logits[:3].clone(), decoding.storage.state.wkv.clone()))
    return max(map(_error, *found))


def _batch(bench: Bench, lengths: tuple[int, ...]) -> Batch:
    slots = torch.arange(len(lengths), device=bench.device)
    return Batch(lengths, slots, slots)


def _double(tensors: Tensors) -> Tensors:
    return replace(tensors, **{f.name: getattr(tensors, f.name).double() for f in fields(tensors)})


def _ramp(like: Tensor) -> Tensor:
    """A gradient that is not the same everywhere, and in every type the same."""
    values = torch.linspace(-1, 1, 16, device=like.device).repeat(-(-like.numel() // 16))
    return values[: like.numel()].view(like.shape).bfloat16().to(like.dtype)


def _error(got: Tensor, wanted: Tensor) -> float:
    return float((got.double() - wanted).norm() / wanted.double().norm())
