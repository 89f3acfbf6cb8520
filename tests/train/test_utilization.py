"""The arithmetic of a training step, counted by hand and by torch."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import cast

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from engine.kernels import reference
from engine.kernels.backend import Backend, Batch, TimeMixRows, TimeMixWeights
from tests.train.runs import TINY, tiny_model
from train.init import init_weights
from train.utilization import PEAK_BF16_TFLOP_PER_S, peak_tokens_per_s, training_flop_per_token


def test_arithmetic_is_that_counted_by_hand() -> None:
    """Two layers of 32 channels in heads of 16, 128 in the channel mix, ranks of 8, 40 tokens."""
    model = tiny_model()
    assert (model.dims.ffn_dim, model.dims.head_size) == (128, 16)
    square, down, up = 32 * 32, 32 * 128, 128 * 32
    low_rank = 32 * 8 + 8 * 32
    first = 4 * square + 3 * low_rank + down + up
    second = 4 * square + 4 * low_rank + down + up
    head = 32 * 40
    recurrence = 2 * (2 * 16 * 16) * 9  # layers, heads of 16 x 16, each element
    assert training_flop_per_token(model) == 6 * (first + second + head) + 3 * recurrence


def test_products_are_those_that_torch_counts() -> None:
    """Of forward and backward, the recurrence put aside."""

    def without_recurrence(
        rows: TimeMixRows, _weights: TimeMixWeights, _batch: Batch, _pool: Tensor
    ) -> Tensor:
        parts = (rows.r, rows.k, rows.v, rows.d, rows.a, rows.g, rows.m)
        return torch.stack([x for x in parts if x is not None]).sum(0)

    model = tiny_model(dataclasses.replace(TINY, num_cells=3))
    init_weights(model, 0)
    functions = {**vars(reference), "time_mix": without_recurrence}
    model.kernels = cast(Backend, SimpleNamespace(**functions))
    tokens = torch.randint(0, 40, (2, 9), generator=torch.Generator().manual_seed(0))
    with FlopCounterMode(display=False) as counter:
        hidden = model.hidden(tokens[:, :-1]).flatten(0, 1)
        loss = model.kernels.cross_entropy_l2wrap(
            hidden, model.head.weight, tokens[:, 1:].flatten()
        )
        loss.backward()
    recurrence = 3 * 9 * 3 * 2 * 16 * 16
    assert counter.get_total_flops() == 16 * (training_flop_per_token(model) - recurrence)


def test_the_peak_is_of_a_known_gpu_in_bf16_only(monkeypatch: pytest.MonkeyPatch) -> None:
    model, gpu = tiny_model(), torch.device("cuda")
    names = iter(["NVIDIA H100 80GB HBM3", "NVIDIA H100 80GB HBM3 MIG 1g.10gb"])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _device: next(names))
    at_peak = PEAK_BF16_TFLOP_PER_S["NVIDIA H100 80GB HBM3"] * 1e12
    found = peak_tokens_per_s(model, gpu, "bfloat16")
    assert found is not None
    assert found * training_flop_per_token(model) == pytest.approx(at_peak)
    assert peak_tokens_per_s(model, gpu, "bfloat16") is None
    assert peak_tokens_per_s(model, gpu, "float32") is None
    assert peak_tokens_per_s(model, torch.device("cpu"), "bfloat16") is None
