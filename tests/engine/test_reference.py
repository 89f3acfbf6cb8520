"""The kernels of the reference against plain numpy and against finite differences."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from engine.kernels import reference


def inputs(
    num_tokens: int, kind: str, batch: int = 2, heads: int = 2, size: int = 8
) -> list[Tensor]:
    """r, lw, k, v, a, b and a state, as the model makes them: kk normalised, 0.545 < w < 1."""
    generator = torch.manual_seed(num_tokens)
    shape = (batch, num_tokens, heads, size)
    r, k, v, d, gate, kk = (torch.randn(shape, generator=generator).double() for _ in range(6))
    if kind == "one token repeated":
        r, k, v, d, gate, kk = (x[:, :1].expand(shape) for x in (r, k, v, d, gate, kk))
        d, gate = d * 0 - 9, gate * 0 + 9  # decay near 1, rate near 1: the hardest inverse
    if kind == "strongest decay":
        d = d * 0 + 30
    kk = F.normalize(kk, dim=-1)
    state = torch.randn(batch, heads, size, size, generator=generator).double()
    return [r, reference.log_decay(d), k, v, -kk, kk * torch.sigmoid(gate), state]


def numpy_wkv7(r, lw, k, v, a, b, state):  # type: ignore[no-untyped-def]
    """The paper's recurrence, [value, key] as it prints it, in loops."""
    r, lw, k, v, a, b = (x.numpy() for x in (r, lw, k, v, a, b))
    out, S = np.zeros_like(r), state.numpy().swapaxes(-1, -2).copy()
    for i, h in np.ndindex(r.shape[0], r.shape[2]):
        for t in range(r.shape[1]):
            w = np.exp(lw[i, t, h])
            sa = S[i, h] @ a[i, t, h]
            S[i, h] = S[i, h] * w + np.outer(sa, b[i, t, h]) + np.outer(v[i, t, h], k[i, t, h])
            out[i, t, h] = S[i, h] @ r[i, t, h]
    return out, S.swapaxes(-1, -2)


@pytest.mark.parametrize("kind", ["typical", "one token repeated", "strongest decay"])
@pytest.mark.parametrize("num_tokens", [1, 2, 31, 32, 33, 64, 77])
def test_recurrent_and_chunked_forms_equal_the_paper(kind: str, num_tokens: int) -> None:
    data = inputs(num_tokens, kind)
    y, state = numpy_wkv7(*data)
    for form in (reference.wkv7_recurrent, reference.wkv7_chunked):
        got_y, got_state = form(*data)
        assert np.abs(got_y.numpy() - y).max() < 1e-9 * max(1, np.abs(y).max())
        assert np.abs(got_state.numpy() - state).max() < 1e-9 * max(1, np.abs(state).max())


@pytest.mark.parametrize("kind", ["typical", "one token repeated", "strongest decay"])
def test_chunked_form_holds_in_float32(kind: str) -> None:
    data = inputs(100, kind)
    y, state = reference.wkv7_recurrent(*data)
    got_y, got_state = reference.wkv7_chunked(*[x.float() for x in data])
    assert (got_y - y).norm() < 2e-5 * y.norm()
    assert (got_state - state).norm() < 2e-5 * state.norm()


def test_chunked_gradients_equal_those_of_the_recurrence() -> None:
    data = [x.requires_grad_(True) for x in inputs(45, "typical")]
    weights = torch.randn(data[0].shape, generator=torch.manual_seed(9)).double()
    gradients = []
    for form in (reference.wkv7_recurrent, reference.wkv7_chunked):
        y, state = form(*data)
        gradients.append(torch.autograd.grad((y * weights).sum() + state.square().sum(), data))
    for expected, got in zip(*gradients, strict=True):
        assert torch.allclose(expected, got, rtol=1e-9, atol=1e-9)


def test_packed_wkv7_equals_each_sequence_alone() -> None:
    for lengths in [(1, 1, 1), (5, 5), (3, 1, 40, 33)]:
        total = sum(lengths)
        packed = [x[0] for x in inputs(total, "typical", batch=1)[:6]]
        states = torch.randn(len(lengths), 2, 8, 8, generator=torch.manual_seed(1)).double()
        y, state = reference.wkv7(*packed, lengths, states)
        for i, (part, *xs) in enumerate(
            zip(y.split(lengths), *(x.split(lengths) for x in packed), strict=True)
        ):
            alone_y, alone = reference.wkv7_recurrent(*(x[None] for x in xs), states[i : i + 1])
            assert torch.allclose(part, alone_y[0], atol=1e-10)
            assert torch.allclose(state[i], alone[0], atol=1e-10)


def test_cross_entropy_equals_torch_and_its_gradient_adds_l2wrap() -> None:
    generator = torch.manual_seed(0)
    hidden = torch.randn(7, 6, generator=generator).double().requires_grad_(True)
    weight = torch.randn(11, 6, generator=generator).double().requires_grad_(True)
    targets = torch.randint(0, 11, (7,), generator=generator)
    upstream = 0.25
    logits = hidden @ weight.T
    expected = F.cross_entropy(logits, targets)
    top = logits.detach().max(-1)
    extra = torch.zeros_like(logits).scatter_(-1, top.indices[:, None], top.values[:, None])
    for l2wrap in (False, True):
        for rows_per_chunk in (2, 100):
            loss = reference.cross_entropy_l2wrap(hidden, weight, targets, l2wrap, rows_per_chunk)
            assert torch.allclose(loss, expected)
            got = torch.autograd.grad(loss * upstream, (hidden, weight))
            # As a loss: the extra gradient is that of Σ z_top * 1e-4 / M with z_top held fixed.
            surrogate = expected + l2wrap * (logits * extra).sum() * 1e-4 / 7
            want = torch.autograd.grad(surrogate * upstream, (hidden, weight), retain_graph=True)
            for a, b in zip(got, want, strict=True):
                assert torch.allclose(a, b, atol=1e-12)
