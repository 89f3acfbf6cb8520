"""StateCache, case by case: kept logits, states that users keep, what others go on from, and files.

Paragraphs have 4 tokens. Every case runs in a Simulation, which checks all pages at every step
and all answers at the end.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from engine.plan import MoveKind
from engine.types import EngineRequest, FinishReason, SamplingParams, StateOptions
from tests.engine.simulation import LOST, Simulation
from tests.engine.tracked import Kept, Setup

SETUP = Setup(has_cache=True, num_slots=8, paragraph_len=4, extra_batch_tokens=64, num_frames=8)
ON_DISK = replace(SETUP, max_files=9)


def ask(*prompt_ids: int, max_tokens: int = 3, seed: int = 0) -> EngineRequest:
    return EngineRequest(
        request_id="r",
        prompt_ids=prompt_ids,
        sampling=SamplingParams(max_tokens=max_tokens, seed=seed, stop_token_ids=()),
        keep_state=None if max_tokens else StateOptions(),
    )


def serve(simulation: Simulation, *requests: EngineRequest, base: Kept | None = None) -> list[int]:
    """Requests that arrive together, to their ends; how many tokens of each were cached."""
    tracked = [simulation.add(request, base) for request in requests]
    simulation.settle()
    return [one.num_cached for one in tracked]


def keep(simulation: Simulation, *prompt_ids: int, base: Kept | None = None) -> Kept:
    """The state after a prompt, which a user holds from now on."""
    serve(simulation, ask(*prompt_ids, max_tokens=0), base=base)
    return simulation.kept[-1]


def num_fed(simulation: Simulation, *requests: EngineRequest, base: Kept | None = None) -> int:
    """Tokens that the device is given to serve some requests."""
    for request in requests:
        simulation.add(request, base)
    num_tokens = 0
    while any(not one.seq.is_finished for one in simulation.tracked.values()):
        plan = simulation.plan()
        num_tokens += 0 if plan is None else plan.num_tokens
        if plan is None:
            simulation.commit()
    simulation.settle()
    return num_tokens


# Kept logits


def test_an_equal_prompt_feeds_only_what_it_draws() -> None:
    simulation = Simulation(SETUP)
    assert num_fed(simulation, ask(*range(11))) == 11 + 2
    assert num_fed(simulation, ask(*range(11), seed=1)) == 2
    assert num_fed(simulation, ask(*range(11), max_tokens=1, seed=2)) == 0
    assert simulation.num_draws_kept == 2
    simulation.drain()


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_several_answers_to_one_prompt_compute_it_once(depth: int) -> None:
    simulation = Simulation(replace(SETUP, depth=depth))
    answers = [ask(*range(11), seed=seed) for seed in range(5)]
    assert num_fed(simulation, *answers) == 11 + 5 * 2
    tokens = {tuple(one.tokens) for one in simulation.tracked.values()}
    assert len(tokens) == 5
    simulation.drain()


def test_more_answers_than_seats_compute_the_prompt_once() -> None:
    simulation = Simulation(replace(SETUP, num_slots=3, max_batch_size=2))
    assert num_fed(simulation, *[ask(*range(11), seed=seed) for seed in range(6)]) == 11 + 6 * 2
    simulation.drain()


def test_the_end_of_a_prompt_is_of_no_use_to_a_longer_one() -> None:
    simulation = Simulation(SETUP)
    assert serve(simulation, ask(*range(6))) == [0]
    assert serve(simulation, ask(*range(7))) == [4]
    simulation.drain()


def test_the_boundary_of_a_longer_prompt_has_no_logits_to_draw_from() -> None:
    simulation = Simulation(SETUP)
    assert serve(simulation, ask(*range(9))) == [0]
    assert serve(simulation, ask(*range(8))) == [0]
    assert serve(simulation, ask(*range(8))) == [8]
    assert simulation.num_draws_kept == 1
    simulation.drain()


# States that users keep


@pytest.mark.parametrize("has_cache", [False, True])
def test_the_state_of_a_prompt_is_kept_with_its_logits(has_cache: bool) -> None:
    simulation = Simulation(replace(SETUP, has_cache=has_cache))
    kept = keep(simulation, *range(6))
    assert (kept.page.num_tokens, kept.page.has_logits, kept.page.num_holders) == (6, True, 1)
    assert simulation.tracked[0].seq.finish_reason is FinishReason.LENGTH
    assert kept.page.frame is not None
    simulation.let_go(0)
    assert kept.page.exists == has_cache
    simulation.drain()


def test_a_state_that_is_there_is_kept_without_a_step() -> None:
    simulation = Simulation(SETUP)
    serve(simulation, ask(*range(6)))
    assert num_fed(simulation, ask(*range(6), max_tokens=0)) == 0
    assert len(simulation.kept) == 1
    simulation.drain()


def test_two_users_keep_one_state() -> None:
    simulation = Simulation(SETUP)
    pages = {keep(simulation, *range(6)).page for _ in range(2)}
    (page,) = pages
    assert page.num_holders == 2
    simulation.let_go(0)
    assert page.num_holders == 1
    simulation.drain()


def test_a_state_to_keep_waits_for_a_frame() -> None:
    simulation = Simulation(replace(SETUP, num_frames=3, num_slots=2, max_batch_size=1))
    first = simulation.add(ask(1, max_tokens=9))
    simulation.plan()
    simulation.commit()
    assert simulation.tiers.frames is not None
    taken = [simulation.tiers.take_frame() for _ in range(3)]
    waiting = simulation.add(ask(2, max_tokens=0))
    passing = simulation.add(ask(3, max_tokens=1))
    while not passing.seq.is_finished:
        simulation.plan()
        simulation.commit()
    assert first.seq.is_finished
    assert waiting.is_waiting
    for frame in taken:
        assert frame is not None
        simulation.tiers.release_frame(frame)
    simulation.drain()
    assert waiting.seq.is_finished


def test_a_state_whose_step_failed_is_not_kept() -> None:
    simulation = Simulation(SETUP)
    lost = simulation.add(ask(*range(3), max_tokens=0))
    simulation.plan()
    simulation.commit(fails=True)
    assert lost.seq.finish_reason is FinishReason.ERROR
    assert simulation.kept == []
    simulation.drain()


def test_a_state_with_bad_logits_is_not_kept() -> None:
    simulation = Simulation(replace(SETUP, bad_every=1))
    bad = simulation.add(ask(*range(3), max_tokens=0))
    simulation.settle()
    assert bad.seq.error == "logits of token 3 are not finite"
    assert simulation.kept == []
    simulation.drain()


# Going on


@pytest.mark.parametrize("has_cache", [False, True])
def test_a_prompt_goes_on_from_a_state(has_cache: bool) -> None:
    simulation = Simulation(replace(SETUP, has_cache=has_cache))
    base = keep(simulation, *range(6))
    assert num_fed(simulation, ask(7, 8, 9), base=base) == 3 + 2
    assert serve(simulation, ask(7, 8, 9, max_tokens=1), base=base) == [3 if has_cache else 0]
    simulation.drain()


def test_an_empty_prompt_draws_from_the_logits_of_its_state() -> None:
    simulation = Simulation(replace(SETUP, has_cache=False))
    base = keep(simulation, *range(6))
    assert num_fed(simulation, *[ask(seed=seed) for seed in range(3)], base=base) == 3 * 2
    assert simulation.num_draws_kept == 3
    simulation.drain()


def test_a_conversation_of_kept_states_feeds_each_token_once() -> None:
    simulation = Simulation(SETUP)
    base, fed = None, 0
    for turn in range(4):
        prompt = ask(*range(10 * turn, 10 * turn + 5), max_tokens=0)
        fed += num_fed(simulation, prompt, base=base)
        base = simulation.kept[-1]
    assert fed == 20
    assert base is not None
    assert base.num_tokens == 20
    simulation.drain()


def test_equal_prompts_behind_different_states_share_nothing() -> None:
    simulation = Simulation(SETUP)
    for first in (100, 200):
        base = keep(simulation, first)
        assert serve(simulation, ask(*range(6)), base=base) == [0]
    assert serve(simulation, ask(*range(6))) == [0]
    assert serve(simulation, ask(*range(6)), base=base) == [6]
    simulation.drain()


def test_a_state_let_go_serves_those_who_began_from_it() -> None:
    simulation = Simulation(replace(SETUP, has_cache=False))
    base = keep(simulation, *range(6))
    waiting = [simulation.add(ask(7, seed=seed), base) for seed in range(2)]
    simulation.let_go(0)
    assert base.page.num_holders == 2
    simulation.drain()
    assert [len(one.tokens) for one in waiting] == [3, 3]
    assert not base.page.exists


# Tiers and restarts


def test_a_page_that_lost_its_slot_is_begun_from_in_the_host() -> None:
    simulation = Simulation(replace(SETUP, num_slots=2, max_batch_size=1))
    serve(simulation, ask(*range(6), max_tokens=1))
    serve(simulation, ask(*range(50, 56), max_tokens=1))
    assert {page.tier for page in simulation.cache.index} == {"device", "host"}
    assert serve(simulation, ask(*range(6), seed=1)) == [6]
    assert simulation.tiers.num_loads == 1
    simulation.drain()


def test_a_page_that_is_loaded_stays_on_the_device_where_there_is_room() -> None:
    simulation = Simulation(ON_DISK)
    serve(simulation, ask(*range(6)))
    simulation.save()
    simulation.settle()
    simulation.restart()
    assert serve(simulation, *[ask(*range(6), seed=seed) for seed in range(3)]) == [6, 6, 6]
    assert simulation.tiers.files.num_read == 1
    assert simulation.tiers.num_loads <= 3
    assert serve(simulation, ask(*range(6), seed=9)) == [6]
    moves = simulation.tiers.num_loads
    assert serve(simulation, ask(*range(6), seed=8)) == [6]
    assert simulation.tiers.num_loads == moves
    simulation.drain()


def test_what_was_cached_and_kept_survives_a_restart() -> None:
    simulation = Simulation(ON_DISK)
    serve(simulation, ask(*range(11)))
    keep(simulation, *range(50, 56))
    simulation.save()
    simulation.settle()
    simulation.restart()
    (base,) = simulation.kept
    assert serve(simulation, ask(*range(11), seed=1), ask(*range(9))) == [11, 8]
    assert serve(simulation, ask(1), base=base) == [0]
    simulation.drain()


def test_a_prompt_whose_file_is_broken_is_computed() -> None:
    simulation = Simulation(ON_DISK)
    serve(simulation, ask(*range(6)))
    simulation.save()
    simulation.settle()
    simulation.restart()
    for index in range(len(simulation.folder.files)):
        simulation.break_file(index)
    assert serve(simulation, ask(*range(6), seed=1)) == [0]
    simulation.drain()


def test_a_request_whose_state_is_broken_ends_with_an_error() -> None:
    simulation = Simulation(ON_DISK)
    keep(simulation, *range(6))
    simulation.settle()
    simulation.restart()
    (base,) = simulation.kept
    simulation.break_file(0)
    orphan = simulation.add(ask(1), base)
    simulation.settle()
    assert (orphan.seq.finish_reason, orphan.seq.error) == (FinishReason.ERROR, LOST)
    simulation.drain()


def test_a_prompt_whose_page_cannot_be_read_goes_without_it() -> None:
    simulation = Simulation(replace(ON_DISK, min_file_tokens=5))
    serve(simulation, ask(*range(6)))
    simulation.save()
    simulation.settle()
    simulation.restart()
    simulation.add(ask(*range(6), seed=1))
    assert simulation.plan() is None
    simulation.work_disk(fails=True)
    plan = simulation.plan()
    assert plan is not None
    assert [row.num_tokens for row in plan.rows] == [4]
    simulation.drain()


def test_others_go_on_while_one_waits_for_the_disk() -> None:
    simulation = Simulation(ON_DISK)
    serve(simulation, ask(*range(6)))
    simulation.save()
    simulation.settle()
    simulation.restart()
    simulation.add(ask(*range(6), seed=1))
    other = simulation.add(ask(50))
    plan = simulation.plan()
    assert plan is not None
    assert [row.seq_id for row in plan.rows] == [other.seq.seq_id]
    simulation.work_disk()
    plan = simulation.plan()
    assert plan is not None
    assert {move.kind for move in plan.moves} == {MoveKind.LOAD}
    simulation.drain()
