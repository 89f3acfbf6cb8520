"""The kernels of the reference against plain numpy and against finite differences."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from engine.kernels import reference
from engine.kernels.backend import Batch, TimeMixRows, TimeMixWeights


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


PADDED = Batch((1, 1, 1), torch.tensor([2, 0, 0]), torch.tensor([3, -1, -1]))
ALONE = Batch((1,), torch.tensor([2]), torch.tensor([3]))


def time_mix_inputs(num_tokens: int) -> tuple[TimeMixRows, TimeMixWeights]:
    rows = {name: torch.randn(num_tokens, 16).double() for name in ("r", "k", "v", "d", "a", "g")}
    weights = {name: torch.randn(16).double() for name in ("k_k", "k_a")}
    norm = {"norm_weight": torch.randn(16).double(), "norm_bias": torch.randn(16).double()}
    r_k = torch.randn(2, 8).double()
    return (
        TimeMixRows(**rows, v_first=None, m=None),
        TimeMixWeights(**weights, **norm, r_k=r_k),
    )


@torch.inference_mode()
def test_padding_rows_leave_every_slot_as_it_is_and_other_rows_their_results() -> None:
    torch.manual_seed(0)
    rows, weights = time_mix_inputs(3)
    first = TimeMixRows(
        r=rows.r[:1], k=rows.k[:1], v=rows.v[:1], d=rows.d[:1], a=rows.a[:1], g=rows.g[:1],
        v_first=None, m=None,
    )  # fmt: skip
    pool, alone = (torch.arange(5.0).double().view(5, 1, 1, 1).repeat(1, 2, 8, 8) for _ in "ab")
    y = reference.time_mix(rows, weights, PADDED, pool)
    assert torch.allclose(y[:1], reference.time_mix(first, weights, ALONE, alone), atol=1e-14)
    assert torch.equal(pool, alone)
    assert torch.equal(pool[[0, 1, 4]], torch.tensor([0.0, 1, 4]).view(3, 1, 1, 1) + alone[:3] * 0)

    x, (weight, bias) = torch.randn(3, 16).double(), torch.randn(2, 16).double()
    mu = torch.rand(6, 1, 16).double()
    pool, alone = (torch.arange(5.0).double().view(5, 1).repeat(1, 16) for _ in "ab")
    mixed = reference.norm_mix(x, weight, bias, mu, PADDED, pool)
    expected = reference.norm_mix(x[:1], weight, bias, mu, ALONE, alone)
    assert torch.equal(mixed[:, :1], expected)
    assert torch.equal(pool, alone)


@torch.inference_mode()
def test_states_stored_in_half_precision_are_computed_in_float32_and_rounded_once() -> None:
    torch.manual_seed(0)
    rows, weights = time_mix_inputs(1)
    half = torch.randn(5, 2, 8, 8).half()
    full = half.float()
    batch = Batch((1,), torch.tensor([2]), torch.tensor([3]))
    y_half = reference.time_mix(rows, weights, batch, half)
    assert torch.equal(y_half, reference.time_mix(rows, weights, batch, full))
    assert torch.equal(half, full.half())
