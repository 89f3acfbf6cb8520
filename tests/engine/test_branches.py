"""branch_at: siblings begin where the prompt they have in common ends, on the grid or off it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from engine.errors import InvalidRequest
from engine.types import EngineRequest
from tests.engine.replica import ask as ask_core
from tests.engine.replica import make_core, running
from tests.engine.simulation import Setup, Simulation
from tests.engine.test_cache import SETUP, ask, serve
from tests.hash_model import HashRunner


def sibling(prompt: range, *ids: int, salt: str = "") -> EngineRequest:
    return replace(ask(*prompt, *ids, salt=salt), branch_at=len(prompt))


@pytest.mark.parametrize("length", [1, 3, 4, 5, 13, 16])
def test_they_begin_exactly_there(length: int) -> None:
    simulation, prompt = Simulation(SETUP), range(length)
    assert serve(simulation, ask(*prompt)) == [0]
    assert serve(simulation, sibling(prompt, 91), sibling(prompt, 92, 93)) == [length] * 2
    assert simulation.num_branches == (2 if length % 4 else 0)


def test_without_asking_they_begin_on_the_grid() -> None:
    simulation = Simulation(SETUP)
    serve(simulation, ask(*range(13)))
    assert serve(simulation, ask(*range(13), 91)) == [12]


def test_a_long_sibling_comes_back_to_the_grid() -> None:
    """A step takes few tokens: the second chunk must begin on a boundary."""
    setup = Setup(has_cache=True, num_slots=8, paragraph_len=4, max_batch_size=2)
    simulation = Simulation(setup)
    serve(simulation, ask(*range(13)))
    assert serve(simulation, sibling(range(13), *range(50, 80))) == [13]
    assert simulation.num_branches == 1


def test_a_deeper_page_is_better() -> None:
    simulation, prompt = Simulation(SETUP), range(5)
    serve(simulation, ask(*prompt))
    serve(simulation, sibling(prompt, *range(60, 70)))
    assert serve(simulation, sibling(prompt, *range(60, 70), 99)) == [12]


def test_tenants_share_no_branch() -> None:
    simulation = Simulation(SETUP)
    serve(simulation, ask(*range(5)))
    assert serve(simulation, sibling(range(5), 91, salt="tenant")) == [0]


def test_without_a_cache_it_changes_nothing() -> None:
    simulation = Simulation(replace(SETUP, has_cache=False))
    serve(simulation, ask(*range(5)))
    assert serve(simulation, sibling(range(5), 91)) == [0]


def test_tokens_to_be_scored_are_computed_however_far_the_branch_goes() -> None:
    simulation = Simulation(SETUP)
    serve(simulation, ask(*range(13)))
    asked = replace(sibling(range(13), 91, 92), scores_from=9)
    assert serve(simulation, asked) == [0], "what there is lies behind"
    assert serve(simulation, replace(asked, scores_from=14)) == [13]


async def test_it_must_be_a_place_in_the_prompt() -> None:
    async with running(make_core(HashRunner())) as core:
        for wrong in (-1, 4):
            with pytest.raises(InvalidRequest) as refusal:
                core.submit(replace(ask_core(), branch_at=wrong))
            assert refusal.value.field == "branch_at"
