"""Scheduler: whatever happens around it, a request computes what it computes alone."""

from __future__ import annotations

import pytest
from hypothesis import given, settings

from engine.scheduler import DECODE_INTERVAL, Scheduler
from engine.sequence import Sequence
from engine.state.cache import StateCache
from engine.state.tiers import PageTiers
from engine.types import EngineRequest, FinishReason, LiveLimits, SamplingParams
from tests.engine.scripts import Operation, scripts, setups
from tests.engine.simulation import Simulation
from tests.engine.tracked import Setup


@settings(max_examples=300)  # others in every run, besides the 1,000 of test_seeded_bugs.py
@given(setup=setups(), script=scripts())
def test_every_request_equals_its_run_alone(setup: Setup, script: list[Operation]) -> None:
    Simulation(setup).run(script)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@settings(max_examples=10_000)
@given(setup=setups(), script=scripts(min_size=15, max_size=60))
def test_every_request_equals_its_run_alone_deep(setup: Setup, script: list[Operation]) -> None:
    Simulation(setup).run(script)


def ask(
    num_prompt: int, max_tokens: int = 4, priority: int = 0, stop: tuple[int, ...] = ()
) -> EngineRequest:
    return EngineRequest(
        request_id="r",
        prompt_ids=tuple(range(num_prompt)),
        sampling=SamplingParams(max_tokens=max_tokens, stop_token_ids=stop),
        priority=priority,
    )


def rows_of(simulation: Simulation) -> list[tuple[int, int, bool]]:
    """(sequence, tokens, whether it decodes) of each row of the next plan, which is committed."""
    plan = simulation.plan()
    assert plan is not None
    simulation.commit()
    return [(row.seq_id, row.num_tokens, row.tokens is None) for row in plan.rows]


def test_several_prompts_share_a_step_and_the_last_gets_whole_paragraphs() -> None:
    simulation = Simulation(Setup(paragraph_len=4, max_batch_size=4, extra_batch_tokens=8))
    for num_prompt in (3, 4, 30):
        simulation.add(ask(num_prompt))
    # A budget of 16: 9 are left for the third, which gives two paragraphs of 4.
    assert rows_of(simulation) == [(0, 3, False), (1, 4, False), (2, 8, False)]


def test_only_the_last_chunk_is_ragged() -> None:
    simulation = Simulation(Setup(paragraph_len=4, max_batch_size=2))
    simulation.add(ask(15, max_tokens=1))
    assert [rows_of(simulation)[0][1] for _ in range(4)] == [4, 4, 4, 3]


def test_decode_first_serves_decode_rows_before_prefill() -> None:
    simulation = Simulation(Setup(paragraph_len=4, max_batch_size=2))
    simulation.add(ask(2))
    rows_of(simulation)
    simulation.add(ask(30))
    assert rows_of(simulation) == [(0, 1, True), (1, 4, False)]


def test_prefill_first_lets_a_decode_row_through_each_kth_step() -> None:
    simulation = Simulation(Setup(paragraph_len=3, max_batch_size=3, decode_first=False, depth=1))
    simulation.add(ask(2, max_tokens=4))
    rows_of(simulation)
    simulation.add(ask(200))
    decodes = [any(is_decode for _, _, is_decode in rows_of(simulation)) for _ in range(12)]
    assert decodes == ([False] * (DECODE_INTERVAL - 1) + [True]) * 3


def test_prefill_first_decodes_with_what_is_left() -> None:
    simulation = Simulation(Setup(paragraph_len=4, max_batch_size=2, decode_first=False))
    simulation.add(ask(2))
    rows_of(simulation)
    simulation.add(ask(3))
    assert rows_of(simulation) == [(1, 3, False), (0, 1, True)]


def test_look_ahead_plans_decode_rows_before_their_input_is_known() -> None:
    simulation = Simulation(Setup(depth=3))
    simulation.add(ask(2, max_tokens=3))
    plans = [simulation.plan() for _ in range(3)]
    assert [plan.rows[0].tokens for plan in plans if plan is not None] == [(0, 1), None, None]


def test_look_ahead_stops_at_max_tokens() -> None:
    simulation = Simulation(Setup(depth=3))
    simulation.add(ask(2, max_tokens=2))
    assert [simulation.plan() is None for _ in range(3)] == [False, False, True]


def test_a_waiting_request_of_higher_priority_is_admitted_first() -> None:
    simulation = Simulation(Setup(max_batch_size=1, num_slots=1))
    for priority in (0, 0, 5):
        simulation.add(ask(1, max_tokens=1, priority=priority))
    assert [rows_of(simulation)[0][0] for _ in range(3)] == [2, 0, 1]


def test_a_free_seat_without_a_free_slot_admits_nobody() -> None:
    simulation = Simulation(Setup(max_batch_size=4, num_slots=1))
    simulation.add(ask(1))
    simulation.add(ask(1))
    assert rows_of(simulation) == [(0, 1, False)]
    assert simulation.scheduler.num_waiting == 1


def test_a_free_slot_without_a_free_seat_admits_nobody() -> None:
    simulation = Simulation(Setup(max_batch_size=1, num_slots=4))
    simulation.add(ask(1))
    simulation.add(ask(1))
    assert rows_of(simulation) == [(0, 1, False)]
    assert simulation.scheduler.num_waiting == 1


def test_an_aborted_slot_is_reused_while_its_last_row_is_in_flight() -> None:
    simulation = Simulation(Setup(max_batch_size=1, num_slots=1, depth=2))
    simulation.add(ask(2))
    first = simulation.plan()
    simulation.abort(0)
    simulation.add(ask(3))
    second = simulation.plan()
    assert first is not None
    assert second is not None
    assert first.rows[0].dst.slot == second.rows[0].dst.slot
    assert first.rows[0].dst != second.rows[0].dst
    simulation.drain()


def test_a_failed_step_ends_its_rows_and_nobody_else() -> None:
    simulation = Simulation(Setup(max_batch_size=2, paragraph_len=2, depth=1))
    failing = simulation.add(ask(8))
    simulation.plan()
    spared = simulation.add(ask(2))
    simulation.commit(fails=True)
    assert failing.seq.finish_reason is FinishReason.ERROR
    assert failing.seq.error == "injected failure"
    simulation.drain()
    assert spared.seq.finish_reason is FinishReason.LENGTH


def test_logits_that_are_not_finite_end_the_request_with_an_error() -> None:
    simulation = Simulation(Setup(bad_every=1))
    tracked = simulation.add(ask(2))
    simulation.drain()
    assert tracked.seq.finish_reason is FinishReason.ERROR
    assert tracked.seq.error == "logits of token 2 are not finite"


def test_a_stop_token_ends_the_request_and_counts_as_output() -> None:
    simulation = Simulation(Setup())
    first = simulation.add(ask(2))
    simulation.drain()
    again = Simulation(Setup())
    stopped = again.add(ask(2, stop=(first.tokens[1],)))
    again.drain()
    assert stopped.seq.finish_reason is FinishReason.STOP
    assert stopped.tokens == first.tokens[:2]


def test_take_waiting_gives_everybody_who_has_not_begun() -> None:
    simulation = Simulation(Setup(max_batch_size=1))
    for _ in range(3):
        simulation.add(ask(1))
    simulation.plan()
    assert [seq.seq_id for seq in simulation.scheduler.take_waiting()] == [1, 2]
    assert simulation.scheduler.num_waiting == 0
    assert simulation.scheduler.num_running == 1


def limits(max_batch_tokens: int) -> LiveLimits:
    return LiveLimits(
        decode_first=True, max_batch_tokens=max_batch_tokens, max_waiting=1, max_context_len=0
    )


def make_scheduler(live: LiveLimits) -> Scheduler:
    return Scheduler(StateCache(PageTiers(1), 4, None), live, max_batch_size=8)


def test_a_budget_too_small_for_a_paragraph_beside_a_full_batch_is_refused() -> None:
    with pytest.raises(ValueError, match=r"max_batch_tokens = 11: must be at least .* = 12"):
        make_scheduler(limits(11))


def test_refused_limits_leave_the_old_ones_in_force() -> None:
    scheduler = make_scheduler(limits(12))
    with pytest.raises(ValueError, match="max_batch_tokens = 1:"):
        scheduler.reconfigure(limits(1))
    assert scheduler.limits == limits(12)


def test_sizes_below_one_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="paragraph_len = 0"):
        StateCache(PageTiers(1), 0, None)
    with pytest.raises(ValueError, match="max_batch_size = 0"):
        Scheduler(StateCache(PageTiers(1), 4, None), limits(12), max_batch_size=0)


def test_a_sequence_cannot_finish_twice() -> None:
    scheduler = make_scheduler(limits(12))
    seq = Sequence(0, ask(1), 1)
    scheduler.add(seq)
    scheduler.finish(seq, FinishReason.ABORT)
    with pytest.raises(AssertionError, match="finished twice"):
        scheduler.finish(seq, FinishReason.ABORT)
