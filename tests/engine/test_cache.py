"""StateCache, case by case: what is left where, who begins from it, and what gives way to whom.

Paragraphs have 4 tokens. Every case runs in a Simulation, which checks all pages at every step
and all answers at the end.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from engine.plan import StepPlan
from engine.types import CacheStats, EngineRequest, FinishReason, SamplingParams
from tests.engine.simulation import Simulation
from tests.engine.tracked import Setup, Tracked

SETUP = Setup(has_cache=True, num_slots=8, paragraph_len=4, extra_batch_tokens=64, depth=2)


def ask(
    *prompt_ids: int, max_tokens: int = 1, salt: str = "", hints: tuple[int, ...] = ()
) -> EngineRequest:
    return EngineRequest(
        request_id="r",
        prompt_ids=prompt_ids,
        sampling=SamplingParams(max_tokens=max_tokens, stop_token_ids=()),
        cache_salt=salt,
        snapshot_hints=hints,
    )


def serve(simulation: Simulation, *requests: EngineRequest) -> list[int]:
    """Requests that arrive together, to their ends; how many tokens of each were cached."""
    tracked = [simulation.add(request) for request in requests]
    simulation.drain()
    return [one.num_cached for one in tracked]


def snapshots(simulation: Simulation) -> list[int]:
    """Numbers of tokens of the pages there are."""
    return sorted(page.num_tokens for page in simulation.cache.index)


def plan(simulation: Simulation) -> StepPlan:
    made = simulation.plan()
    assert made is not None
    return made


def rows_of(made: StepPlan) -> list[tuple[int, int, int]]:
    """(sequence, position, tokens) of each row."""
    return [(row.seq_id, row.position, row.num_tokens) for row in made.rows]


# Where snapshots are left


def test_a_prompt_leaves_its_last_boundary_and_its_end() -> None:
    for num_prompt, expected in ((3, [3]), (4, [4]), (5, [4, 5]), (8, [4, 8]), (11, [8, 11])):
        simulation = Simulation(SETUP)
        serve(simulation, ask(*range(num_prompt)))
        assert snapshots(simulation) == expected
        assert simulation.num_forks == len(expected) - 1  # the end costs nothing here


def test_a_longer_prompt_computes_only_the_rest() -> None:
    simulation = Simulation(SETUP)
    cached = [serve(simulation, ask(*range(num)))[0] for num in (11, 12, 13, 8)]
    # The end of the first is of use to nobody else; of 8 tokens, 4 might be cached, but nobody
    # left them, and the page of 8 has no logits.
    assert cached == [0, 8, 12, 0]
    assert simulation.cache.stats.num_queried_tokens == 11 + 12 + 13 + 8
    assert simulation.cache.stats.num_hit_tokens == 8 + 12
    assert simulation.num_hits == 2
    assert simulation.num_draws_kept == 0


def test_the_point_where_two_prompts_part_is_left_by_the_second() -> None:
    simulation = Simulation(SETUP)
    common = range(13)
    prompts = [ask(*common, *range(first, first + 8)) for first in (100, 200, 300)]
    assert [serve(simulation, prompt) for prompt in prompts] == [[0], [0], [12]]
    assert snapshots(simulation) == [12, 20, 20, 20, 21, 21, 21]


def test_a_branch_that_would_save_little_is_not_left() -> None:
    simulation = Simulation(replace(SETUP, min_snapshot_tokens=13))
    prompts = [ask(*range(13), *range(first, first + 8)) for first in (100, 200, 300)]
    assert [serve(simulation, prompt) for prompt in prompts] == [[0], [0], [0]]


def test_hints_are_rounded_down_to_the_grid() -> None:
    simulation = Simulation(SETUP)
    serve(simulation, ask(*range(21), hints=(3, 7, 13)))
    assert snapshots(simulation) == [4, 12, 20, 21]
    assert serve(simulation, ask(*range(13), 99, 99)) == [12]


def test_hints_keep_their_distance() -> None:
    simulation = Simulation(replace(SETUP, min_snapshot_tokens=8))
    serve(simulation, ask(*range(41), hints=(4, 8, 12, 16)))
    assert snapshots(simulation) == [8, 16, 40, 41]


def test_of_many_hints_the_first_and_the_deepest_count() -> None:
    simulation = Simulation(SETUP)
    serve(simulation, ask(*range(41), hints=(4, 8, 12, 16, 20, 24, 28)))
    assert snapshots(simulation) == [4, 28, 40, 41]


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_decoding_leaves_its_latest_boundary_only(depth: int) -> None:
    simulation = Simulation(replace(SETUP, depth=depth))
    first = simulation.add(ask(*range(5), max_tokens=11))
    simulation.drain()
    # 5 + 10 tokens were fed: boundaries 8 and 12 were passed, 4 and 5 are the prompt's.
    assert snapshots(simulation) == [4, 5, 12]
    assert simulation.num_forks == 4
    assert serve(simulation, ask(*range(5), *first.tokens, 1, 2, 3)) == [12]


def test_a_sequence_that_ends_on_the_grid_leaves_its_slot() -> None:
    simulation = Simulation(SETUP)
    first = simulation.add(ask(*range(5), max_tokens=4))
    simulation.drain()
    assert snapshots(simulation) == [4, 5, 8]
    assert simulation.num_forks == 2
    assert serve(simulation, ask(*range(5), *first.tokens, 1)) == [8]


def test_a_stop_token_is_in_no_snapshot() -> None:
    simulation = Simulation(replace(SETUP, depth=3))
    free_run = simulation.add(ask(*range(5), max_tokens=4))
    simulation.drain()
    stop = free_run.tokens[2]
    stopping = Simulation(replace(SETUP, depth=3))
    request = ask(*range(5), max_tokens=20)
    sampling = replace(request.sampling, stop_token_ids=(stop,))
    stopped = stopping.add(replace(request, sampling=sampling))
    stopping.drain()
    # 5 + 2 tokens were fed before the stop token was drawn; look-ahead went on to 8 and beyond.
    assert stopped.tokens == free_run.tokens[:3]
    assert snapshots(stopping) == [4, 5]


def test_for_an_answer_the_snapshot_of_one_other_makes_room() -> None:
    simulation = Simulation(replace(SETUP, num_slots=3, max_batch_size=1))
    for first in (50, 60, 70):
        serve(simulation, ask(first))
    assert snapshots(simulation) == [1, 1, 1]
    # One makes room for it to begin, one for 4 tokens; 8 and 12 take the place of that.
    serve(simulation, ask(1, 2, max_tokens=12))
    assert snapshots(simulation) == [1, 12]


def test_in_the_last_slot_an_answer_leaves_nothing_before_its_end() -> None:
    simulation = Simulation(replace(SETUP, num_slots=1, max_batch_size=1))
    serve(simulation, ask(1, 2, max_tokens=12))
    assert snapshots(simulation) == []
    serve(simulation, ask(1, 2, max_tokens=11))
    assert snapshots(simulation) == [12]


# Nothing wrong becomes visible


def test_a_snapshot_is_visible_when_its_step_is_committed() -> None:
    simulation = Simulation(SETUP)
    simulation.add(ask(*range(9)))
    for _ in range(2):
        plan(simulation)
        assert snapshots(simulation) == []
    simulation.commit()
    assert snapshots(simulation) == [8]
    simulation.drain()


def test_a_failed_step_leaves_nothing() -> None:
    simulation = Simulation(SETUP)
    simulation.add(ask(*range(9)))
    for _ in range(2):
        plan(simulation)
    simulation.commit(fails=True)
    assert snapshots(simulation) == []
    assert serve(simulation, ask(*range(9))) == [0]


def test_what_led_to_logits_that_are_not_finite_is_forgotten() -> None:
    simulation = Simulation(replace(SETUP, bad_every=1))
    simulation.add(ask(*range(9)))
    plan(simulation)
    simulation.commit()
    plan(simulation)
    assert snapshots(simulation) == [8]
    simulation.commit()
    assert snapshots(simulation) == []
    assert simulation.tracked[0].seq.finish_reason is FinishReason.ERROR


def test_a_boundary_that_is_not_finite_is_left_for_nobody() -> None:
    """Nothing was drawn there: the device tells."""
    simulation = Simulation(SETUP)
    tracked = simulation.add(ask(*range(9)))
    made = plan(simulation)
    assert rows_of(made) == [(0, 0, 8)]
    plan(simulation)  # it has left its slot as a snapshot
    result = replace(simulation.model.execute(made), unsound=(0,))
    progress = simulation.scheduler.commit(made, result)
    assert [one.seq for one in progress] == [tracked.seq]
    assert tracked.seq.error == "logits of token 8 are not finite"
    assert snapshots(simulation) == []


def test_tenants_share_nothing() -> None:
    simulation = Simulation(SETUP)
    assert [serve(simulation, ask(*range(9), salt=salt))[0] for salt in "aba"] == [0, 0, 9]
    assert serve(simulation, ask(*range(9), salt="c"), ask(*range(9), salt="d")) == [0, 0]


# Together


def test_equal_prompts_that_arrive_together_are_computed_once() -> None:
    simulation = Simulation(SETUP)
    assert serve(simulation, *[ask(*range(11))] * 5) == [0, 11, 11, 11, 11]
    assert simulation.num_draws_kept == 4
    assert not any(tracked.seq.awaited for tracked in simulation.tracked.values())


def test_the_first_of_a_burst_leaves_what_the_others_share_with_it() -> None:
    simulation = Simulation(SETUP)
    prompts = [ask(*range(13), *range(first, first + 8)) for first in (100, 200, 300)]
    assert serve(simulation, *prompts) == [0, 12, 12]
    assert simulation.cache.stats.num_queried_tokens == 3 * 21
    assert simulation.cache.stats.num_hit_tokens == 2 * 12


def test_whoever_waits_is_passed_by() -> None:
    simulation = Simulation(SETUP)
    for request in (ask(*range(9)), ask(*range(9)), ask(50)):
        simulation.add(request)
    assert rows_of(plan(simulation)) == [(0, 0, 8), (2, 0, 1)]
    assert rows_of(plan(simulation)) == [(0, 8, 1)]
    simulation.commit()
    assert simulation.plan() is None
    simulation.commit()
    assert rows_of(plan(simulation)) == [(1, 9, 0)]
    simulation.drain()


@pytest.mark.parametrize("how", ["abort", "failure"])
def test_whoever_waits_goes_alone_when_the_owner_ends(how: str) -> None:
    simulation = Simulation(SETUP)
    simulation.add(ask(*range(9)))
    waiting = simulation.add(ask(*range(9)))
    plan(simulation)
    if how == "abort":
        simulation.abort(0)
    else:
        simulation.commit(fails=True)
    assert rows_of(plan(simulation)) == [(1, 0, 8)]
    simulation.drain()
    assert waiting.seq.finish_reason is FinishReason.LENGTH


def test_whoever_waits_goes_alone_when_there_is_no_slot_for_the_snapshot() -> None:
    simulation = Simulation(replace(SETUP, num_slots=2))
    simulation.add(ask(50, 51, max_tokens=9))
    first = simulation.add(ask(*range(9), max_tokens=5))
    second = simulation.add(ask(*range(8), 99))
    simulation.drain()
    assert [first.num_cached, second.num_cached] == [0, 0]


# Who gives way


def test_admission_takes_the_slots_of_snapshots() -> None:
    simulation = Simulation(replace(SETUP, num_slots=3))
    for first in (0, 50, 60):
        serve(simulation, ask(first))
    assert simulation.cache.stats == CacheStats(
        num_queried_tokens=3, num_snapshots=3, num_device_pages=3
    )
    for first in (100, 200, 300):
        simulation.add(ask(first, max_tokens=3))
    assert len(plan(simulation).rows) == 3
    assert snapshots(simulation) == []
    assert simulation.cache.stats == CacheStats(num_queried_tokens=6, num_evictions=3)
    simulation.drain()


def test_in_the_last_slot_a_prompt_goes_on_where_its_snapshot_lies() -> None:
    simulation = Simulation(replace(SETUP, num_slots=1, max_batch_size=1))
    first = simulation.add(ask(*range(4), max_tokens=5))
    simulation.drain()
    assert snapshots(simulation) == [8]
    simulation.add(ask(*range(4), *first.tokens))
    row = plan(simulation).rows[0]
    assert (row.position, row.src.slot, row.dst.slot) == (8, 1, 1)
    assert row.src != row.dst
    simulation.drain()


def test_a_page_is_kept_as_long_as_the_plan_in_the_making_reads_it() -> None:
    simulation = Simulation(replace(SETUP, num_slots=3))
    serve(simulation, ask(*range(9)))
    for request in (ask(*range(8), 99, max_tokens=4), *[ask(n, max_tokens=4) for n in (50, 60)]):
        simulation.add(request)
    # Three slots, one of them a snapshot that the first row reads: the third has to wait.
    assert [row.seq_id for row in plan(simulation).rows] == [1, 2]
    second = plan(simulation)
    assert [row.seq_id for row in second.rows] == [1, 2, 3]
    assert snapshots(simulation) == []
    simulation.drain()


def test_a_slot_is_rewritten_while_an_earlier_plan_that_reads_it_is_in_flight() -> None:
    simulation = Simulation(replace(SETUP, num_slots=2, max_batch_size=2))
    serve(simulation, ask(*range(8)), ask(*range(4)))
    simulation.add(ask(*range(4), 99, max_tokens=3))
    reader = plan(simulation).rows[0]
    simulation.add(ask(50, max_tokens=3))
    writer = next(row for row in plan(simulation).rows if row.seq_id == 3)
    assert writer.dst.slot == reader.src.slot
    assert writer.dst.generation == reader.src.generation + 1
    simulation.drain()  # every answer is right: the device runs plans in order


def test_what_was_used_outlives_what_was_not() -> None:
    simulation = Simulation(replace(SETUP, num_slots=4, max_batch_size=1))
    serve(simulation, ask(*range(9)))
    serve(simulation, ask(*range(9)))
    for first in range(50, 100, 10):
        serve(simulation, ask(*range(first, first + 9)))
    assert simulation.cache.stats.num_evictions > 0
    assert serve(simulation, ask(*range(9))) == [9]


def test_without_a_seed_nothing_is_left() -> None:
    simulation = Simulation(replace(SETUP, has_cache=False))
    assert serve(simulation, ask(*range(9)), ask(*range(9)), ask(*range(8))) == [0, 0, 0]
    assert simulation.cache.stats == CacheStats()
    assert snapshots(simulation) == []


def test_an_aborted_prefill_gives_back_what_it_left_in_flight() -> None:
    simulation = Simulation(SETUP)
    aborted: Tracked = simulation.add(ask(*range(9)))
    for _ in range(2):
        plan(simulation)
    assert len(aborted.seq.frozen) == 1
    simulation.abort(0)
    assert simulation.pool.num_free == 8
    simulation.drain()
