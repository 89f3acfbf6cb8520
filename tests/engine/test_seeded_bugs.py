"""The property test tested: each seeded bug must be found.

When a bug was found by other means, add it to the list: what the property missed once, it must
find from then on.
"""

from __future__ import annotations

import pytest
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st

from engine.types import EngineRequest, SamplingParams
from tests.engine.scripts import Add, Operation, Step, scripts, setups
from tests.engine.seeded_bugs import BUGS, Bug, Patch
from tests.engine.seeded_cache_bugs import CACHE_BUGS
from tests.engine.simulation import Setup, Simulation


class Unprinted:
    """An example that is expected to fail: hypothesis would spend a second on printing it."""

    def __init__(self, setup: Setup, script: list[Operation]) -> None:
        self.setup = setup
        self.script = script

    def __repr__(self) -> str:
        return "Unprinted()"


def request(num_prompt_tokens: int, max_tokens: int) -> EngineRequest:
    return EngineRequest(
        request_id="r",
        prompt_ids=tuple(range(num_prompt_tokens)),
        sampling=SamplingParams(max_tokens=max_tokens, stop_token_ids=()),
    )


# A prompt that takes the whole budget of every step while an answer runs: random scripts have
# this too seldom to rely on.
FLOOD = Unprinted(
    Setup(num_slots=2, max_batch_size=2, paragraph_len=1, decode_first=False),
    [Add((request(1, 12),)), Step(2), Add((request(40, 1),)), Step(20)],
)


@settings(
    max_examples=1000,
    derandomize=True,
    database=None,
    phases=[Phase.explicit, Phase.generate],
    report_multiple_bugs=False,
)
@example(FLOOD)
@given(st.tuples(setups(), scripts()).map(lambda pair: Unprinted(*pair)))
def check_property(example: Unprinted) -> None:
    Simulation(example.setup).run(example.script)


def test_the_property_holds_without_a_bug() -> None:
    check_property()


@pytest.mark.parametrize("bug", BUGS + CACHE_BUGS, ids=lambda bug: bug.__name__)
def test_the_property_finds(bug: Bug, monkeypatch: Patch) -> None:
    bug(monkeypatch)
    with pytest.raises(AssertionError):
        check_property()
