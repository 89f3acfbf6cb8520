"""Engines that replay their decode steps give the answers of engines that do not.

These are tests of other files, as they are there, with every engine switched. One runs by default,
since each takes as long as there; the others with `-m slow`.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.engine.replays import Switched
from tests.engine.test_engine import vocab
from tests.engine.test_engine_cache import (
    test_every_further_turn_of_a_chat_begins_from_what_was_generated,
)

__all__ = [
    "test_every_further_turn_of_a_chat_begins_from_what_was_generated",
    "vocab",
]


@pytest.fixture(autouse=True, params=[True, False], ids=["tokens", "logits"])
def switched(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Switched]:
    switched = Switched(monkeypatch, with_draws=request.param)
    yield switched
    assert switched.num_replayed > 10
    if request.param:
        assert sum(draws.num_drawn for draws in switched.draws) > 10
