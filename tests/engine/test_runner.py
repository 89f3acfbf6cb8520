"""The device thread on a small model: the model alone is the oracle of every plan."""

from __future__ import annotations

import math
import queue
from dataclasses import replace
from itertools import permutations

import pytest
import torch

from engine.executor import Read
from engine.plan import BAD_TOKEN, Row, SlotRef, StepPlan, StepResult
from engine.sampler import Draws
from engine.types import SamplingParams
from tests.engine.device import (
    GREEDY,
    ZERO,
    Device,
    alone,
    bytes_of,
    decode,
    draw_again,
    load,
    make_device,
    prefill,
    random_model,
    raw_logits,
    start,
    store,
)


def test_mixed_steps_give_each_sequence_what_it_gets_alone() -> None:
    model, storage, _, runner = make_device(random_model())
    a, b = (5, 6, 7, 8, 9), (1, 2, 3)
    starts = (start(0), start(1))
    out_a: list[int] = []
    out_b: list[int] = []
    plans = [
        StepPlan(0, (prefill(0, a[:3], 1, sample=False), prefill(1, b, 2)), starts),
        StepPlan(1, (decode(1, 3, 2, 3), prefill(0, a[3:], 1, position=3))),
        StepPlan(2, (decode(0, 5, 1, 1), decode(1, 4, 3, 2))),  # b moves between slots
        StepPlan(3, (decode(1, 5, 2, 2), decode(0, 6, 1, 4))),
    ]
    for plan, order in zip(plans, ("b", "ba", "ab", "ba"), strict=True):
        for name, token in zip(order, runner.execute(plan).tokens, strict=True):
            (out_a if name == "a" else out_b).append(token)
    assert out_a == alone(model, a, 3)
    assert out_b == alone(model, b, 4)
    storage.check()


def test_a_reused_slot_keeps_nothing_of_its_last_owner() -> None:
    model, _, _, runner = make_device(random_model())
    for seq, prompt in enumerate([(5, 6, 7), (9,), (8, 8, 8, 8)]):
        starts = (start(seq),)
        first = runner.execute(StepPlan(seq, (prefill(seq, prompt, 1),), starts))
        assert [*first.tokens] == alone(model, prompt, 1)


def test_fork_reads_one_slot_and_leaves_it_unchanged() -> None:
    model, storage, _, runner = make_device(random_model())
    starts = (start(0), start(1), start(2))
    runner.execute(StepPlan(0, (prefill(0, (4, 5, 6), 1, sample=False),), starts))
    frozen = storage.state.wkv[1].clone()
    source = SlotRef(1, 0)
    rows = tuple(
        Row(seq, seq, (token,), 1, 3, source, SlotRef(seq + 1, 0), sample=True)
        for seq, token in ((1, 7), (2, 8))
    )
    draws = runner.execute(StepPlan(1, rows))
    assert [*draws.tokens] == [alone(model, (4, 5, 6, t), 1)[0] for t in (7, 8)]
    assert torch.equal(storage.state.wkv[1], frozen)


def test_results_come_in_order_and_close_finishes_what_was_submitted() -> None:
    runner = make_device(random_model()).runner
    results: queue.SimpleQueue[StepResult] = queue.SimpleQueue()
    runner.start(results.put)
    for step in range(5):
        row = prefill(0, (step + 1, 2), 1)
        runner.submit(StepPlan(step, (row,), (start(0),)))
    runner.close()
    assert [results.get_nowait().step_id for _ in range(5)] == [0, 1, 2, 3, 4]


def test_a_failing_step_reports_its_error_and_the_next_one_runs() -> None:
    runner = make_device(random_model()).runner
    results: queue.SimpleQueue[StepResult] = queue.SimpleQueue()
    runner.start(results.put)
    good = prefill(0, (1, 2), 1)
    bad = prefill(0, (1, 999), 1)  # an id beyond the embedding
    runner.submit(StepPlan(0, (bad,), (start(0),)))
    runner.submit(StepPlan(1, (good,)))
    runner.close()
    failed, fine = results.get_nowait(), results.get_nowait()
    assert failed.error is not None
    assert "IndexError" in failed.error
    assert not failed.is_fatal
    assert fine.error is None
    assert len(fine.tokens) == 1


def test_a_poisoned_state_gives_a_bad_token_for_its_row_only() -> None:
    model, _, _, runner = make_device(random_model())
    starts = (start(0), start(1))
    stale = Row(0, 0, (3, 4), 2, 5, SlotRef(4, 0), SlotRef(1, 0), sample=True)
    draws = runner.execute(StepPlan(0, (stale, prefill(1, (1, 2), 2)), starts))
    assert draws.tokens == (BAD_TOKEN, alone(model, (1, 2), 1)[0])


def test_a_poisoned_state_is_told_of_a_row_that_draws_nothing() -> None:
    runner = make_device(random_model()).runner
    stale = Row(0, 0, (3, 4), 2, 5, SlotRef(4, 0), SlotRef(1, 0), sample=False)
    stale_one = Row(1, 1, (3,), 1, 5, SlotRef(4, 0), SlotRef(2, 0), sample=False)
    sound = prefill(2, (1, 2), 3, sample=False)
    starts = (start(0), start(1), start(2))
    draws = runner.execute(StepPlan(0, (stale, stale_one, sound), starts))
    assert draws.tokens == ()
    assert sorted(draws.unsound) == [0, 1]


@pytest.mark.parametrize("error", [SystemExit("told to end"), KeyboardInterrupt()])
def test_what_would_end_the_thread_is_a_fatal_error(
    monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    runner = make_device(random_model()).runner

    def issue(plan: StepPlan) -> Read:
        raise error

    monkeypatch.setattr(runner, "issue", issue)
    results: queue.SimpleQueue[StepResult] = queue.SimpleQueue()
    runner.start(results.put)
    runner.submit(StepPlan(0, (prefill(0, (1, 2), 1),), (start(0),)))
    runner.close()
    result = results.get_nowait()
    assert result.is_fatal
    assert type(error).__name__ in (result.error or "")


def test_a_row_that_writes_the_zero_page_is_a_broken_invariant() -> None:
    runner = make_device(random_model()).runner
    row = Row(0, 0, (1, 2), 2, 0, ZERO, ZERO, sample=False)
    with pytest.raises(AssertionError, match="zero page"):
        runner.execute(StepPlan(0, (row,), (start(0),)))


SAMPLED = SamplingParams(temperature=1.3, top_p=0.9, presence_penalty=0.4, banned_token_ids=(7,))
ALL_KINDS = [GREEDY, *(replace(SAMPLED, seed=seed) for seed in range(5))]


@pytest.mark.parametrize("sampling", ALL_KINDS, ids=lambda p: f"T{p.temperature}-seed{p.seed}")
@pytest.mark.parametrize("prompt", [(9,), (4, 5, 6)], ids=["decode", "prefill"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_a_row_of_no_tokens_draws_what_the_row_that_left_the_logits_drew(
    dtype: torch.dtype, prompt: tuple[int, ...], sampling: SamplingParams
) -> None:
    device = make_device(random_model(dtype))
    sampling = replace(sampling, has_logprobs=True)
    past = [*range(20, 60)]  # penalties, whose rounding depends on the type of the logits
    starts = [start(seq, sampling, output=past) for seq in range(3)]
    first = device.run(prefill(0, prompt, 1, keep_logits=True), starts=(starts[0],))
    page = bytes_of(device.storage.slot_tensors(1))
    for seq in (1, 2):  # twice: the draw has not eaten the logits
        again = device.run(draw_again(seq, len(prompt), 1), starts=(starts[seq],))
        assert again == first
    assert bytes_of(device.storage.slot_tensors(1)) == page
    seat_of_its_own = make_device(device.model)
    only = seat_of_its_own.run(prefill(0, prompt, 1), starts=(starts[0],))
    assert only == first


def test_sequences_forked_from_one_page_equal_those_that_ran_alone() -> None:
    """n = 4: one prompt, four seeds, three of them without a forward pass for it."""
    device = make_device(random_model(), num_slots=5)
    prompt, num_tokens = (4, 5, 6, 7), 5
    params = [replace(SAMPLED, seed=seed) for seed in range(4)]
    starts = [start(seq, params[seq]) for seq in range(4)]
    out = [
        device.run(prefill(0, prompt, 1, keep_logits=True), starts=(starts[0],)).tokens,
        device.run(*(draw_again(seq, 4, 1) for seq in (3, 1)), starts=tuple(starts[1:])).tokens,
        device.run(draw_again(2, 4, 1)).tokens,
    ]
    tokens = {seq: [token] for seq, token in zip((0, 3, 1, 2), sum(out, ()), strict=True)}
    for step in range(num_tokens - 1):
        rows = [decode(seq, 4 + step, seq + 2 if step else 1, seq + 2) for seq in range(4)]
        for seq, token in enumerate(device.run(*rows).tokens):
            tokens[seq].append(token)
    for seq in range(4):
        assert tokens[seq] == alone(device.model, prompt, num_tokens, params[seq])
    assert len({tuple(out) for out in tokens.values()}) == 4, "the seeds made no difference"


def test_rows_of_all_kinds_in_one_plan_draw_what_they_draw_alone_and_in_plan_order() -> None:
    prompts = {0: (4, 5, 6), 1: (7, 8), 2: (9,), 3: (10, 11, 12)}
    params = {seq: replace(SAMPLED, seed=seq, has_logprobs=seq != 2) for seq in prompts}
    expected = {}
    rows = {
        0: prefill(0, prompts[0], 1),
        1: draw_again(1, 2, 2),
        2: prefill(2, prompts[2], 3),
        3: prefill(3, prompts[3][2:], 4, position=2),
    }

    def prepared() -> Device:
        device = make_device(random_model())
        before = (
            prefill(1, prompts[1], 2, sample=False, keep_logits=True),
            prefill(3, prompts[3][:2], 4, sample=False),
        )
        starts = tuple(start(seq, sampling) for seq, sampling in params.items())
        assert device.run(*before, starts=starts) == Draws(())
        return device

    for seq, row in rows.items():
        draws = prepared().run(row)
        expected[seq] = (draws.tokens[0], draws.logprobs[0] if draws.logprobs else math.nan)
        assert [draws.tokens[0]] == alone(random_model(), prompts[seq], 1, params[seq])
    for order in permutations(rows):
        draws = prepared().run(*(rows[seq] for seq in order))
        assert draws.tokens == tuple(expected[seq][0] for seq in order)
        for seq, logprob in zip(order, draws.logprobs, strict=True):
            assert logprob == pytest.approx(expected[seq][1], abs=1e-12, nan_ok=True)


def test_kept_logits_are_those_of_the_model_before_penalties_and_bans() -> None:
    device = make_device(random_model())
    sampling = replace(GREEDY, presence_penalty=50.0, banned_token_ids=(1, 2, 3))
    out = device.run(prefill(0, (4, 5), 1), starts=(start(0, sampling),)).tokens
    rows = (
        decode(0, 2, 1, 2)._replace(keep_logits=True),
        prefill(1, (8, 9), 3, sample=False, keep_logits=True),
        prefill(2, (10, 11), 4),
    )
    tokens = device.run(*rows, starts=(start(1), start(2))).tokens
    assert tokens[1:] == tuple(alone(device.model, (10, 11), 1))
    for slot, tokens in ((2, [4, 5, *out]), (3, [8, 9])):
        expected = raw_logits(device.model, tokens)
        assert torch.allclose(device.storage.logits[slot], expected, rtol=0, atol=1e-12)
    for slot in (1, 4):
        assert device.storage.logits[slot].isnan().all(), "logits were kept that nobody asked for"


def test_a_page_without_logits_gives_a_bad_token_rather_than_those_of_another() -> None:
    device = make_device(random_model())
    device.run(prefill(0, (4, 5), 1), starts=(start(0),))
    assert device.run(draw_again(0, 2, 1)).tokens == (BAD_TOKEN,)


@pytest.mark.parametrize("broken", ["no draw", "a page to write"])
def test_a_row_of_no_tokens_must_draw_and_write_nothing(broken: str) -> None:
    device = make_device(random_model())
    row = draw_again(0, 2, 1)
    row = row._replace(sample=False) if broken == "no draw" else row._replace(keep_logits=True)
    with pytest.raises(AssertionError, match="sequence 0"):
        device.run(row, starts=(start(0),))


@pytest.mark.parametrize("num_before", [1, 2, 20])
@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_a_sequence_that_comes_back_to_another_seat_goes_on_as_if_it_had_stayed(
    sampling: SamplingParams, num_before: int
) -> None:
    sampling = replace(sampling, presence_penalty=1.5, repetition_penalty=0.5, penalty_decay=0.97)
    device, prompt = make_device(random_model()), (4, 5, 6)
    out = alone(device.model, prompt, 40, sampling)
    device.run(prefill(0, prompt, 1), starts=(start(0, sampling),))
    for step in range(num_before - 1):
        device.run(decode(0, 3 + step, 1, 1))

    def goes_on(known: list[int]) -> list[int]:
        device.run(moves=(store(1, 2), load(2, 4)), starts=(start(3, sampling, output=known),))
        positions = range(2 + num_before, 2 + len(out))
        return [device.run(decode(3, position, 4, 4)).tokens[0] for position in positions]

    assert goes_on(out[:num_before]) == out[num_before:]
    if num_before > 2:
        forgetful = goes_on(out[num_before - 1 : num_before])
        assert forgetful != out[num_before:], "penalties make no difference here"


def test_a_plan_may_hold_moves_only() -> None:
    device = make_device(random_model())
    results: queue.SimpleQueue[StepResult] = queue.SimpleQueue()
    device.runner.start(results.put)
    device.runner.submit(StepPlan(3, (), moves=(store(1, 1),)))
    device.runner.close()
    result = results.get_nowait()
    assert (result.step_id, result.tokens, result.logprobs, result.error) == (3, (), (), None)


def test_a_failing_move_is_a_failed_step_and_the_next_one_runs() -> None:
    device = make_device(random_model(), num_frames=2)
    results: queue.SimpleQueue[StepResult] = queue.SimpleQueue()
    device.runner.start(results.put)
    device.runner.submit(StepPlan(0, (), moves=(store(1, 3),)))  # a frame there is not
    device.runner.submit(StepPlan(1, (prefill(0, (1, 2), 1),), (start(0),)))
    device.runner.close()
    failed, fine = results.get_nowait(), results.get_nowait()
    assert failed.error is not None
    assert "frame 3" in failed.error
    assert not failed.is_fatal
    assert fine.error is None
    assert len(fine.tokens) == 1


def test_results_carry_log_probabilities_where_sampling_asks() -> None:
    device = make_device(random_model())
    results: queue.SimpleQueue[StepResult] = queue.SimpleQueue()
    device.runner.start(results.put)
    rows = (prefill(0, (1, 2), 1), prefill(1, (3, 4), 2))
    asks = replace(GREEDY, has_logprobs=True)
    device.runner.submit(StepPlan(0, rows, (start(0), start(1))))
    device.runner.submit(StepPlan(1, rows, (start(0), start(1, asks))))
    device.runner.close()
    silent, told = results.get_nowait(), results.get_nowait()
    assert silent.logprobs == ()
    assert silent.tokens == told.tokens
    expected = raw_logits(device.model, [3, 4]).log_softmax(-1)[told.tokens[1]]
    assert math.isnan(told.logprobs[0])
    assert told.logprobs[1] == pytest.approx(float(expected), abs=1e-12)
