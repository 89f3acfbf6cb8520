"""The chunk algorithm against the recurrence, torch's autograd and finite differences."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.engine.kernels import chunk_math
from tests.engine.kernels.chunk_math import Inputs
from tests.engine.kernels.wkv_cases import (
    KINDS,
    REPEATED,
    apply,
    relative_error,
    token_by_token,
    wkv_inputs,
    wkv_states,
)

NAMES = ("r", "lw", "k", "v", "a", "b")
LENGTHS = [1, 2, 15, 16, 17, 40]


def heads_first(x: Tensor) -> Tensor:
    return x.transpose(0, 1)


def gradients_in_chunks(
    inputs: Inputs, state: Tensor, d_y: Tensor, d_last: Tensor
) -> tuple[Inputs, Tensor]:
    by_head = apply(heads_first, inputs)
    _, last, checkpoints = chunk_math.forward(by_head, state)
    grads, d_state = chunk_math.backward(by_head, checkpoints, last, heads_first(d_y), d_last)
    return apply(heads_first, grads), d_state


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_tokens", LENGTHS)
def test_chunks_equal_the_recurrence(kind: str, num_tokens: int) -> None:
    inputs, state = wkv_inputs(num_tokens, kind), wkv_states(1)[0]
    wanted_y, wanted_last = token_by_token(inputs, state)
    y, last, checkpoints = chunk_math.forward(apply(heads_first, inputs), state)
    # Float64; writers of a chunk are scaled by up to e^9.7, which costs up to 4 digits of 16.
    assert relative_error(heads_first(y), wanted_y) < 1e-11
    assert relative_error(last, wanted_last) < 1e-11
    for i, checkpoint in enumerate(checkpoints):
        head = apply(lambda x, end=16 * i: x[:end], inputs)  # type: ignore[misc]
        wanted = token_by_token(head, state)[1] if i else state
        assert relative_error(checkpoint, wanted) < 1e-11


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_tokens", LENGTHS)
def test_gradients_equal_autograd_through_the_recurrence(kind: str, num_tokens: int) -> None:
    inputs, (state, d_last) = wkv_inputs(num_tokens, kind), wkv_states(2)
    d_y = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(1)).double()
    leaves = [x.clone().requires_grad_() for x in (*inputs, state)]
    y, last = token_by_token(tuple(leaves[:6]), leaves[6])  # type: ignore[arg-type]
    wanted = torch.autograd.grad([y, last], leaves, [d_y, d_last])
    grads, d_state = gradients_in_chunks(inputs, state, d_y, d_last)
    for name, got, want in zip((*NAMES, "state"), (*grads, d_state), wanted, strict=True):
        assert relative_error(got, want) < 1e-10, name


def test_gradients_equal_finite_differences() -> None:
    """Independent of the recurrence in torch: only the forward of the chunks is differenced."""
    inputs, (state, d_last) = wkv_inputs(19, "typical", heads=1, size=4), wkv_states(2, 1, 4)
    d_y = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(2)).double()

    def loss(values: list[Tensor]) -> float:
        r, lw, k, v, a, b = (heads_first(x) for x in values[:6])
        y, last, _ = chunk_math.forward((r, lw, k, v, a, b), values[6])
        return float((heads_first(y) * d_y).sum() + (last * d_last).sum())

    grads, d_state = gradients_in_chunks(inputs, state, d_y, d_last)
    values = [*inputs, state]
    for i, grad in enumerate((*grads, d_state)):
        direction = torch.randn(grad.shape, generator=torch.Generator().manual_seed(i)).double()
        step = 1e-6 * direction
        ahead = loss([x + step if j == i else x for j, x in enumerate(values)])
        behind = loss([x - step if j == i else x for j, x in enumerate(values)])
        # Central differences: the error is step² plus rounding / step, both about 1e-9.
        assert (ahead - behind) / 2e-6 == pytest.approx(float((grad * direction).sum()), rel=1e-6)


def test_one_token_repeated_survives_float32_by_substitution_but_not_by_doubling() -> None:
    """Why the kernels substitute: the test of repeated tokens can tell the two apart."""
    r, lw, k, v, a, b = apply(heads_first, wkv_inputs(16, REPEATED))
    chunk = chunk_math.Chunk.of((r, lw, k, v, a, b), wkv_states(1)[0])
    eye = torch.eye(16, dtype=torch.float64).expand_as(chunk.ab_CC)
    wanted = torch.linalg.solve_triangular(eye - chunk.ab_CC, eye, upper=False, unitriangular=True)
    power, single = chunk.ab_CC.float(), eye.float()
    doubled = single + power
    for _ in range(3):
        power = power @ power
        doubled = doubled @ (single + power)
    substituted = chunk_math.substitute(chunk.ab_CC.float(), single)
    assert relative_error(substituted, wanted) < 1e-5
    assert relative_error(doubled, wanted) > 10 * relative_error(substituted, wanted)
