"""The int8 kernels against dequantized float64. `test_triton` runs this file interpreted."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from config import ModelConfig
from engine.kernels import reference
from engine.kernels.backend import Batch
from engine.kernels.gpu import backend as gpu
from engine.kernels.gpu.int8 import Launch, int8_linear, launch_of
from engine.model.quantize import quantize
from engine.model.weights import dummy_model

# Relative error of the whole. Products and sums are float32; half types are rounded at the end.
TOLERANCE = {torch.float32: 1e-6, torch.float16: 2.0**-11}
WHOLE = Launch(16, 32, groups_per_part=99, num_parts=1, num_warps=4, num_stages=1)


def draw(*shape: int) -> Tensor:
    generator = torch.manual_seed(shape[0])
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def matrix(num_outputs: int, num_inputs: int) -> tuple[Tensor, Tensor, Tensor]:
    """int8, scales, and the numbers they stand for in float64, made without the reference."""
    spread = torch.logspace(-2, 1, num_outputs, dtype=torch.float64).unsqueeze(1)
    weight, scale = quantize(draw(num_outputs, num_inputs) * spread, "cpu")
    exact = weight.double() * scale.double().repeat_interleave(64, dim=1)
    return weight, scale, exact


def error(got: Tensor, expected: Tensor) -> float:
    assert torch.isfinite(got).all()
    assert got.shape == expected.shape
    return float((got.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("num_rows", "num_outputs", "num_inputs"),
    [
        (1, 64, 64),
        (3, 100, 192),  # outputs no multiple of a tile
        (16, 37, 320),  # nor of anything
        (17, 130, 128),
        (65, 64, 64),
        (130, 200, 128),
        (520, 16, 64),
    ],
)
def test_kernel_equals_dequantized_float64(
    num_rows: int, num_outputs: int, num_inputs: int, dtype: torch.dtype
) -> None:
    weight, scale, exact = matrix(num_outputs, num_inputs)
    x = draw(num_rows, num_inputs).to(dtype)
    y = gpu.int8_linear(x, weight, scale)
    assert y.dtype == dtype
    assert error(y, x.double() @ exact.T) < TOLERANCE[dtype]


@pytest.mark.parametrize("groups_per_part", [1, 2, 3, 4, 5])
def test_sum_may_be_divided_anyhow_and_is_the_same_each_time(groups_per_part: int) -> None:
    """Five groups: also in parts of which the last is shorter."""
    weight, scale, exact = matrix(40, 320)
    x = draw(3, 320).float()
    parts = WHOLE._replace(groups_per_part=groups_per_part, num_parts=-(-5 // groups_per_part))
    y = int8_linear(x, weight, scale, launch=parts)
    assert error(y, x.double() @ exact.T) < TOLERANCE[torch.float32]
    assert torch.equal(y, int8_linear(x, weight, scale, launch=parts))


def test_rows_do_not_depend_on_their_batch() -> None:
    """Neither on what else is in it, nor on where they are in it."""
    weight, scale, _ = matrix(40, 128)
    x = draw(9, 128).float()
    how = launch_of(9, 40, 128)
    alone = int8_linear(x[4:5], weight, scale, launch=how)
    x_nan = x.clone()
    x_nan[:4] = torch.nan
    assert torch.equal(int8_linear(x, weight, scale, launch=how)[4:5], alone)
    assert torch.equal(int8_linear(x_nan, weight, scale, launch=how)[4:5], alone)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("num_rows", [1, 20])
def test_squared_relu_is_part_of_the_product(num_rows: int, dtype: torch.dtype) -> None:
    weight, scale, exact = matrix(50, 192)
    hidden = draw(num_rows, 192).to(dtype)
    y = gpu.int8_channel_mix(hidden, weight, scale)
    expected = hidden.double().clamp(min=0).square() @ exact.T
    # The square is rounded to the type of the rows before it is multiplied, as torch has it.
    assert error(y, expected) < 2 * TOLERANCE[dtype]
    assert error(y, reference.int8_channel_mix(hidden.double(), weight, scale)) < 2e-3


def test_extreme_weights_and_groups_of_zeros() -> None:
    weight, scale = torch.zeros(3, 128, dtype=torch.int8), torch.zeros(3, 2, dtype=torch.float16)
    weight[0], weight[1, 64:], weight[2] = 127, -127, 1
    scale[0], scale[1, 1], scale[2] = 65504.0, 2.0**-24, 1.0
    exact = weight.double() * scale.double().repeat_interleave(64, dim=1)
    x = draw(2, 128).float()
    y = int8_linear(x, weight, scale)
    for output in range(3):  # of sizes 14 digits apart
        assert error(y[:, output], x.double() @ exact[output]) < 2e-6


def test_rows_may_have_any_shape_and_strides() -> None:
    weight, scale, exact = matrix(20, 64)
    x = draw(4, 3, 64).float().transpose(0, 1)
    y = gpu.int8_linear(x, weight, scale)
    assert error(y, x.double() @ exact.T) < TOLERANCE[torch.float32]
    one = gpu.int8_linear(x[0, 0], weight, scale)
    assert error(one, x[0, 0].double() @ exact.T) < TOLERANCE[torch.float32]
    assert gpu.int8_linear(x[:0], weight, scale).shape == (0, 4, 20)


def test_outputs_may_lie_beyond_two_to_the_31_elements() -> None:
    """2 GiB of weights are asked for, but memory only comes with the first group of each row."""
    num_inputs = 2**25
    weight = torch.empty(66, num_inputs, dtype=torch.int8)
    scale = torch.empty(66, num_inputs // 64, dtype=torch.float16)
    assert 65 * num_inputs > 2**31
    x = torch.zeros(1, num_inputs)
    x[0, :64] = draw(64).abs().float()
    weight[:, :64], scale[:, 0] = 0, 0.5
    weight[65, :64] = 3
    first = WHOLE._replace(groups_per_part=1)
    y = int8_linear(x, weight, scale, launch=first)
    assert error(y[0, 65], 1.5 * x[0, :64].double().sum()) < TOLERANCE[torch.float32]
    assert not y[0, :65].any()


@torch.inference_mode()
def test_model_of_int8_computes_the_same_with_either_backend() -> None:
    """A prompt, then single tokens."""
    cfg = ModelConfig(name="test", num_cells=2, vocab_size=50, embedded_dim=64, num_heads=2)
    model = dummy_model(cfg, "cpu", torch.float32, is_int8=True)
    tokens = torch.randint(0, 50, (9,), generator=torch.manual_seed(1))
    slot = torch.tensor([1])
    results = []
    for model.kernels in (reference, gpu):
        state = model.new_state(2, "cpu")
        hidden = [model(tokens[:6], Batch((6,), torch.zeros_like(slot), slot), state)]
        hidden += [model(token, Batch((1,), slot, slot), state) for token in tokens[6:].split(1)]
        results.append((model.head(torch.cat(hidden)), state.wkv, state.shift))
    for expected, got in zip(*results, strict=True):
        assert error(got, expected.double()) < 1e-5
