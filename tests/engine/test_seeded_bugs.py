"""The property test tested: each seeded bug must be found.

When a bug was found by other means, add it to the list: what the property missed once, it must
find from then on.
"""

from __future__ import annotations

from functools import cache

import pytest
from hypothesis import Phase, given, settings

from engine.types import EngineRequest, SamplingParams
from tests.engine.scripts import (
    Add,
    AddAgain,
    Commit,
    Keep,
    Operation,
    Plan,
    Restart,
    Step,
    SwapOut,
    WorkDisk,
    scripts,
    setups,
)
from tests.engine.seeded_bugs import BUGS, Bug, Patch
from tests.engine.seeded_cache_bugs import CACHE_BUGS
from tests.engine.seeded_score_bugs import SCORE_BUGS
from tests.engine.seeded_state_bugs import STATE_BUGS
from tests.engine.seeded_tier_bugs import TIER_BUGS
from tests.engine.simulation import Simulation
from tests.engine.tracked import Setup

Example = tuple[Setup, list[Operation]]


def request(
    num_prompt_tokens: int, max_tokens: int, priority: int = 0, first: int = 0
) -> EngineRequest:
    return EngineRequest(
        request_id="r",
        prompt_ids=tuple(range(first, first + num_prompt_tokens)),
        sampling=SamplingParams(max_tokens=max_tokens, stop_token_ids=()),
        priority=priority,
    )


# Random scripts have these too seldom to rely on.
ON_PURPOSE: list[Example] = [
    (  # a prompt that takes the whole budget of every step while an answer runs
        Setup(num_slots=2, max_batch_size=2, paragraph_len=1, decode_first=False),
        [Add((request(1, 12),)), Step(2), Add((request(40, 1),)), Step(20)],
    ),
    (  # a prompt whose end is a boundary of an earlier one
        Setup(num_slots=4, paragraph_len=4, has_cache=True),
        [Add((request(11, 2),)), Step(5), Add((request(8, 2),))],
    ),
    (  # a state to go on from has a frame and a slot, and its continuation needs another frame
        Setup(num_slots=2, max_batch_size=1, has_cache=True, num_frames=2, max_files=4, depth=1),
        [
            Add((request(1, 9, -1),)),
            Keep(request(1, 1), None),
            Plan(),
            Step(4),
            Keep(request(1, 1), 0),
        ],
    ),
    (  # a page comes back from the disk, and the step that loads it fails
        Setup(num_slots=6, paragraph_len=4, has_cache=True, num_frames=4, max_files=9),
        [
            Add((request(9, 1),)),
            Step(4),
            Restart(is_graceful=True, again=(AddAgain(0, 1),)),
            Plan(),
            WorkDisk(1),
            Plan(),
            Commit(fails=True),
        ],
    ),
    (  # a draw from kept logits, and a prompt that goes before the row that feeds it
        Setup(num_slots=2, max_batch_size=2, decode_first=False, has_cache=True),
        [Add((request(1, 1),)), Step(2), Add((request(1, 3),)), Plan(), Add((request(2, 3),))],
    ),
    (  # the disk is full when a state is to be written
        Setup(paragraph_len=4, num_frames=4, max_files=9),
        [Keep(request(3, 1), None), Plan(), Commit(), Plan(), Commit(), WorkDisk(1, fails=True)],
    ),
    (  # the copy of a state to keep fails, its frame goes to others, and many want its slot
        Setup(num_slots=3, paragraph_len=4, num_frames=2),
        [
            Keep(request(3, 1), None),
            Plan(),
            Commit(),
            Plan(),
            Add((request(1, 12), request(2, 12))),
            Plan(),
            Commit(fails=True),
            SwapOut(0),
            SwapOut(0),
            Commit(),
            Plan(),
            Add((request(1, 12, 1),) * 3),
            Step(3),
        ],
    ),
    (  # more pages are written than there is room for files, one of them of a state to keep
        Setup(
            num_slots=1,
            max_batch_size=1,
            paragraph_len=1,
            depth=1,
            has_cache=True,
            num_frames=2,
            max_files=2,
            time_slice_tokens=2,
        ),
        [
            Add((request(1, 0), request(2, 0))),
            Add((request(1, 4, first=1),) * 2),
            Keep(request(1, 0), None),
        ],
    ),
    (  # the state to keep is there, in the only slot
        Setup(num_slots=1, max_batch_size=1, paragraph_len=1, has_cache=True, num_frames=2),
        [Add((request(1, 1),) * 2), Plan(), Keep(request(1, 1, 1), None), AddAgain(0, 1)],
    ),
]


@cache
def examples() -> list[Example]:
    """Those made on purpose, then 1,000 random ones, the same in every run.

    Whoever has all tiers first: most bugs are found by few examples then.
    """
    found: list[Example] = []

    @settings(max_examples=1000, derandomize=True, database=None, phases=[Phase.generate])
    @given(setups(), scripts())
    def collect(setup: Setup, script: list[Operation]) -> None:
        found.append((setup, script))

    collect()
    found.sort(key=lambda example: -num_tiers(example[0]))
    return ON_PURPOSE + found


def num_tiers(setup: Setup) -> int:
    return setup.has_cache + (setup.num_frames > 0) + (setup.num_frames * setup.max_files > 0)


def check_property() -> None:
    for setup, script in examples():
        Simulation(setup).run(script)


def test_the_property_holds_without_a_bug() -> None:
    check_property()


@pytest.mark.parametrize(
    "bug",
    BUGS + CACHE_BUGS + TIER_BUGS + STATE_BUGS + SCORE_BUGS,
    ids=lambda bug: bug.__name__,
)
def test_the_property_finds(bug: Bug, monkeypatch: Patch) -> None:
    bug(monkeypatch)
    with pytest.raises(AssertionError):
        check_property()
