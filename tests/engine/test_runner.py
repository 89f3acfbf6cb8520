"""The device thread on a small model: the model alone is the oracle of every plan."""

from __future__ import annotations

import queue
from typing import NamedTuple

import pytest
import torch

from config.schema import ModelConfig
from engine.model.rwkv7 import RWKV7, Batch
from engine.model.weights import dummy_model
from engine.plan import BAD_TOKEN, ZERO_SLOT, Row, SeatStart, SlotRef, StepPlan, StepResult
from engine.runner import ModelRunner
from engine.sampler import Sampler
from engine.state.layout import PageLayout
from engine.state.storage import StateStorage
from engine.types import SamplingParams

CFG = ModelConfig(name="test", num_cells=2, vocab_size=61, embedded_dim=32, num_heads=2)
CPU = torch.device("cpu")
LAYOUT = PageLayout(
    num_cells=2, num_heads=2, head_size=16, wkv_dtype="float64", shift_dtype="float64"
)
GREEDY = SamplingParams(temperature=0.0)
ZERO = SlotRef(ZERO_SLOT, 0)


class Device(NamedTuple):
    model: RWKV7
    storage: StateStorage
    runner: ModelRunner


def device(num_slots: int = 4) -> Device:
    model = dummy_model(CFG, CPU, torch.float64)
    storage = StateStorage(LAYOUT, num_slots, CPU)
    for slot in range(1, num_slots + 1):
        storage.poison(slot)  # whatever reads a slot before writing it computes NaN
    return Device(model, storage, ModelRunner(model, storage, Sampler(4, (), CPU), num_seats=4))


def plain(model: RWKV7, prompt: tuple[int, ...], num_tokens: int) -> list[int]:
    state, slots, out = model.new_state(1, CPU), torch.tensor([0]), list[int]()
    fed = prompt
    for _ in range(num_tokens):
        with torch.inference_mode():
            hidden = model(torch.tensor(fed), Batch((len(fed),), slots, slots), state)
            out.append(int(model.head(hidden[-1]).argmax()))
        fed = (out[-1],)
    return out


def prefill(seq: int, tokens: tuple[int, ...], slot: int, *, start: int = 0, sample: bool) -> Row:
    ref = SlotRef(slot, 0)
    return Row(seq, seq, tokens, len(tokens), start, ref if start else ZERO, ref, sample)


def decode(seq: int, position: int, src: int, dst: int) -> Row:
    return Row(seq, seq, None, 1, position, SlotRef(src, 0), SlotRef(dst, 0), sample=True)


def test_mixed_steps_give_each_sequence_what_it_gets_alone() -> None:
    model, storage, runner = device()
    a, b = (5, 6, 7, 8, 9), (1, 2, 3)
    starts = (SeatStart(0, GREEDY), SeatStart(1, GREEDY))
    out_a: list[int] = []
    out_b: list[int] = []
    plans = [
        StepPlan(0, (prefill(0, a[:3], 1, sample=False), prefill(1, b, 2, sample=True)), starts),
        StepPlan(1, (decode(1, 3, 2, 3), prefill(0, a[3:], 1, start=3, sample=True))),
        StepPlan(2, (decode(0, 5, 1, 1), decode(1, 4, 3, 2))),  # b moves between slots
        StepPlan(3, (decode(1, 5, 2, 2), decode(0, 6, 1, 4))),
    ]
    for plan, order in zip(plans, ("b", "ba", "ab", "ba"), strict=True):
        for name, token in zip(order, runner.execute(plan), strict=True):
            (out_a if name == "a" else out_b).append(token)
    assert out_a == plain(model, a, 3)
    assert out_b == plain(model, b, 4)
    storage.check()


def test_a_reused_slot_keeps_nothing_of_its_last_owner() -> None:
    model, _, runner = device()
    for seq, prompt in enumerate([(5, 6, 7), (9,), (8, 8, 8, 8)]):
        starts = (SeatStart(seq, GREEDY),)
        first = runner.execute(StepPlan(seq, (prefill(seq, prompt, 1, sample=True),), starts))
        assert [*first] == plain(model, prompt, 1)


def test_fork_reads_one_slot_and_leaves_it_unchanged() -> None:
    model, storage, runner = device()
    starts = (SeatStart(0, GREEDY), SeatStart(1, GREEDY), SeatStart(2, GREEDY))
    runner.execute(StepPlan(0, (prefill(0, (4, 5, 6), 1, sample=False),), starts))
    frozen = storage.state.wkv[1].clone()
    source = SlotRef(1, 0)
    rows = tuple(
        Row(seq, seq, (token,), 1, 3, source, SlotRef(seq + 1, 0), sample=True)
        for seq, token in ((1, 7), (2, 8))
    )
    tokens = runner.execute(StepPlan(1, rows))
    assert [*tokens] == [plain(model, (4, 5, 6, t), 1)[0] for t in (7, 8)]
    assert torch.equal(storage.state.wkv[1], frozen)


def test_results_come_in_order_and_close_finishes_what_was_submitted() -> None:
    _, _, runner = device()
    results: queue.SimpleQueue[StepResult] = queue.SimpleQueue()
    runner.start(results.put)
    for step in range(5):
        row = prefill(0, (step + 1, 2), 1, sample=True)
        runner.submit(StepPlan(step, (row,), (SeatStart(0, GREEDY),)))
    runner.close()
    assert [results.get_nowait().step_id for _ in range(5)] == [0, 1, 2, 3, 4]


def test_a_failing_step_reports_its_error_and_the_next_one_runs() -> None:
    _, _, runner = device()
    results: queue.SimpleQueue[StepResult] = queue.SimpleQueue()
    runner.start(results.put)
    good = prefill(0, (1, 2), 1, sample=True)
    bad = prefill(0, (1, 999), 1, sample=True)  # an id beyond the embedding
    runner.submit(StepPlan(0, (bad,), (SeatStart(0, GREEDY),)))
    runner.submit(StepPlan(1, (good,)))
    runner.close()
    failed, fine = results.get_nowait(), results.get_nowait()
    assert failed.error is not None
    assert "IndexError" in failed.error
    assert not failed.is_fatal
    assert fine.error is None
    assert len(fine.tokens) == 1


def test_a_poisoned_state_gives_a_bad_token_for_its_row_only() -> None:
    model, _, runner = device()
    starts = (SeatStart(0, GREEDY), SeatStart(1, GREEDY))
    stale = Row(0, 0, (3, 4), 2, 5, SlotRef(4, 0), SlotRef(1, 0), sample=True)
    tokens = runner.execute(StepPlan(0, (stale, prefill(1, (1, 2), 2, sample=True)), starts))
    assert tokens == (BAD_TOKEN, plain(model, (1, 2), 1)[0])


def test_a_row_that_writes_the_zero_page_is_a_broken_invariant() -> None:
    _, _, runner = device()
    row = Row(0, 0, (1, 2), 2, 0, ZERO, ZERO, sample=False)
    with pytest.raises(AssertionError, match="zero page"):
        runner.execute(StepPlan(0, (row,), (SeatStart(0, GREEDY),)))


def test_page_bytes_are_those_of_the_tensors() -> None:
    storage = StateStorage(LAYOUT, 3, CPU)
    num_bytes = storage.state.wkv[1].nbytes + storage.state.shift[1].nbytes
    assert num_bytes == LAYOUT.page_bytes
