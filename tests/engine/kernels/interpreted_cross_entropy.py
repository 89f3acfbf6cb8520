"""Head, cross-entropy and L2Wrap against torch in float64. `test_triton` runs this interpreted."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from engine.kernels import reference
from engine.kernels.gpu.cross_entropy import choose_rows_per_chunk, cross_entropy_l2wrap

NUM_CHANNELS = 6
Result = tuple[Tensor, Tensor, Tensor]  # loss, gradients of hidden and of weight


def inputs(num_rows: int, vocab_size: int, scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(num_rows * vocab_size)
    hidden = torch.randn(num_rows, NUM_CHANNELS, generator=generator).double() * scale
    weight = torch.randn(vocab_size, NUM_CHANNELS, generator=generator).double()
    return hidden, weight, torch.randint(0, vocab_size, (num_rows,), generator=generator)


def by_torch(
    hidden: Tensor, weight: Tensor, targets: Tensor, l2wrap: bool, upstream: float
) -> Result:
    """In float64. L2Wrap as a loss: its gradient is that of 1e-4 z² / 2 for the largest z."""
    hidden, weight = (x.double().requires_grad_(True) for x in (hidden, weight))
    logits = hidden @ weight.T
    loss = F.cross_entropy(logits, targets)
    total = loss + l2wrap * 1e-4 / 2 * logits.amax(-1).square().mean()
    return loss.detach(), *torch.autograd.grad(total * upstream, (hidden, weight))


def by_kernel(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    l2wrap: bool,
    upstream: float,
    rows_per_chunk: int | None = None,
) -> Result:
    hidden, weight = (x.detach().requires_grad_(True) for x in (hidden, weight))
    loss = cross_entropy_l2wrap(hidden, weight, targets, l2wrap, rows_per_chunk)
    return loss.detach(), *torch.autograd.grad(loss * upstream, (hidden, weight))


def largest_error(got: Result, wanted: Result) -> float:
    """Of loss and gradients, each relative to the whole of it in the 2-norm."""
    pairs = zip(got, wanted, strict=True)
    return max(float((a.double() - b).norm() / b.norm()) for a, b in pairs)


@pytest.mark.parametrize("l2wrap", [False, True])
@pytest.mark.parametrize("vocab_size", [2, 16, 37, 5000, 8192])
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    # exp(x) has the absolute rounding of x, some 10, as relative error; half rounds logits too.
    [(torch.float64, 1e-12), (torch.float32, 5e-6), (torch.float16, 4e-3)],
)
def test_loss_and_gradients_equal_float64(
    dtype: torch.dtype, tolerance: float, vocab_size: int, l2wrap: bool
) -> None:
    hidden, weight, targets = inputs(5, vocab_size)
    hidden, weight = hidden.to(dtype), weight.to(dtype)
    got = by_kernel(hidden, weight, targets, l2wrap, 0.25, rows_per_chunk=2)
    assert got[0].dtype == torch.promote_types(dtype, torch.float32)
    assert largest_error(got, by_torch(hidden, weight, targets, l2wrap, 0.25)) < tolerance


def test_products_are_in_the_type_of_hidden_and_weight_keeps_its_own() -> None:
    hidden, weight, targets = inputs(5, 37)
    hidden, weight = hidden.half(), weight.float()
    got = by_kernel(hidden, weight, targets, True, 1.0)
    assert [x.dtype for x in got] == [torch.float32, torch.float16, torch.float32]
    assert largest_error(got, by_torch(hidden, weight, targets, True, 1.0)) < 4e-3
    same = reference.cross_entropy_l2wrap(hidden, weight, targets)
    torch.testing.assert_close(got[0], same, rtol=1e-6, atol=0)


def test_chunks_do_not_change_the_loss_and_runs_do_not_differ() -> None:
    hidden, weight, targets = inputs(7, 100)
    first, *others = [
        by_kernel(hidden.float(), weight.float(), targets, True, 1.0, rows)
        for rows in (None, None, 1, 3, 7)
    ]
    assert all(torch.equal(a, b) for a, b in zip(first, others[0], strict=True))
    for other in others[1:]:
        assert torch.equal(other[0], first[0])
        assert largest_error(other, tuple(x.double() for x in first)) < 1e-6  # type: ignore[arg-type]


def test_large_logits_do_not_overflow() -> None:
    hidden, weight, targets = inputs(5, 5000, scale=1e3)
    got = by_kernel(hidden.float(), weight.float(), targets, True, 1.0)
    assert largest_error(got, by_torch(hidden.float(), weight.float(), targets, True, 1.0)) < 1e-4


def test_only_the_first_of_equal_largest_logits_is_pulled_back() -> None:
    hidden = torch.ones(1, NUM_CHANNELS)
    weight = torch.ones(5000, NUM_CHANNELS)
    with_it, without = (
        by_kernel(hidden, weight, torch.tensor([9]), l2wrap, 1.0)[2] for l2wrap in (True, False)
    )
    changed = (with_it != without).any(-1).nonzero().flatten()
    assert changed.tolist() == [0]
    torch.testing.assert_close(with_it[0] - without[0], torch.full((NUM_CHANNELS,), 6e-4))


@pytest.mark.filterwarnings("ignore:invalid value")  # numpy's, of inf - inf
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_not_hidden(value: float) -> None:
    hidden, weight, targets = inputs(3, 37)
    hidden[1, 0] = value
    assert not cross_entropy_l2wrap(hidden.float(), weight.float(), targets).isfinite()


def test_without_gradients_the_loss_is_the_same() -> None:
    hidden, weight, targets = inputs(5, 37)
    with torch.no_grad():
        loss = cross_entropy_l2wrap(hidden, weight, targets)
    assert torch.equal(loss, by_kernel(hidden, weight, targets, True, 1.0)[0])


def test_a_second_backward_is_refused() -> None:
    hidden, weight, targets = inputs(2, 16)
    loss = cross_entropy_l2wrap(hidden.requires_grad_(True), weight, targets)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_chunks_hold_half_a_gigabyte_of_logits() -> None:
    assert choose_rows_per_chunk(65536, torch.bfloat16) == 4096
    assert choose_rows_per_chunk(2**30, torch.float32) == 1
