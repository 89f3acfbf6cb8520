"""The time mix in chunks against the reference in float64; run by test_triton.py interpreted.

Everything around the recurrence too, forward and backward: `interpreted_chunk` has the recurrence
alone.
"""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch
from torch import Tensor

from engine.kernels import reference
from engine.kernels.backend import Backend, Batch, TimeMixRows, TimeMixWeights
from engine.kernels.gpu import backend as gpu
from tests.engine.kernels.interpreted_decode import (
    LAYER,
    cast,
    draw,
    error,
    random_pool,
    random_rows,
    random_weights,
)

LENGTHS = (17, 1, 5)
# Relative errors of the whole, in float32: 3e-7 were seen, and 1.5e-6 of a gradient.
TOLERANCE, GRADIENT_TOLERANCE = 2e-6, 1e-5


def batch_of(lengths: tuple[int, ...], src: list[int], dst: list[int]) -> Batch:
    return Batch(lengths, torch.tensor(src), torch.tensor(dst))


@pytest.mark.parametrize("has_residual", [True, False])
@pytest.mark.parametrize("size", [16, 64])
@torch.no_grad()
def test_prompts_and_single_tokens_go_from_slot_to_slot(size: int, has_residual: bool) -> None:
    rows, weights, pool = random_rows(23, size), random_weights(size), random_pool(size)
    if not has_residual:
        rows = replace(rows, v_first=None, m=None)
    batch = batch_of(LENGTHS, [3, 0, 5], [3, 1, 6])
    after = pool.clone()
    expected = reference.time_mix(rows, weights, batch, after[:, LAYER])
    got_after = pool.float()
    y = gpu.time_mix(
        cast(rows, torch.float32), cast(weights, torch.float32), batch, got_after[:, LAYER]
    )
    assert y.dtype == torch.float32
    assert error(y, expected) < TOLERANCE
    assert error(got_after, after) < TOLERANCE
    changed = (got_after != pool.float()).flatten(2).any(-1).nonzero().tolist()
    assert changed == [[1, LAYER], [3, LAYER], [6, LAYER]]


@torch.no_grad()
def test_padding_is_neither_read_nor_written() -> None:
    rows, weights, pool = random_rows(23, 16), random_weights(16), random_pool(16)
    real = batch_of((17, 5), [3, 5], [3, 6])
    picked = torch.cat([torch.arange(17), torch.arange(18, 23)])
    tensors = {f.name: getattr(rows, f.name) for f in fields(rows)}
    expected_pool = pool.clone()
    only = TimeMixRows(**{name: x[picked] for name, x in tensors.items()})
    expected = reference.time_mix(only, weights, real, expected_pool[:, LAYER])
    for x in tensors.values():
        x[17] = torch.nan
    pool[4] = torch.nan
    got = pool.float()
    batch = batch_of(LENGTHS, [3, -1, 5], [3, -1, 6])
    y = gpu.time_mix(cast(rows, torch.float32), cast(weights, torch.float32), batch, got[:, LAYER])
    assert error(y[picked], expected) < TOLERANCE
    expected_pool[4] = 0
    assert got[4].isnan().all()
    assert error(got.nan_to_num(), expected_pool) < TOLERANCE


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # numpy's; sigmoid is then 0
@pytest.mark.parametrize("raw", [-1e4, 30.0])
@torch.no_grad()
def test_decay_and_rate_may_be_extreme_and_keys_zero(raw: float) -> None:
    rows, weights, pool = random_rows(18, 16), random_weights(16), random_pool(16)
    rows.d[:9], rows.a[5:], rows.k[7] = raw, raw, 0
    batch, after = batch_of((18,), [2], [2]), pool.clone()
    expected = reference.time_mix(rows, weights, batch, after[:, LAYER])
    got = pool.float()
    y = gpu.time_mix(cast(rows, torch.float32), cast(weights, torch.float32), batch, got[:, LAYER])
    assert error(y, expected) < TOLERANCE
    assert error(got, after) < TOLERANCE


def gradients(
    rows: TimeMixRows,
    weights: TimeMixWeights,
    batch: Batch,
    pool: Tensor,
    d_y: Tensor,
    kernels: Backend,
) -> tuple[Tensor, dict[str, Tensor]]:
    """y, and its gradients by everything that goes in, initial states included."""
    leaves = {
        f.name: getattr(bundle, f.name).clone().requires_grad_()
        for bundle in (rows, weights)
        for f in fields(bundle)
        if getattr(bundle, f.name) is not None
    }
    leaves["state"] = pool.clone().requires_grad_()
    rows = replace(rows, **{f.name: leaves.get(f.name) for f in fields(rows)})
    weights = replace(weights, **{f.name: leaves[f.name] for f in fields(weights)})
    y = kernels.time_mix(rows, weights, batch, leaves["state"])
    found = torch.autograd.grad(y, list(leaves.values()), d_y.to(y.dtype))
    return y.detach(), dict(zip(leaves, found, strict=True))


@pytest.mark.parametrize(("size", "has_residual"), [(16, True), (16, False), (64, True)])
def test_gradients_equal_those_of_the_reference(size: int, has_residual: bool) -> None:
    """States are read from slots, one of them by two sequences; none is written."""
    rows, weights = random_rows(23, size), random_weights(size)
    if not has_residual:
        rows = replace(rows, v_first=None, m=None)
    pool, batch = random_pool(size)[:3, LAYER], batch_of(LENGTHS, [1, 0, 1], [1, 0, 1])
    d_y = draw((23, 2 * size), torch.manual_seed(9))
    y, wanted = gradients(rows, weights, batch, pool, d_y, reference)
    single = (cast(rows, torch.float32), cast(weights, torch.float32), batch, pool.float(), d_y)
    got_y, got = gradients(*single, gpu)
    assert error(got_y, y) < TOLERANCE
    errors = {name: error(got[name], wanted[name]) for name in wanted}
    assert max(errors.values()) < GRADIENT_TOLERANCE, errors
    _, again = gradients(*single, gpu)
    assert all(torch.equal(got[name], again[name]) for name in got)


def test_types_are_those_of_the_reference_under_autocast() -> None:
    """Products come in bfloat16, what has a bias in float32; gradients go back as they came."""
    half, rows, weights = torch.bfloat16, random_rows(18, 16), random_weights(16)
    rows = replace(
        cast(rows, torch.float32), r=rows.r.to(half), k=rows.k.to(half), v=rows.v.to(half)
    )
    rows = replace(rows, g=rows.g.to(half), v_first=rows.v_first.to(half))  # type: ignore[union-attr]
    weights, batch = cast(weights, torch.float32), batch_of((18,), [0], [0])
    pool, d_y = random_pool(16)[:1, LAYER].float(), draw((18, 32), torch.manual_seed(9))
    with torch.autocast("cpu", half):
        y, wanted = gradients(rows, weights, batch, pool, d_y, reference)
        got_y, got = gradients(rows, weights, batch, pool, d_y, gpu)
    assert got_y.dtype == y.dtype == half
    assert error(got_y, y.double()) < 2**-6  # some roundings to 8 bits, and truncation
    for name, x in wanted.items():
        assert got[name].dtype == x.dtype, name
        assert error(got[name], x.double()) < 2**-5, name


def test_a_head_size_without_a_chunk_kernel_takes_the_reference() -> None:
    rows, weights = cast(random_rows(3, 8), torch.float32), cast(random_weights(8), torch.float32)
    batch, pool = batch_of((3,), [0], [1]), random_pool(8).float()
    with torch.no_grad():
        expected = reference.time_mix(rows, weights, batch, pool.clone()[:, LAYER])
        assert torch.equal(gpu.time_mix(rows, weights, batch, pool[:, LAYER]), expected)
