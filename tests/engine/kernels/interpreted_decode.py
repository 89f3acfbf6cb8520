"""The decode kernel against the reference in float64. `test_triton` runs this file interpreted."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import TypeVar

import pytest
import torch
from torch import Tensor

from engine.kernels import reference
from engine.kernels.backend import Batch, TimeMixRows, TimeMixWeights
from engine.kernels.gpu import backend as gpu
from engine.kernels.gpu.decode import decode

Bundle = TypeVar("Bundle", TimeMixRows, TimeMixWeights)

NUM_HEADS, NUM_LAYERS, LAYER, NUM_SLOTS = 2, 2, 1, 7
# Relative error of the whole. In float32 sums of up to 64 products of rounded numbers.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-6}


def random_rows(num_rows: int, size: int, num_heads: int = NUM_HEADS) -> TimeMixRows:
    shape = (num_rows, num_heads * size)
    generator = torch.manual_seed(size)
    return TimeMixRows(**{f.name: draw(shape, generator) for f in fields(TimeMixRows)})


def random_weights(size: int, num_heads: int = NUM_HEADS) -> TimeMixWeights:
    generator = torch.manual_seed(size + 1)
    shapes = {f.name: (num_heads * size,) for f in fields(TimeMixWeights)}
    shapes["r_k"] = (num_heads, size)
    return TimeMixWeights(**{name: draw(shape, generator) for name, shape in shapes.items()})


def random_pool(size: int) -> Tensor:
    """A pool of all layers whose slot 0 is the zero page."""
    shape = (NUM_SLOTS, NUM_LAYERS, NUM_HEADS, size, size)
    pool = draw(shape, torch.manual_seed(size + 2))
    pool[0] = 0
    return pool


def draw(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def cast(bundle: Bundle, dtype: torch.dtype) -> Bundle:
    tensors = {f.name: getattr(bundle, f.name) for f in fields(bundle)}
    return replace(bundle, **{k: x if x is None else x.to(dtype) for k, x in tensors.items()})


def error(got: Tensor, expected: Tensor) -> float:
    assert torch.isfinite(got).all()
    return float((got.double() - expected).norm() / expected.norm())


@torch.no_grad()
def both(
    rows: TimeMixRows,
    weights: TimeMixWeights,
    pool: Tensor,
    src: list[int],
    dst: list[int],
    dtype: torch.dtype,
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """y and the pool afterwards, (by the kernel in `dtype`, by the reference in float64).

    Rows of negative dst are given to the kernel only, and their y is taken out.
    """
    real = [i for i, slot in enumerate(dst) if slot >= 0]
    batch = Batch((1,) * len(dst), torch.tensor(src), torch.tensor(dst))
    got_pool = pool.to(dtype, copy=True)
    got = gpu.time_mix(cast(rows, dtype), cast(weights, dtype), batch, got_pool[:, LAYER])
    batch = Batch((1,) * len(real), batch.src_slot[real], batch.dst_slot[real])
    picked = {f.name: getattr(rows, f.name) for f in fields(rows)}
    rows = replace(rows, **{k: x if x is None else x[real] for k, x in picked.items()})
    expected_pool = pool.clone()
    expected = reference.time_mix(rows, weights, batch, expected_pool[:, LAYER])
    return (got[real], got_pool), (expected, expected_pool)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("size", [16, 64])
@pytest.mark.parametrize(
    ("src", "dst"),
    [
        pytest.param([3], [3], id="in place"),
        pytest.param([5, 2, 6], [5, 1, 3], id="some move, one into a slot below"),
        pytest.param([0, 0, 4, 4], [1, 2, 3, 5], id="several from one, and from the zero page"),
        pytest.param([3, 1, 0], [-1, 1, -1], id="padding before and after"),
        pytest.param([-1, 6, -1, 2], [-1, 4, -1, 2], id="padding without a source"),
    ],
)
def test_kernel_equals_the_reference(
    src: list[int], dst: list[int], size: int, dtype: torch.dtype
) -> None:
    pool, rows = random_pool(size), random_rows(len(src), size)
    (y, after), (expected_y, expected) = both(rows, random_weights(size), pool, src, dst, dtype)
    assert error(y, expected_y) < TOLERANCE[dtype]
    written = [slot for slot in dst if slot >= 0]
    assert error(after[written, LAYER], expected[written, LAYER]) < TOLERANCE[dtype]
    changed = (after != pool.to(dtype)).flatten(2).any(-1).nonzero().tolist()
    assert changed == [[slot, LAYER] for slot in sorted(written)]


def test_first_layer_has_no_value_residual() -> None:
    rows = replace(random_rows(2, 16), v_first=None, m=None)
    got, expected = both(rows, random_weights(16), random_pool(16), [1, 2], [1, 3], torch.float64)
    assert error(got[0], expected[0]) < 1e-13
    assert error(got[1], expected[1]) < 1e-13


def test_padding_is_not_even_read() -> None:
    pool, rows = random_pool(16), random_rows(2, 16)
    pool[4] = torch.nan
    for f in fields(rows):
        getattr(rows, f.name)[1] = torch.nan
    (y, after), (expected, _) = both(rows, random_weights(16), pool, [2, 4], [2, -1], torch.float64)
    assert error(y, expected) < 1e-13
    assert not after[[0, 1, 2, 3, 5, 6]].isnan().any()


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # numpy's; sigmoid is then 0
@pytest.mark.parametrize("raw", [-1e4, -30.0, 30.0, 1e4])
def test_decay_and_rate_may_be_extreme(raw: float) -> None:
    rows = random_rows(2, 16)
    rows.d[0], rows.a[1] = raw, raw
    got, expected = both(rows, random_weights(16), random_pool(16), [1, 2], [1, 2], torch.float32)
    assert error(got[0], expected[0]) < TOLERANCE[torch.float32]
    assert error(got[1], expected[1]) < TOLERANCE[torch.float32]


def test_key_of_zeros_removes_and_adds_nothing() -> None:
    rows, pool = random_rows(1, 16), random_pool(16)
    rows.k.zero_()
    got, expected = both(rows, random_weights(16), pool, [1], [1], torch.float32)
    assert error(got[0], expected[0]) < TOLERANCE[torch.float32]
    decay = reference.log_decay(rows.d[0]).exp().view(NUM_HEADS, 16, 1)
    assert error(got[1][1, LAYER], pool[1, LAYER] * decay) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("dtype", TOLERANCE)
@torch.no_grad()
def test_one_token_repeated_two_hundred_times(dtype: torch.dtype) -> None:
    """Decay and rate near 1: whatever is wrong with a step adds up, for nothing is forgotten."""
    size = 64
    rows, weights = random_rows(1, size, num_heads=1), random_weights(size, num_heads=1)
    rows.d.fill_(-9), rows.a.fill_(9)
    expected_pool = draw((2, 1, size, size), torch.manual_seed(5))
    pool = expected_pool.to(dtype, copy=True)
    slot = torch.tensor([1])
    rows_, weights_ = cast(rows, dtype), cast(weights, dtype)
    for _ in range(200):
        y = decode(rows_, weights_, slot, slot, pool)
        expected = reference.time_mix(rows, weights, Batch((1,), slot, slot), expected_pool)
    # 200 roundings of a state that the same key rewrites.
    assert error(y, expected) < 100 * TOLERANCE[dtype]
    assert error(pool, expected_pool) < 100 * TOLERANCE[dtype]


@pytest.mark.parametrize("size", [16, 64])
def test_float16_pool_rounds_only_what_it_stores(size: int) -> None:
    pool = random_pool(size).half()
    rows, weights = random_rows(3, size), random_weights(size)
    batch = Batch((1, 1, 1), torch.tensor([1, 0, 3]), torch.tensor([1, 2, 4]))
    expected_pool = pool.double()
    with torch.no_grad():
        expected = reference.time_mix(rows, weights, batch, expected_pool[:, LAYER])
        rows, weights = cast(rows, torch.float32), cast(weights, torch.float32)
        y = gpu.time_mix(rows, weights, batch, pool[:, LAYER])
    assert error(y, expected) < TOLERANCE[torch.float32]
    # Half of the last of 11 bits, and what the rounding of float32 may push over a border.
    assert torch.allclose(pool.double(), expected_pool, rtol=2.0**-11 + 1e-5, atol=1e-7)


def test_rows_of_half_precision_are_computed_in_float32() -> None:
    rows, weights = cast(random_rows(2, 16), torch.float16), random_weights(16)
    slots, pool = torch.tensor([1, 2]), random_pool(16)
    expected_pool = pool.clone()
    y = decode(rows, cast(weights, torch.float16), slots, slots, pool[:, LAYER])
    with torch.no_grad():
        exact = (cast(rows, torch.float64), cast(cast(weights, torch.float16), torch.float64))
        expected = reference.time_mix(*exact, Batch((1, 1), slots, slots), expected_pool[:, LAYER])
    assert y.dtype == torch.float16
    assert error(y, expected) < 2.0**-11
    assert error(pool, expected_pool) < 1e-13


@torch.no_grad()
def test_slots_may_lie_beyond_two_to_the_31_elements() -> None:
    """6 GiB are asked for, but memory only comes with the few pages that are touched."""
    size, stride, slot = 16, 2**30, 3
    pages = torch.empty(slot * stride + size * size, dtype=torch.float16)
    pool = pages.as_strided((slot + 1, 1, size, size), (stride, size * size, size, 1))
    start = draw((1, size, size), torch.manual_seed(5)).half()
    pool[0], pool[slot] = 0, start
    rows, weights = random_rows(2, size, num_heads=1), random_weights(size, num_heads=1)
    src, dst = torch.tensor([slot, 0]), torch.tensor([2, slot])
    expected_pool = torch.stack([torch.zeros_like(start), start, start, start]).double()
    small = Batch((1, 1), torch.tensor([1, 0]), torch.tensor([2, 3]))
    y = decode(cast(rows, torch.float32), cast(weights, torch.float32), src, dst, pool)
    expected = reference.time_mix(rows, weights, small, expected_pool)
    assert error(y, expected) < TOLERANCE[torch.float32]
    assert error(pool[2:], expected_pool[2:]) < 2.0**-11
