"""Squared ReLU and the channel mix; `test_triton` runs this file interpreted."""

from __future__ import annotations

import pytest
import torch

from engine.kernels import reference
from engine.kernels.gpu import backend as gpu
from engine.kernels.gpu.squared_relu import BLOCK, squared_relu


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1), (3, 80), (2, BLOCK // 2), (5, BLOCK // 4 + 1)])
def test_values_below_zero_vanish_and_others_are_squared(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    x = torch.randn(shape, generator=torch.manual_seed(1)).to(dtype)
    wanted = torch.where(x > 0, x.double() ** 2, 0.0).to(dtype)
    torch.testing.assert_close(squared_relu(x), wanted, rtol=torch.finfo(dtype).eps, atol=0)


def test_values_that_are_not_finite_are_seen_afterwards() -> None:
    x = torch.tensor([[torch.nan, torch.inf, -torch.inf, -0.0]])
    assert torch.equal(squared_relu(x).isnan(), x.isnan())
    assert squared_relu(x)[0, 1:].tolist() == [torch.inf, 0, 0]


def test_rows_that_are_not_contiguous_are_found() -> None:
    x = torch.randn(6, 8, generator=torch.manual_seed(1))[::2]
    assert torch.equal(squared_relu(x), reference.squared_relu(x))


@torch.no_grad()
def test_channel_mix_equals_the_reference() -> None:
    hidden, value = torch.randn(3, 64, dtype=torch.float64), torch.randn(16, 64).double()
    wanted = reference.channel_mix(hidden, value)
    assert torch.allclose(gpu.channel_mix(hidden, value), wanted, rtol=1e-13)


def test_channel_mix_has_gradients() -> None:
    hidden, value = torch.randn(3, 64, requires_grad=True), torch.randn(16, 64)
    (got,) = torch.autograd.grad(gpu.channel_mix(hidden, value).sum(), hidden)
    (wanted,) = torch.autograd.grad(reference.channel_mix(hidden, value).sum(), hidden)
    assert torch.equal(got, wanted)
