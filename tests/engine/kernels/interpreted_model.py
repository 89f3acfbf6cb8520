"""The whole model with the GPU's kernels and with the reference; `test_triton` runs this file."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from config import ModelConfig
from engine.kernels import reference
from engine.kernels.backend import Batch
from engine.kernels.gpu import backend as gpu
from engine.model.weights import dummy_model


def error(got: Tensor, expected: Tensor) -> float:
    assert torch.isfinite(got).all()
    return float((got.double() - expected).norm() / expected.norm())


@torch.inference_mode()
def test_model_computes_the_same_with_either_backend() -> None:
    """Prompts of several lengths, then single tokens, in slots of their own."""
    shape = dict(num_cells=2, vocab_size=50, embedded_dim=32, num_heads=2)
    model = dummy_model(ModelConfig(name="test", **shape), "cpu", torch.float64)
    tokens = torch.randint(0, 50, (14,), generator=torch.manual_seed(1))
    slots = torch.tensor([4, 1, 2])
    results = []
    for model.kernels in (reference, gpu):
        state = model.new_state(5, "cpu")
        hidden = [model(tokens[:8], Batch((1, 5, 2), torch.zeros_like(slots), slots), state)]
        hidden += [
            model(part, Batch((1, 1, 1), slots, slots), state) for part in tokens[8:].split(3)
        ]
        results.append((torch.cat(hidden), state.wkv, state.shift))
    for expected, got in zip(*results, strict=True):
        assert error(got, expected) < 1e-12


@pytest.mark.parametrize("lengths", [(3, 3), (3, 1, 2)])
def test_model_has_the_same_gradients_with_either_backend(lengths: tuple[int, ...]) -> None:
    shape = dict(num_cells=2, vocab_size=50, embedded_dim=32, num_heads=2)
    model = dummy_model(ModelConfig(name="test", **shape), "cpu", torch.float32)
    model.requires_grad_()
    tokens = torch.randint(0, 50, (6,), generator=torch.manual_seed(1))
    slots = torch.zeros(len(lengths), dtype=torch.int64)
    results = []
    for model.kernels in (reference, gpu):
        model.zero_grad()
        state = model.new_state(1, "cpu")
        model(tokens, Batch(lengths, slots, slots), state).square().sum().backward()
        results.append([p.grad for p in model.parameters() if p.grad is not None])
        assert not state.wkv.any()
        assert not state.shift.any()
    assert len(results[0]) == len(results[1]) > 40
    # Both in float32; the sums of two layers' gradients are made in another order.
    for expected, got in zip(*results, strict=True):
        assert float((got - expected).norm()) <= 2e-5 * float(expected.norm()) + 1e-7
