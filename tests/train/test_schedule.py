"""The learning rate, against RWKV-LM's formula in tokens."""

from __future__ import annotations

import math

import pytest

from config.errors import ConfigError
from train.schedule import Schedule


def rwkv_lm(step: int, *, init: float, final: float, warmup: int, steps: int, tb: int) -> float:
    """RWKV-LM's train_callback, in tokens: one uninterrupted process."""
    tokens = (step - warmup) * tb
    progress = max(0.0, min(1.0, tokens / (steps * tb - warmup * tb)))
    factor = final / init
    rate = init * ((0.5 + factor / 2) + (0.5 - factor / 2) * math.cos(math.pi * progress))
    return rate * (0.01 + 0.99 * step / warmup) if step < warmup else rate


@pytest.mark.parametrize("step", [0, 1, 5, 9, 10, 11, 2520, 100_000, 182_888])
def test_equals_rwkv_lm_for_minipile(step: int) -> None:
    schedule = Schedule(start=6e-4, end=6e-5, warmup_steps=10, num_steps=182_889)
    expected = rwkv_lm(step, init=6e-4, final=6e-5, warmup=10, steps=182_889, tb=512 * 16)
    assert schedule.learning_rate(step) == pytest.approx(expected, rel=1e-12)


def test_known_points() -> None:
    schedule = Schedule(start=1.0, end=0.1, warmup_steps=100, num_steps=300)
    assert schedule.learning_rate(0) == pytest.approx(0.01)
    assert schedule.learning_rate(50) == pytest.approx(0.505)
    assert schedule.learning_rate(100) == pytest.approx(1.0)
    assert schedule.learning_rate(200) == pytest.approx(0.55)
    assert schedule.learning_rate(300) == pytest.approx(0.1)
    assert schedule.learning_rate(10_000) == pytest.approx(0.1)


def test_no_warm_up_starts_at_the_top() -> None:
    schedule = Schedule(start=1.0, end=0.0, warmup_steps=0, num_steps=10)
    assert schedule.learning_rate(0) == 1.0


def test_warm_up_of_the_whole_run_is_refused() -> None:
    with pytest.raises(ConfigError, match="warmup_steps = 10"):
        Schedule(start=1.0, end=0.1, warmup_steps=10, num_steps=10)
