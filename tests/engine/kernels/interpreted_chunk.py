"""The chunk kernels under the Triton interpreter; run by test_triton.py in its own process.

All in float32 on few tokens, against the recurrence in float64. The interpreter shows what is
computed, and nothing of races, registers or the speed of a GPU.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from engine.kernels.gpu import wkv
from engine.kernels.gpu.packed import PackedRows
from tests.engine.kernels.wkv_cases import (
    KINDS,
    TYPICAL,
    apply,
    relative_error,
    token_by_token,
    wkv_inputs,
    wkv_states,
)

CPU = torch.device("cpu")
LENGTHS = (17, 1, 40, 16, 15)
SHORT = (17, 1, 16)  # for gradients, which take longer
# Float32 keeps 6e-8 of a number, and some products and sums in a row keep a few times that: 2e-7
# were seen, also where one token is repeated, since substitution is stable and chunks are short.
TOLERANCE = 1e-6
# The gradient of b has terms that cancel where one token is repeated: autograd through the
# recurrence in float32 is off by 2.7e-6 there, the kernel by 1.7e-6, and by 6e-7 elsewhere.
GRADIENT_TOLERANCE = 5e-6


def slots(*numbers: int) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int64)


def wanted(inputs, lengths, states):  # type: ignore[no-untyped-def]
    """y of all and the last state of each sequence, in float64."""
    ends = torch.tensor(lengths).cumsum(0).tolist()
    pairs = [
        token_by_token(apply(lambda x, n=n, end=end: x[end - n : end], inputs), state)
        for n, end, state in zip(lengths, ends, states, strict=True)
    ]
    return torch.cat([y for y, _ in pairs]), torch.stack([last for _, last in pairs])


def single(inputs):  # type: ignore[no-untyped-def]
    return apply(lambda x: x.float().contiguous(), inputs)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [16, 64])
def test_ragged_rows_go_from_slot_to_slot(kind: str, size: int) -> None:
    """One layer of a pool: read slots differ from written ones but in one case, others keep."""
    pool = wkv_states(8 * 2, size=size).view(8, 2, 2, size, size)
    src, dst = slots(7, 0, 0, 4, 2), slots(1, 3, 5, 4, 6)
    inputs = wkv_inputs(sum(LENGTHS), kind, size=size)
    y, last = wanted(inputs, LENGTHS, pool[src, 1])

    got = pool.float()
    before, layer = got.clone(), got[:, 1]
    rows = PackedRows.of(LENGTHS, CPU)
    got_y = wkv.prefill(single(inputs), rows, layer, src, layer, dst)
    assert relative_error(got_y, y) < TOLERANCE
    assert relative_error(got[dst, 1], last) < TOLERANCE
    got[dst, 1] = before[dst, 1]
    assert torch.equal(got, before)


def test_a_split_of_the_values_changes_nothing() -> None:
    inputs, states = single(wkv_inputs(20, TYPICAL, size=64)), wkv_states(1, size=64).float()
    rows = PackedRows.of((20,), CPU)
    results = []
    for value_block in (None, 16, 32):
        last = torch.empty_like(states)
        y = wkv.prefill(inputs, rows, states, slots(0), last, slots(0), value_block)
        results.append((y, last))
    for y, last in results[1:]:
        assert torch.equal(y, results[0][0])
        assert torch.equal(last, results[0][1])


def test_padding_rows_and_empty_ones_compute_nothing() -> None:
    """A negative slot reads and writes nothing; a sequence without tokens keeps its state."""
    states = wkv_states(3).float()
    inputs = single(wkv_inputs(5, TYPICAL))
    y, last = wanted(wkv_inputs(5, TYPICAL), (5,), wkv_states(3)[:1])
    target = torch.full_like(states, torch.nan)
    rows = PackedRows.of((5, 0, 0), CPU)
    got_y = wkv.prefill(inputs, rows, states, slots(0, -1, 2), target, slots(1, -1, 2))
    assert relative_error(got_y, y) < TOLERANCE
    assert relative_error(target[1], last[0]) < TOLERANCE
    assert torch.equal(target[2], states[2])
    assert target[0].isnan().all()


def test_a_text_in_pieces_equals_the_whole() -> None:
    inputs, states = wkv_inputs(40, TYPICAL), wkv_states(2).float()
    ys = []
    for start, end in ((0, 3), (3, 20), (20, 40)):
        piece = apply(lambda x, start=start, end=end: x[start:end].float().contiguous(), inputs)
        rows = PackedRows.of((end - start,), CPU)
        src = slots(0 if start == 0 else 1)
        ys.append(wkv.prefill(piece, rows, states, src, states, slots(1)))
    y, last = wanted(inputs, (40,), wkv_states(2)[:1])
    assert relative_error(torch.cat(ys), y) < TOLERANCE
    assert relative_error(states[1], last[0]) < TOLERANCE


def test_states_may_be_stored_in_float16() -> None:
    states = wkv_states(2).half()
    inputs = wkv_inputs(17, TYPICAL)
    y, last = wanted(inputs, (17,), states[:1].double())
    rows = PackedRows.of((17,), CPU)
    got_y = wkv.prefill(single(inputs), rows, states, slots(0), states, slots(1))
    assert relative_error(got_y, y) < TOLERANCE  # only the storage is rounded
    assert relative_error(states[1], last[0]) < 5e-4  # half of float16's 2^-10


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [16, 64])
def test_gradients_equal_those_of_the_recurrence(kind: str, size: int) -> None:
    """Of all six inputs and of the initial states, through y and through the last states."""
    inputs, states = wkv_inputs(sum(SHORT), kind, size=size), wkv_states(6, size=size)
    first, d_last = states.split(3)
    d_y = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(3)).double()
    exact = [x.clone().requires_grad_() for x in (*inputs, first)]
    found = [x.float().contiguous().requires_grad_() for x in (*inputs, first)]

    grads = torch.autograd.grad(wanted(exact[:6], SHORT, exact[6]), exact, (d_y, d_last))
    rows = PackedRows.of(SHORT, CPU)
    outputs = wkv.wkv7(tuple(found[:6]), rows, found[6])
    got = torch.autograd.grad(outputs, found, (d_y.float(), d_last.float()))
    names = ("r", "lw", "k", "v", "a", "b", "state")
    errors = {name: relative_error(x, y) for name, x, y in zip(names, got, grads, strict=True)}
    assert max(errors.values()) < GRADIENT_TOLERANCE, errors


def test_gradients_are_the_same_twice_and_do_not_depend_on_the_other_rows() -> None:
    inputs, first = single(wkv_inputs(18, TYPICAL)), wkv_states(2).float()

    def gradients(lengths, inputs, first):  # type: ignore[no-untyped-def]
        leaves = [x.clone().requires_grad_() for x in (*inputs, first)]
        y, last = wkv.wkv7(tuple(leaves[:6]), PackedRows.of(lengths, CPU), leaves[6])
        return torch.autograd.grad(y.square().sum() + last.square().sum(), leaves)

    both, again = (gradients((17, 1), inputs, first) for _ in range(2))
    alone = gradients((17,), apply(lambda x: x[:17].contiguous(), inputs), first[:1])
    for one, two, three in zip(both, again, alone, strict=True):
        assert torch.equal(one, two)
        assert torch.equal(one[: three.shape[0]], three)


def test_a_loss_of_y_alone_needs_no_gradient_of_the_last_state() -> None:
    inputs, first = wkv_inputs(18, TYPICAL), wkv_states(1)
    exact = [x.clone().requires_grad_() for x in (*inputs, first)]
    found = [x.float().contiguous().requires_grad_() for x in (*inputs, first)]
    grads = torch.autograd.grad(wanted(exact[:6], (18,), exact[6])[0].square().sum(), exact)
    y, _ = wkv.wkv7(tuple(found[:6]), PackedRows.of((18,), CPU), found[6])
    for got, want in zip(torch.autograd.grad(y.square().sum(), found), grads, strict=True):
        assert relative_error(got, want) < GRADIENT_TOLERANCE


def test_slots_lie_beyond_2_to_the_31_elements() -> None:
    """Memory is taken only where it is written: two states of a pool of 4 GiB."""
    states = wkv_states(1).half()
    pool = torch.empty(2**31 + 512, dtype=torch.float16).as_strided(
        (3, 2, 16, 16), (2**30, 256, 16, 1)
    )
    pool[0] = states[0]
    inputs = wkv_inputs(17, TYPICAL)
    _, last = wanted(inputs, (17,), states.double())
    rows = PackedRows.of((17,), CPU)
    wkv.prefill(single(inputs), rows, pool, slots(0), pool, slots(2))
    assert relative_error(pool[2], last[0]) < 5e-4
