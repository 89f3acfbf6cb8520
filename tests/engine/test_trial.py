"""A backend that is wrong or fails does not serve."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.kernels import reference
from engine.model.rwkv7 import RWKV7
from engine.trial import take_backend
from tests.engine.device import random_model

CPU = torch.device("cpu")


def backend_with(**functions: Any) -> Any:
    return SimpleNamespace(**{**vars(reference), **functions})


def taken(backend: Any, caplog: pytest.LogCaptureFixture) -> tuple[RWKV7, list[str]]:
    model = random_model()
    with caplog.at_level(logging.INFO, logger="engine.trial"):
        take_backend(model, backend, CPU)
    return model, caplog.messages


def test_a_backend_that_agrees_is_taken(caplog: pytest.LogCaptureFixture) -> None:
    backend = backend_with()
    model, messages = taken(backend, caplog)
    assert model.kernels is backend
    assert messages == []


def test_one_that_fails_is_not(caplog: pytest.LogCaptureFixture) -> None:
    def time_mix(*args: object) -> Tensor:
        raise RuntimeError("no kernel image\nfor this device")

    model, messages = taken(backend_with(time_mix=time_mix), caplog)
    assert model.kernels is reference
    assert messages == ["kernels: reference (trial failed with RuntimeError: no kernel image)"]


@pytest.mark.parametrize("harm", [lambda y: y * 1.5, lambda y: y * torch.nan], ids=["wrong", "nan"])
def test_one_that_computes_otherwise_is_not(harm: Any, caplog: pytest.LogCaptureFixture) -> None:
    def time_mix(*args: Any) -> Tensor:
        return harm(reference.time_mix(*args))

    model, messages = taken(backend_with(time_mix=time_mix), caplog)
    assert model.kernels is reference
    (message,) = messages
    assert message.startswith("kernels: reference (in a trial logits were off by ")


def test_a_state_that_is_left_wrong_is_seen_by_the_token_after(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def time_mix(rows: Any, weights: Any, batch: Any, pool: Tensor) -> Tensor:
        y = reference.time_mix(rows, weights, batch, pool)
        pool[batch.dst_slot] *= -1
        return y

    model, _ = taken(backend_with(time_mix=time_mix), caplog)
    assert model.kernels is reference
