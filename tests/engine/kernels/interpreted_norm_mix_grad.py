"""Gradients of LayerNorm with token shift. `test_triton` runs this file interpreted."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from engine.kernels import reference
from engine.kernels.backend import Batch
from engine.kernels.gpu import backend as gpu
from engine.kernels.gpu import norm_mix_grad as kernels
from tests.engine.kernels.wkv_cases import relative_error

NAMES = ("x", "pool", "weight", "bias", *(f"mu {j}" for j in range(6)))
SRC = torch.tensor([2, 0, 2, 0, 1])  # some share a state
# Sums over all tokens of products in float32.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6}


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.manual_seed(seed), dtype=torch.float64)


def leaves_of(num_tokens: int, channels: int, ways: int) -> list[Tensor]:
    mus = draw(ways, 1, 1, channels, seed=4).unbind()
    vectors = draw(2, channels, seed=3).unbind()
    return [draw(num_tokens, channels, seed=1) + 1, draw(3, channels, seed=2), *vectors, *mus]


def gradients(module, leaves, lengths, d_out, dtype=torch.float64):  # type: ignore[no-untyped-def]
    leaves = [x.to(dtype, copy=True).requires_grad_() for x in leaves]
    x, pool, weight, bias, *mus = leaves
    batch = Batch(lengths, SRC[: len(lengths)], SRC[: len(lengths)])
    out = module.norm_mix(x, weight, bias, mus, batch, pool)
    return out, torch.autograd.grad(out, leaves, d_out.to(out.dtype))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("ways", [1, 6])
@pytest.mark.parametrize(("lengths", "channels"), [((3, 1, 2), 48), ((1, 1), 16)])
@pytest.mark.parametrize("max_runs", [1, 4])
def test_gradients_equal_autograds(  # type: ignore[no-untyped-def]
    lengths, channels, ways, dtype, max_runs, monkeypatch
) -> None:
    """Of rows, all parameters and the states before, which several sequences share."""
    monkeypatch.setattr(kernels, "MAX_RUNS", max_runs)
    leaves, d_out = (
        leaves_of(sum(lengths), channels, ways),
        draw(ways, sum(lengths), channels, seed=5),
    )
    wanted_out, wanted = gradients(reference, leaves, lengths, d_out)
    out, got = gradients(gpu, leaves, lengths, d_out, dtype)
    assert relative_error(out.detach(), wanted_out.detach()) < TOLERANCE[dtype]
    for name, one, two in zip(NAMES, got, wanted, strict=False):
        assert one.dtype == dtype
        assert one.shape == two.shape
        assert relative_error(one, two) < TOLERANCE[dtype], name


def test_gradients_equal_finite_differences() -> None:
    """Independent of the formulas in torch: only the forward kernel is differenced."""
    lengths, leaves, d_out = (1, 2), leaves_of(3, 16, 6), draw(6, 3, 16, seed=5)
    _, grads = gradients(gpu, leaves, lengths, d_out)

    def loss(values: list[Tensor]) -> float:
        x, pool, weight, bias, *mus = values
        batch = Batch(lengths, SRC[:2], SRC[:2])
        with torch.no_grad():
            out = gpu.norm_mix(x, weight, bias, mus, batch, pool.clone())
        return float((out * d_out).sum())

    for i, grad in enumerate(grads):
        direction = draw(*grad.shape, seed=i)
        ahead, behind = (
            loss([x + step * direction if j == i else x for j, x in enumerate(leaves)])
            for step in (1e-6, -1e-6)
        )
        assert (ahead - behind) / 2e-6 == pytest.approx(float((grad * direction).sum()), rel=1e-6)


def test_gradients_are_the_same_twice() -> None:
    leaves, d_out = leaves_of(9, 16, 6), draw(6, 9, 16, seed=5)
    (_, one), (_, two) = (gradients(gpu, leaves, (5, 4), d_out, torch.float32) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_training_writes_no_state() -> None:
    leaves = leaves_of(4, 16, 1)
    x, pool, weight, bias, mu = leaves
    before = pool.clone()
    slots = torch.tensor([1])
    gpu.norm_mix(x, weight, bias, [mu], Batch((4,), slots, slots), pool)
    assert torch.equal(pool, before)


def test_autocast_gives_rows_in_its_type_and_gradients_in_those_of_the_leaves() -> None:
    leaves, d_out = [x.float() for x in leaves_of(4, 16, 6)], draw(6, 4, 16, seed=5)
    _, wanted = gradients(reference, leaves, (4,), d_out)
    with torch.autocast("cpu", torch.float16):
        out, got = gradients(gpu, leaves, (4,), d_out, torch.float32)
    assert out.dtype == torch.float16
    for one, two in zip(got, wanted, strict=True):
        assert one.dtype == torch.float32
        assert relative_error(one, two) < 2.0**-10  # of gradients that came in 11 bits
