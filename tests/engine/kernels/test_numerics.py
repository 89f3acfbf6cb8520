"""How the rounding of tensor cores is emulated, and that the kernels' choice loses little."""

from __future__ import annotations

import pytest
import torch

from tests.engine.kernels import numerics
from tests.engine.kernels.numerics import KERNELS, PRODUCTS, Precision, errors_of
from tests.engine.kernels.wkv_cases import EXTREME, KINDS, REPEATED, TYPICAL, relative_error

# y, state and the worst gradient. An operand of tf32 that is cut, and not rounded, is off by up to
# 2^-10 and by half of that on average, always towards zero: errors add up to a few times 1e-3.
# Where one token is repeated the terms of the gradient of b cancel, which in float32 loses a factor
# of 15 too.
BOUNDS = {
    TYPICAL: (3e-3, 3e-3, 6e-3),
    REPEATED: (3e-3, 3e-3, 4e-2),
    EXTREME: (3e-3, 3e-3, 6e-3),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_kernels_precision_keeps_its_bounds(kind: str) -> None:
    errors = errors_of(kind, KERNELS, num_tokens=64)
    assert all(0 < x < bound for x, bound in zip(errors, BOUNDS[kind], strict=True)), errors


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_would_not(kind: str) -> None:
    errors = errors_of(kind, Precision("bf16", "bf16"), num_tokens=64)
    assert any(x > bound for x, bound in zip(errors, BOUNDS[kind], strict=True)), errors


@pytest.mark.parametrize("kind", KINDS)
def test_float32_loses_next_to_nothing(kind: str) -> None:
    assert max(errors_of(kind, Precision("ieee", "ieee"), num_tokens=64)) < 1e-5


def test_tf32_has_ten_bits_after_the_first() -> None:
    last, tie = 2.0**-10, 2.0**-11
    x = torch.tensor([1 + tie, 1 + last + tie, -1 - last - tie, 1 + tie + 2.0**-23, 0.0, 2 - tie])
    assert numerics.tf32(x).tolist() == [1, 1 + 2 * last, -1 - 2 * last, 1 + last, 0, 2]
    assert numerics.cut_tf32(x).tolist() == [1, 1 + last, -1 - last, 1, 0, 2 - last]


@pytest.mark.parametrize(
    ("name", "least", "most"),
    [
        ("ieee", 0, 1e-6),
        ("tf32x3", 0, 2e-6),
        ("tf32", 1e-4, 2.0**-11),
        ("tf32 cut", 3e-4, 2.0**-9),
        ("bf16", 1e-3, 2.0**-8),
    ],
)
def test_products_are_as_exact_as_their_operands(name: str, least: float, most: float) -> None:
    x, y = torch.randn(2, 64, 64, generator=torch.manual_seed(1))
    assert least < relative_error(PRODUCTS[name](x, y), x.double() @ y.double()) < most
