"""The fused model of the CPU: right, and the same to the last bit however work is cut up."""

from __future__ import annotations

import gc
import threading
import time
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("numba", reason="the fused kernels are numba's")

from engine.model.fused import FusedRWKV7
from engine.model.rwkv7 import State
from tests.engine.kernels.fused_cases import (
    DIMS,
    DST,
    DTYPES,
    LENGTHS,
    NUM_SLOTS,
    SHAPES,
    SRC,
    batch,
    distance,
    exact,
    fused,
    random_state,
    tokens,
)

MAX_ERROR = {"float32": 2e-6, "bfloat16": 2e-6, "int8": 0.1}  # int8 alone: see test_linear


@pytest.fixture(scope="module")
def models() -> dict[str, FusedRWKV7]:
    return {dtype: fused(DIMS, dtype) for dtype in DTYPES}


def copy(state: State) -> State:
    return State(wkv=state.wkv.clone(), shift=state.shift.clone())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_logits_and_states_are_those_of_the_reference(shape: str, dtype: str) -> None:
    dims = SHAPES[shape]
    model, reference = fused(dims, dtype), exact(dims)
    state = random_state(model)
    wanted_state = State(wkv=state.wkv.double(), shift=state.shift.double())
    before = copy(state)
    ids = tokens(sum(LENGTHS))
    got = model.head(model(ids, batch(LENGTHS, SRC, DST), state))
    with torch.inference_mode():
        hidden = reference(ids, batch(LENGTHS, SRC, DST), wanted_state)
        wanted = reference.head(hidden)
    assert got.shape == (sum(LENGTHS), dims.vocab_size)
    assert distance(got, wanted) < MAX_ERROR[dtype]
    assert distance(state.wkv, wanted_state.wkv) < MAX_ERROR[dtype]
    assert distance(state.shift, wanted_state.shift) < MAX_ERROR[dtype]
    for slot in set(range(NUM_SLOTS)) - set(DST):
        assert torch.equal(state.wkv[slot], before.wkv[slot]), slot
        assert torch.equal(state.shift[slot], before.shift[slot]), slot


def alone(model: FusedRWKV7, state: State, ids: Tensor, src: int, dst: int) -> Tensor:
    """Token by token, one sequence at a time."""
    parts = []
    for token in ids.split(1):
        parts.append(model.head(model(token, batch([1], [src], [dst]), state)))
        src = dst
    return torch.cat(parts)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_batch_of_prompts_and_single_tokens_equals_each_token_alone(
    models: dict[str, FusedRWKV7], dtype: str
) -> None:
    model = models[dtype]
    together = random_state(model)
    apart = copy(together)
    ids = tokens(sum(LENGTHS))
    got = model.head(model(ids, batch(LENGTHS, SRC, DST), together))
    # In an order in which nobody's source has been written by another one.
    for i, part in enumerate(ids.split(LENGTHS)):
        wanted = alone(model, apart, part, SRC[i], DST[i])
        first = sum(LENGTHS[:i])
        assert torch.equal(got[first : first + LENGTHS[i]], wanted), f"sequence {i}"
    assert torch.equal(together.wkv, apart.wkv)
    assert torch.equal(together.shift, apart.shift)


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_cut_of_a_long_prompt_gives_the_same_bits(
    models: dict[str, FusedRWKV7], dtype: str
) -> None:
    model, ids = models[dtype], tokens(230)
    found = []
    for cuts in ((0, 230), (0, 7, 64, 230), (0, 1, 2, 129, 229, 230)):
        state, source, rows = random_state(model), 3, list[Tensor]()
        for begin, end in pairwise(cuts):
            rows.append(model(ids[begin:end], batch([end - begin], [source], [5]), state))
            source = 5
        found.append((torch.cat(rows), state))
    for hidden, state in found[1:]:
        assert torch.equal(hidden, found[0][0])
        assert torch.equal(state.wkv, found[0][1].wkv)
        assert torch.equal(state.shift, found[0][1].shift)


@pytest.mark.parametrize("num_threads", [1, 3])
def test_the_number_of_threads_changes_no_bit(
    models: dict[str, FusedRWKV7], num_threads: int
) -> None:
    for dtype, model in models.items():
        other = fused(DIMS, dtype, num_threads)
        ids, states = tokens(sum(LENGTHS)), [random_state(model), random_state(model)]
        rows = [
            m.head(m(ids, batch(LENGTHS, SRC, DST), state))
            for m, state in zip((model, other), states, strict=True)
        ]
        assert torch.equal(*rows), dtype
        assert torch.equal(states[0].wkv, states[1].wkv), dtype


@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_schedules_equal_sequences_alone(
    models: dict[str, FusedRWKV7], data: st.DataObject
) -> None:
    """Random steps over a pool: each sequence goes on in its slot or moves to another one."""
    model = models[data.draw(st.sampled_from(DTYPES))]
    state, ids = model.new_state(NUM_SLOTS), tokens(400, seed=data.draw(st.integers(0, 9)))
    slots: dict[int, int] = {}
    fed: dict[int, list[int]] = {}
    hidden: dict[int, list[Tensor]] = {}
    used = 0
    for _ in range(data.draw(st.integers(1, 4))):
        rows, free = [], [s for s in range(1, NUM_SLOTS) if s not in slots.values()]
        for seq in range(4):
            length = data.draw(st.sampled_from([0, 1, 1, 2, 17, 40]))
            if length == 0 or used + length > len(ids):
                continue
            stays = seq in slots and (not free or data.draw(st.booleans()))
            target = slots[seq] if stays else free.pop()
            rows.append((seq, length, slots.get(seq, 0), target))
            fed.setdefault(seq, []).extend(range(used, used + length))
            used += length
        if not rows:
            continue
        lengths = [row[1] for row in rows]
        part = ids[used - sum(lengths) : used]
        out = model(part, batch(lengths, [r[2] for r in rows], [r[3] for r in rows]), state)
        for (seq, _, _, target), piece in zip(rows, out.split(lengths), strict=True):
            hidden.setdefault(seq, []).append(piece)
            slots[seq] = target
    for seq, places in fed.items():
        own = model.new_state(2)
        wanted = model(ids[places], batch([len(places)], [0], [1]), own)
        assert torch.equal(torch.cat(hidden[seq]), wanted)
        assert torch.equal(state.wkv[slots[seq]], own.wkv[1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_state_that_is_not_finite_shows_in_its_own_rows_only(
    models: dict[str, FusedRWKV7], dtype: str
) -> None:
    model = models[dtype]
    for value in (torch.nan, torch.inf):
        for name in ("wkv", "shift"):
            state = random_state(model)
            getattr(state, name)[3].view(-1)[5] = value
            hidden = model(tokens(3), batch([1, 1, 1], [2, 3, 4], [2, 3, 4]), state)
            sound = torch.isfinite(hidden).all(dim=-1).tolist()
            assert sound == [True, False, True], (value, name)
            logits = torch.isfinite(model.head(hidden)).all(dim=-1).tolist()
            assert logits == [True, False, True], (value, name)


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_token_repeated_stays_close_to_the_reference(
    models: dict[str, FusedRWKV7], dtype: str
) -> None:
    model, reference = models[dtype], exact(DIMS)
    ids = torch.full((300,), 7)
    state, wanted_state = model.new_state(2), reference.new_state(2, "cpu")
    got = model.head(model(ids, batch([300], [0], [1]), state)[-20:])
    with torch.inference_mode():
        wanted = reference.head(reference(ids, batch([300], [0], [1]), wanted_state)[-20:])
    assert distance(got, wanted) < 3 * MAX_ERROR[dtype]


def test_no_rows_have_no_logits(models: dict[str, FusedRWKV7]) -> None:
    empty = models["int8"].head(torch.empty(0, DIMS.embedded_dim))
    assert empty.shape == (0, DIMS.vocab_size)


def test_threads_go_home_with_their_model() -> None:
    before = set(threading.enumerate())
    model = fused(DIMS, "float32", num_threads=4)
    members = [t for t in set(threading.enumerate()) - before if t.name.startswith("model-")]
    assert len(members) == 3
    del model
    gc.collect()
    for member in members:
        member.join(timeout=20)
        assert not member.is_alive()


def test_two_models_compute_at_once(models: dict[str, FusedRWKV7]) -> None:
    """As a replica and the one that is going to replace it do."""
    others = [fused(DIMS, "float32", 2) for _ in range(2)]
    ids, failures = tokens(64), list[str]()
    wanted = others[0](ids, batch([64], [0], [1]), others[0].new_state(2))

    def run(model: FusedRWKV7) -> None:
        for _ in range(30):
            if not torch.equal(model(ids, batch([64], [0], [1]), model.new_state(2)), wanted):
                failures.append("differs")

    threads = [threading.Thread(target=run, args=(model,)) for model in others]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_a_team_that_has_slept_wakes_up(models: dict[str, FusedRWKV7]) -> None:
    model = models["float32"]
    ids, state = tokens(8), model.new_state(2)
    wanted = model(ids, batch([8], [0], [1]), state)
    for pause_s in (0.0, 0.05, 0.3):
        time.sleep(pause_s)
        assert torch.equal(model(ids, batch([8], [0], [1]), state), wanted)
