"""Scripts: random operations for a Simulation, as hypothesis strategies.

Bursts, delays between plan and commit, and aborts with rows in flight are what finds bugs, so
they are operations of their own rather than coincidences. So are prompts that begin alike, equal
prompts that come together, and further turns of a conversation.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from hypothesis import strategies as st

from engine.types import EngineRequest, SamplingParams
from tests.engine.simulation import Setup, Simulation
from tests.hash_model import VOCAB_SIZE

# A draw hits one of them about once in 16.
MANY_STOP_IDS = tuple(range(0, VOCAB_SIZE, 16))


@dataclass(frozen=True)
class Add:
    requests: tuple[EngineRequest, ...]

    def __call__(self, simulation: Simulation) -> None:
        for request in self.requests:
            simulation.add(request)


@dataclass(frozen=True)
class FollowUp:
    """The next turn of a conversation: its prompt, what was answered so far, and `request`'s."""

    index: int
    request: EngineRequest

    def __call__(self, simulation: Simulation) -> None:
        if not simulation.tracked:
            return
        earlier = simulation.tracked[self.index % len(simulation.tracked)]
        prompt_ids = (*earlier.request.prompt_ids, *earlier.tokens, *self.request.prompt_ids)
        salt = earlier.request.cache_salt
        simulation.add(replace(self.request, prompt_ids=prompt_ids, cache_salt=salt))


@dataclass(frozen=True)
class Plan:
    def __call__(self, simulation: Simulation) -> None:
        simulation.plan()


@dataclass(frozen=True)
class Commit:
    fails: bool = False

    def __call__(self, simulation: Simulation) -> None:
        simulation.commit(fails=self.fails)


@dataclass(frozen=True)
class Step:
    """Fill the pipeline and commit the oldest step, `times` times: the usual rhythm.

    With `fails` the last of these steps fails, others in flight behind it.
    """

    times: int
    fails: bool = False

    def __call__(self, simulation: Simulation) -> None:
        for rest in reversed(range(self.times)):
            while simulation.plan() is not None:
                pass
            simulation.commit(fails=self.fails and rest == 0)


@dataclass(frozen=True)
class Abort:
    index: int

    def __call__(self, simulation: Simulation) -> None:
        simulation.abort(self.index)


@dataclass(frozen=True)
class Reconfigure:
    extra_batch_tokens: int
    decode_first: bool

    def __call__(self, simulation: Simulation) -> None:
        simulation.reconfigure(self.extra_batch_tokens, self.decode_first)


Operation = Add | FollowUp | Plan | Commit | Step | Abort | Reconfigure


def prompts() -> st.SearchStrategy[tuple[int, ...]]:
    """Random ones, and such as share their beginning: a text `i, i + 1, ...` cut somewhere."""
    ids = st.integers(0, VOCAB_SIZE - 1)
    alone = st.lists(ids, min_size=1, max_size=30).map(tuple)
    shared = st.builds(
        lambda first, length, rest: (*range(first, first + length), *rest),
        first=st.integers(0, 1),
        length=st.integers(1, 40),
        rest=st.lists(st.integers(0, 2), max_size=6),
    )
    return st.one_of(alone, shared, shared, shared)


def request(prompt_ids: tuple[int, ...], hints: list[int], **fields: Any) -> EngineRequest:
    inside = tuple(hint % (len(prompt_ids) + 1) for hint in hints)
    return EngineRequest(prompt_ids=prompt_ids, snapshot_hints=inside, **fields)


def requests() -> st.SearchStrategy[EngineRequest]:
    return st.builds(
        request,
        request_id=st.just("r"),
        prompt_ids=prompts(),
        sampling=st.builds(
            SamplingParams,
            max_tokens=st.integers(1, 12),
            seed=st.integers(0, 3),
            stop_token_ids=st.sampled_from(((), MANY_STOP_IDS)),
        ),
        priority=st.integers(-1, 1),
        cache_salt=st.sampled_from(("", "", "", "tenant")),
        hints=st.lists(st.integers(0, 30), max_size=3),
    )


def operations() -> st.SearchStrategy[Operation]:
    add = st.builds(Add, st.lists(requests(), min_size=1, max_size=2).map(tuple))
    burst = st.builds(Add, st.lists(requests(), min_size=3, max_size=8).map(tuple))
    equal = st.builds(lambda request, times: Add((request,) * times), requests(), st.integers(2, 5))
    return st.one_of(
        add,
        burst,
        equal,
        st.builds(FollowUp, st.integers(0, 10), requests()),
        st.builds(FollowUp, st.integers(0, 10), requests()),
        st.just(Plan()),
        st.just(Commit()),
        st.just(Commit(fails=True)),
        st.builds(Step, st.integers(1, 6)),
        st.builds(Step, st.integers(1, 6)),
        st.builds(Step, st.integers(1, 4), fails=st.just(True)),
        st.builds(Abort, st.integers(0, 10)),
        st.builds(Reconfigure, st.integers(0, 20), st.booleans()),
    )


def scripts(max_size: int = 25) -> st.SearchStrategy[list[Operation]]:
    return st.lists(operations(), max_size=max_size)


def setups() -> st.SearchStrategy[Setup]:
    return st.builds(
        Setup,
        num_slots=st.integers(1, 6),
        max_batch_size=st.integers(1, 6),
        paragraph_len=st.integers(1, 8),
        extra_batch_tokens=st.integers(0, 20),
        depth=st.integers(1, 3),
        decode_first=st.booleans(),
        bad_every=st.sampled_from((0, 0, 40)),
        has_cache=st.sampled_from((True, True, True, False)),
        min_snapshot_tokens=st.sampled_from((0, 0, 6)),
        max_ghosts=st.sampled_from((1000, 1000, 3)),
    )
