"""The property test tested: each seeded bug must be found.

When a bug was found by other means, add it to the list: what the property missed once, it must
find from then on.
"""

from __future__ import annotations

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from tests.engine.scripts import Operation, scripts, setups
from tests.engine.seeded_bugs import BUGS, Bug, Patch
from tests.engine.simulation import Setup, Simulation


class Unprinted:
    """An example that is expected to fail: hypothesis would spend a second on printing it."""

    def __init__(self, setup: Setup, script: list[Operation]) -> None:
        self.setup = setup
        self.script = script

    def __repr__(self) -> str:
        return "Unprinted()"


@settings(
    max_examples=1000,
    derandomize=True,
    database=None,
    phases=[Phase.generate],
    report_multiple_bugs=False,
)
@given(st.tuples(setups(), scripts()).map(lambda pair: Unprinted(*pair)))
def check_property(example: Unprinted) -> None:
    Simulation(example.setup).run(example.script)


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.__name__)
def test_the_property_finds(bug: Bug, monkeypatch: Patch) -> None:
    bug(monkeypatch)
    with pytest.raises(AssertionError):
        check_property()
