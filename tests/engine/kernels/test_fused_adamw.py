"""AdamW on a CPU against the specification in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from engine.kernels import optimizer, reference
from engine.kernels.optimizer import AdamWStep

TOLERANCE = 1e-6  # of float32, relative to the whole: a few roundings per value


def step(number: int, weight_decay: float = 0.1) -> AdamWStep:
    return AdamWStep(
        learning_rate=0.02, weight_decay=weight_decay, beta1=0.9, beta2=0.99, eps=1e-18,
        number=number,
    )  # fmt: skip


def buffers(size: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(size)
    weights, grads = (torch.randn(size, generator=generator).to(dtype) for _ in range(2))
    return weights, grads, torch.zeros_like(weights), torch.zeros_like(weights)


def error_of(got: Tensor, exact: Tensor) -> float:
    return float((got - exact).norm() / exact.norm())


@pytest.mark.parametrize("size", [1, 64, 2**18 + 1001])
@pytest.mark.parametrize("scale", [1.0, 0.3])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_steps_equal_float64(size: int, scale: float, weight_decay: float) -> None:
    ours, exact = list(buffers(size)), [x.double() for x in buffers(size)]
    factor = torch.tensor(scale)
    for number in (1, 2, 300):
        gradient = torch.randn(size, generator=torch.Generator().manual_seed(number))
        ours[1].copy_(gradient)
        exact[1].copy_(gradient)
        before = exact[0].clone()
        reference.adamw(*ours, factor, step(number, weight_decay))
        optimizer.adamw(*exact, factor.double(), step(number, weight_decay))
        assert torch.equal(ours[1], gradient)
        for i in (0, 2, 3):
            assert error_of(ours[i], exact[i]) < TOLERANCE, (number, i)
        assert error_of(ours[0] - before, exact[0] - before) < 1e-5, number


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nan_as_factor_changes_nothing(dtype: torch.dtype) -> None:
    ours, before = buffers(100, dtype), buffers(100, dtype)
    reference.adamw(*ours, torch.tensor(math.nan), step(1))
    assert all(torch.equal(a, b) for a, b in zip(ours, before, strict=True))


def test_other_types_are_left_to_the_specification() -> None:
    ours, exact = buffers(100, torch.float64), buffers(100, torch.float64)
    factor = torch.tensor(0.3, dtype=torch.float64)
    reference.adamw(*ours, factor, step(1))
    optimizer.adamw(*exact, factor, step(1))
    assert all(torch.equal(a, b) for a, b in zip(ours, exact, strict=True))


def test_the_same_ranges_give_the_same_bits_in_other_memory() -> None:
    """As a resumed run has it: nothing depends on where buffers begin."""
    one = buffers(1003)
    other = tuple(torch.cat([torch.zeros(1), x])[1:] for x in one)
    for number in (1, 2):
        for each in (one, other):
            reference.adamw(*each, torch.tensor(0.7), step(number))
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
