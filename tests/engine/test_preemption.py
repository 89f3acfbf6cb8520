"""Giving way and coming back, case by case: nobody's text changes, and nobody waits for ever.

Paragraphs have 4 tokens. Every case runs in a Simulation, which checks each plan and every text.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from engine.plan import MoveKind, StepPlan
from engine.sequence import Sequence, SequenceStatus
from engine.turns import choose_victim
from engine.types import EngineRequest, FinishReason, SamplingParams
from tests.engine.simulation import LOST, Simulation
from tests.engine.tracked import Setup, Tracked

ONE = Setup(num_slots=1, max_batch_size=1, num_frames=2, paragraph_len=4, depth=2)


def ask(
    num_prompt: int = 3, max_tokens: int = 8, priority: int = 0, seed: int = 0
) -> EngineRequest:
    return EngineRequest(
        request_id="r",
        prompt_ids=tuple(range(num_prompt)),
        sampling=SamplingParams(max_tokens=max_tokens, seed=seed, stop_token_ids=()),
        priority=priority,
    )


def steps(simulation: Simulation, num_steps: int) -> list[StepPlan]:
    plans = []
    for _ in range(num_steps):
        plan = simulation.plan()
        simulation.commit()
        plans += [] if plan is None else [plan]
    return plans


def ended(simulation: Simulation) -> list[int]:
    """Who has ended, in this order."""
    order: list[int] = []
    while len(order) < len(simulation.tracked):
        steps(simulation, 1)
        done = [seq_id for seq_id, one in simulation.tracked.items() if one.seq.is_finished]
        order += [seq_id for seq_id in done if seq_id not in order]
    return order


def is_complete(tracked: Tracked) -> bool:
    return tuple(tracked.tokens) == tracked.answer.token_ids


# Priority


def test_a_higher_priority_takes_the_place_of_a_lower_one_who_comes_back() -> None:
    simulation = Simulation(ONE)
    low = simulation.add(ask(max_tokens=12))
    steps(simulation, 4)
    high = simulation.add(ask(priority=1, max_tokens=3))
    (plan,) = steps(simulation, 1)
    assert [move.kind for move in plan.moves] == [MoveKind.STORE]
    assert [row.seq_id for row in plan.rows] == [1]
    assert low.seq.status is SequenceStatus.SWAPPED
    assert (simulation.scheduler.num_running, simulation.scheduler.num_waiting) == (2, 0)
    assert ended(simulation) == [1, 0]
    simulation.drain()
    assert simulation.num_swaps == 1
    assert is_complete(low)
    assert is_complete(high)


def test_who_comes_back_brings_its_tokens_and_feeds_the_last_one() -> None:
    simulation = Simulation(ONE)
    low = simulation.add(ask(max_tokens=12))
    steps(simulation, 4)
    simulation.add(ask(priority=1, max_tokens=1))
    plans = steps(simulation, 4)
    back = next(plan for plan in plans if plan.starts and plan.rows[0].seq_id == 0)
    assert [move.kind for move in back.moves] == [MoveKind.LOAD]
    assert back.starts[0].output_ids == tuple(low.tokens[: len(back.starts[0].output_ids)])
    assert len(back.starts[0].output_ids) >= 4
    assert (back.rows[0].tokens, back.rows[0].num_tokens) == (None, 1)
    assert back.rows[0].src == back.moves[0].slot
    simulation.drain()


def test_an_equal_priority_waits() -> None:
    simulation = Simulation(ONE)
    for _ in range(2):
        simulation.add(ask())
    assert ended(simulation) == [0, 1]
    assert simulation.num_swaps == 0


def test_who_gave_way_to_priority_is_the_next_of_its_own() -> None:
    simulation = Simulation(ONE)
    for _ in range(3):
        simulation.add(ask())
    steps(simulation, 3)
    simulation.add(ask(priority=1))
    assert ended(simulation) == [3, 0, 1, 2]


def test_the_latest_of_the_lowest_priority_gives_way() -> None:
    seqs = [Sequence(i, ask(priority=priority), 8) for i, priority in enumerate((0, -1, -1, 1))]
    first = Sequence(9, ask(priority=1), 8)
    assert choose_victim(seqs, first, 0) is seqs[2]
    assert choose_victim(seqs[3:], first, 0) is None


def test_of_those_who_had_their_slice_the_one_with_most_gives_way_to_its_like() -> None:
    seqs = [Sequence(i, ask(priority=i // 2), 8) for i in range(4)]
    for seq, num_tokens in zip(seqs, (3, 6, 9, 9), strict=True):
        seq.num_slice_tokens = num_tokens
    first = Sequence(9, ask(), 8)
    assert choose_victim(seqs, first, 5) is seqs[1]
    assert choose_victim(seqs, first, 7) is None
    assert choose_victim(seqs, first, 0) is None


# Time slices


@pytest.mark.parametrize("depth", [1, 3])
def test_many_sessions_share_few_seats_and_all_progress(depth: int) -> None:
    setup = Setup(
        num_slots=2,
        max_batch_size=2,
        num_frames=50,
        paragraph_len=4,
        depth=depth,
        time_slice_tokens=4,
    )
    simulation = Simulation(setup)
    sessions = [simulation.add(ask(1 + i % 9, max_tokens=20, seed=i)) for i in range(40)]
    while min(len(one.tokens) for one in sessions) < 5:
        assert steps(simulation, 1), "nobody goes on"
        most = max(len(one.tokens) for one in sessions if not one.seq.is_finished)
        assert most <= 12, "somebody is far ahead though others wait"
    simulation.drain()
    assert all(is_complete(one) for one in sessions)
    assert simulation.num_swaps >= 80


def test_a_time_slice_is_nothing_to_those_who_are_alone() -> None:
    simulation = Simulation(replace(ONE, time_slice_tokens=2))
    simulation.add(ask(max_tokens=12))
    simulation.drain()
    assert simulation.num_swaps == 0


def test_who_had_its_time_slice_goes_to_the_end_of_the_line() -> None:
    simulation = Simulation(replace(ONE, num_frames=4, time_slice_tokens=2))
    for _ in range(3):
        simulation.add(ask(1, max_tokens=5))
    order: list[int] = []
    while any(not one.seq.is_finished for one in simulation.tracked.values()):
        for plan in steps(simulation, 1):
            order += [row.seq_id for row in plan.rows if plan.starts]
    assert order[:6] == [0, 1, 2, 0, 1, 2]
    simulation.drain()


# What is in the way


def test_without_frames_nobody_gives_way() -> None:
    simulation = Simulation(replace(ONE, num_frames=0, time_slice_tokens=2))
    simulation.add(ask())
    steps(simulation, 2)
    simulation.add(ask(priority=5))
    simulation.add(ask())
    assert ended(simulation) == [0, 1, 2]
    simulation.drain()
    assert simulation.num_swaps == 0


def test_with_all_frames_taken_nobody_gives_way() -> None:
    simulation = Simulation(replace(ONE, num_frames=1))
    for priority in range(3):
        simulation.add(ask(priority=priority))
        steps(simulation, 3)
    assert simulation.num_swaps == 1
    assert ended(simulation) == [1, 2, 0]
    simulation.drain()


def test_a_prompt_gives_way_between_its_chunks() -> None:
    simulation = Simulation(ONE)
    low = simulation.add(ask(30, max_tokens=3))
    steps(simulation, 2)
    assert 0 < low.num_fed < 30
    simulation.add(ask(priority=1, max_tokens=2))
    steps(simulation, 1)
    assert low.is_away
    assert ended(simulation) == [1, 0]
    simulation.drain()
    assert is_complete(low)


def test_who_gave_way_and_is_aborted_leaves_nothing() -> None:
    simulation = Simulation(ONE)
    low = simulation.add(ask(max_tokens=12))
    steps(simulation, 3)
    simulation.add(ask(priority=1))
    simulation.plan()
    assert low.is_away
    simulation.abort(0)
    assert low.seq.finish_reason is FinishReason.ABORT
    assert simulation.tiers.num_frames_used == 1  # its move is in flight
    simulation.drain()
    assert simulation.tiers.num_frames_used == 0


def test_who_gave_way_in_a_step_that_failed_ends_with_an_error() -> None:
    simulation = Simulation(ONE)
    low = simulation.add(ask(max_tokens=12))
    steps(simulation, 3)
    high = simulation.add(ask(priority=1))
    simulation.plan()
    simulation.commit(fails=True)
    simulation.drain()
    assert (low.seq.finish_reason, low.seq.error) == (FinishReason.ERROR, LOST)
    assert high.seq.finish_reason is FinishReason.ERROR
    assert simulation.tiers.num_frames_used == 0


def test_who_comes_back_in_a_step_that_fails_ends_with_an_error() -> None:
    simulation = Simulation(ONE)
    low = simulation.add(ask(max_tokens=12))
    steps(simulation, 3)
    simulation.add(ask(priority=1, max_tokens=1))
    while True:
        plan = simulation.plan()
        if plan is not None and any(move.kind is MoveKind.LOAD for move in plan.moves):
            break
        simulation.commit()
    while simulation.in_flight:
        simulation.commit(fails=len(simulation.in_flight) == 1)
    assert (low.seq.finish_reason, low.seq.error) == (FinishReason.ERROR, "injected failure")
    simulation.drain()


def test_a_step_that_fails_leaves_those_who_had_no_row_in_it() -> None:
    simulation = Simulation(ONE)
    low = simulation.add(ask(max_tokens=12))
    steps(simulation, 3)
    simulation.add(ask(priority=1))
    steps(simulation, 3)
    assert low.is_away
    simulation.plan()
    simulation.commit(fails=True)
    simulation.drain()
    assert is_complete(low)


def test_rows_in_flight_of_who_gave_way_still_count() -> None:
    simulation = Simulation(replace(ONE, depth=3))
    low = simulation.add(ask(max_tokens=12))
    for _ in range(2):
        simulation.plan()
    num_rows = low.seq.num_rows_in_flight
    simulation.add(ask(priority=1, max_tokens=1))
    simulation.plan()
    assert low.is_away
    assert (num_rows, low.seq.num_rows_in_flight, len(low.tokens)) == (2, 2, 0)
    simulation.commit()
    simulation.commit()
    assert len(low.tokens) == 2
    simulation.drain()
    assert is_complete(low)


def test_a_draw_from_kept_logits_is_fed_before_its_sequence_gives_way() -> None:
    setup = replace(ONE, num_slots=2, has_cache=True)
    simulation = Simulation(setup)
    simulation.add(ask(max_tokens=1))
    simulation.drain()
    low = simulation.add(ask(max_tokens=6))
    first = simulation.plan()
    assert first is not None
    assert [row.num_tokens for row in first.rows] == [0]
    simulation.add(ask(2, priority=1))
    second = simulation.plan()
    assert second is not None
    assert [(row.seq_id, row.num_tokens) for row in second.rows] == [(1, 1)]
    assert second.moves == ()
    simulation.plan()
    simulation.drain()
    assert is_complete(low)


def test_a_sequence_taken_out_by_hand_comes_back() -> None:
    simulation = Simulation(ONE)
    only = simulation.add(ask(max_tokens=9))
    for _ in range(3):
        steps(simulation, 2)
        simulation.swap_out(0)
    simulation.drain()
    assert simulation.num_swaps == 3
    assert is_complete(only)


def test_one_that_waits_or_has_ended_cannot_be_swapped_out() -> None:
    simulation = Simulation(ONE)
    first, second = simulation.add(ask(max_tokens=1)), simulation.add(ask())
    assert not simulation.scheduler.swap_out(second.seq)
    steps(simulation, 1)
    assert first.seq.is_finished
    assert not simulation.scheduler.swap_out(first.seq)
    simulation.drain()
