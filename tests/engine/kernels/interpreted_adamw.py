"""Clipping and AdamW against float64. `test_triton` runs this file interpreted."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from engine.kernels import optimizer
from engine.kernels.gpu import adamw as gpu
from engine.kernels.optimizer import AdamWStep

TOLERANCE = 1e-6  # of float32, relative to the whole: a few roundings per value
Buffers = tuple[Tensor, Tensor, Tensor, Tensor]


def step(number: int, weight_decay: float = 0.1) -> AdamWStep:
    return AdamWStep(
        learning_rate=0.02, weight_decay=weight_decay, beta1=0.9, beta2=0.99, eps=1e-18,
        number=number,
    )  # fmt: skip


def buffers(size: int) -> Buffers:
    generator = torch.Generator().manual_seed(size)
    weights, grads = (torch.randn(size, generator=generator) for _ in range(2))
    return weights, grads, torch.zeros(size), torch.zeros(size)


def error(got: Tensor, wanted: Tensor) -> float:
    return float((got.double() - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("size", [1, 64, 1024, 2500])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_steps_equal_float64(size: int, weight_decay: float) -> None:
    ours = buffers(size)
    exact = tuple(x.double() for x in ours)
    factor = torch.tensor(0.25)
    for number in (1, 2, 3):
        gpu.adamw(*ours, factor, step(number, weight_decay))
        optimizer.adamw(*exact, factor.double(), step(number, weight_decay))
        for x in (ours[1], exact[1]):
            x *= -0.5
    assert max(error(a, b) for a, b in zip(ours, exact, strict=True)) < TOLERANCE


def test_tiny_gradients_move_weights_as_any_other() -> None:
    weights, grads, *moments = buffers(64)
    before = weights.clone()
    gpu.adamw(weights, grads.fill_(1e-12), *moments, torch.tensor(1.0), step(1, 0.0))
    torch.testing.assert_close(before - weights, torch.full((64,), 0.02), rtol=1e-4, atol=0)


def test_nan_as_factor_changes_nothing() -> None:
    ours = buffers(100)
    before = [x.clone() for x in ours]
    gpu.adamw(*ours, torch.tensor(math.nan), step(1))
    assert all(torch.equal(a, b) for a, b in zip(ours, before, strict=True))


def test_only_the_range_of_a_group_is_written() -> None:
    whole = buffers(300)
    before = [x.clone() for x in whole]
    weights, grads, m, v = (x[64:164] for x in whole)
    gpu.adamw(weights, grads, m, v, torch.tensor(1.0), step(1))
    for now, old in zip(whole, before, strict=True):
        changed = (now != old).nonzero().flatten().tolist()
        assert set(changed) <= set(range(64, 164))
    assert (weights != before[0][64:164]).all()


@pytest.mark.parametrize("size", [1, 1000, 2500])
@pytest.mark.parametrize("max_norm", [0.5, 1e6])
def test_factor_and_norm_equal_float64(
    size: int, max_norm: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "NUM_PARTIALS", 2)  # several rounds each
    monkeypatch.setattr(gpu, "BLOCK", 256)
    grads = buffers(size)[1]
    factor, norm = gpu.clip_factor(grads, torch.tensor(1.5), max_norm)
    wanted = optimizer.clip_factor(grads.double(), torch.tensor(1.5).double(), max_norm)
    assert [factor.item(), norm.item()] == pytest.approx([x.item() for x in wanted], rel=TOLERANCE)
    again = gpu.clip_factor(grads, torch.tensor(1.5), max_norm)
    assert torch.equal(again[1], norm)


@pytest.mark.filterwarnings("ignore:invalid value", "ignore:overflow")  # numpy's
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_what_is_not_finite_gives_nan(
    bad: float, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "NUM_PARTIALS", 2)
    grads, loss = torch.ones(100), torch.tensor(1.0)
    (loss if where == "loss" else grads[7]).fill_(bad)
    factor, norm = gpu.clip_factor(grads, loss, 1.0)
    assert factor.isnan()
    assert norm.isfinite() == (where == "loss")
