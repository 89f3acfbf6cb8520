"""The low-rank products against float64. `test_triton` runs this file interpreted."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch
from torch import Tensor

from engine.kernels import reference
from engine.kernels.backend import LoraWeights
from engine.kernels.gpu import backend as gpu
from engine.kernels.gpu.lora import MAX_ROWS, lora

# Relative error of the whole. Sums are float32; half types round the ranks, and the result.
TOLERANCE = {torch.float64: 1e-14, torch.float32: 1e-6, torch.float16: 2.0**-10}
RANKS = {"w": 5, "a": 16, "v": 33, "g": 70}  # no multiples of a tile, and several tiles


def draw(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def inputs(num_rows: int, width: int, dtype: torch.dtype) -> list[Tensor]:
    return list(draw(4, num_rows, width, seed=1).to(dtype))


def weights_of(width: int, dtype: torch.dtype, ranks: dict[str, int] = RANKS) -> LoraWeights:
    shapes = {f"{name}0": (width,) for name in "wav"}
    shapes |= {f"{name}1": (width, rank) for name, rank in ranks.items()}
    shapes |= {f"{name}2": (rank, width) for name, rank in ranks.items()}
    tensors = {name: draw(*shape, seed=ord(name[0])) for name, shape in shapes.items()}
    tensors |= {n: t / t.shape[0] ** 0.5 for n, t in tensors.items() if t.dim() == 2}
    return LoraWeights(**{name: tensor.to(dtype) for name, tensor in tensors.items()})


def exact(x: list[Tensor], weights: LoraWeights) -> list[Tensor]:
    """Without the reference, in float64, row by row and with tanh by its definition."""
    w = {f.name: getattr(weights, f.name).double() for f in fields(weights)}
    x_w, x_a, x_v, x_g = (rows.double().unsqueeze(-1) for rows in x)
    up, down = ((sign * (x_w * w["w1"]).sum(1)).exp() for sign in (1, -1))
    tanh = (up - down) / (up + down)
    gate = 1 / (1 + (-(x_g * w["g1"]).sum(1)).exp())
    rate, share = (x_a * w["a1"]).sum(1), (x_v * w["v1"]).sum(1)
    into = zip((tanh, rate, share, gate), "wavg", strict=True)
    out = [(h.unsqueeze(-1) * w[f"{name}2"]).sum(1) for h, name in into]
    return [out[0] + w["w0"], out[1] + w["a0"], out[2] + w["v0"], out[3]]


def check(got: tuple[Tensor | None, ...], expected: list[Tensor], tolerance: float) -> None:
    for y, wanted in zip(got, expected, strict=True):
        assert y is not None
        assert y.shape == wanted.shape
        assert torch.isfinite(y).all()
        assert float((y.double() - wanted).norm() / wanted.norm()) < tolerance


@torch.inference_mode()
@pytest.mark.parametrize(
    ("num_rows", "width", "dtype"),
    [
        (1, 32, torch.float16),
        (3, 140, torch.float32),
        (3, 40, torch.float64),
        (16, 48, torch.float16),
        (16, 64, torch.float32),
        (17, 48, torch.float16),
    ],
)
def test_products_equal_float64(num_rows: int, width: int, dtype: torch.dtype) -> None:
    x, weights = inputs(num_rows, width, dtype), weights_of(width, dtype)
    got = gpu.lora(*x, weights)
    assert all(y is not None and y.dtype == dtype for y in got)
    # torch, which computes 17 rows, rounds all that is between two operations.
    check(got, exact(x, weights), TOLERANCE[dtype] * (1 if num_rows <= MAX_ROWS else 4))


@torch.inference_mode()
@pytest.mark.parametrize("ranks", [(96, 96, 64, 480), (1, 1, 1, 1)])
def test_ranks_may_be_anything(ranks: tuple[int, ...]) -> None:
    x = inputs(2, 32, torch.float32)
    weights = weights_of(32, torch.float32, dict(zip("wavg", ranks, strict=True)))
    check(gpu.lora(*x, weights), exact(x, weights), TOLERANCE[torch.float32])


@torch.inference_mode()
def test_first_layer_has_no_residual_and_reads_no_weights_of_it() -> None:
    x, weights = inputs(3, 32, torch.float32), weights_of(32, torch.float32)
    nan = {name: torch.full_like(getattr(weights, name), torch.nan) for name in ("v0", "v1", "v2")}
    d, a, m, g = gpu.lora(x[0], x[1], None, x[3], replace(weights, **nan))
    assert m is None
    expected = exact(x, weights)
    check((d, a, g), [expected[i] for i in (0, 1, 3)], TOLERANCE[torch.float32])


@torch.inference_mode()
@pytest.mark.parametrize("num_parts", [1, 2, 9])
def test_sum_may_be_divided_anyhow_and_is_the_same_each_time(num_parts: int) -> None:
    """Three blocks of channels, the last of them short."""
    ranks = dict(zip("wavg", (3, 2, 4, 5), strict=True))
    x, weights = inputs(2, 260, torch.float32), weights_of(260, torch.float32, ranks)
    got = lora(*x, weights, num_parts=num_parts)
    check(got, exact(x, weights), TOLERANCE[torch.float32])
    if num_parts == 9:
        for y, again in zip(got, lora(*x, weights, num_parts=num_parts), strict=True):
            assert y is not None
            assert again is not None
            assert torch.equal(y, again)


@torch.inference_mode()
def test_row_depends_neither_on_others_nor_on_their_number() -> None:
    x, weights = inputs(9, 40, torch.float32), weights_of(40, torch.float32)
    alone = gpu.lora(*(rows[4:5] for rows in x), weights)
    for rows in x:
        rows[:4], rows[5:] = torch.nan, 1.0
    for y, wanted in zip(gpu.lora(*x, weights), alone, strict=True):
        assert y is not None
        assert wanted is not None
        assert torch.equal(y[4:5], wanted)


@torch.inference_mode()
@pytest.mark.parametrize("size", [1e-6, 10.0])
def test_activations_saturate_and_vanish(size: float) -> None:
    x = [rows * size for rows in inputs(2, 32, torch.float32)]
    weights = weights_of(32, torch.float32)
    doubles = (t.double() for t in x)
    wide = LoraWeights(**{f.name: getattr(weights, f.name).double() for f in fields(weights)})
    expected = [y for y in reference.lora(*doubles, wide) if y is not None]
    check(gpu.lora(*x, weights), expected, TOLERANCE[torch.float32])


@torch.inference_mode()
def test_inputs_may_be_strided() -> None:
    x, weights = inputs(3, 32, torch.float32), weights_of(32, torch.float32)
    expected = exact(x, weights)
    x = [torch.stack([rows, rows + 1], dim=1)[:, 0] for rows in x]
    transposed = replace(weights, w1=weights.w1.T.contiguous().T)
    check(gpu.lora(*x, transposed), expected, TOLERANCE[torch.float32])


def test_gradients_are_those_of_the_reference() -> None:
    x, weights = inputs(2, 32, torch.float64), weights_of(32, torch.float64)
    leaves = [*x, *(getattr(weights, f.name) for f in fields(weights))]
    for leaf in leaves:
        leaf.requires_grad_()
    found = []
    for backend in (reference, gpu):
        total = torch.stack([y.square().sum() for y in backend.lora(*x, weights) if y is not None])
        found.append(torch.autograd.grad(total.sum(), leaves))
    for expected, got in zip(*found, strict=True):
        assert torch.equal(got, expected)
