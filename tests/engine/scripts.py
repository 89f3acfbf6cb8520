"""Scripts: random operations for a Simulation, as hypothesis strategies.

Bursts, delays between plan and commit, and aborts with rows in flight are what finds bugs, so
they are operations of their own rather than coincidences. So are prompts that begin alike, equal
prompts that come together, and further turns of a conversation.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from hypothesis import strategies as st

from engine.types import EngineRequest, SamplingParams, StateOptions
from tests.engine.simulation import Simulation
from tests.engine.tracked import Kept, Setup
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
        if earlier.base is None or earlier.base in simulation.kept:
            request = replace(self.request, prompt_ids=prompt_ids, cache_salt=salt)
            simulation.add(request, earlier.base)


@dataclass(frozen=True)
class Branch:
    """Continuations of an earlier prompt that part where it ends, wherever that is."""

    index: int
    requests: tuple[EngineRequest, ...]

    def __call__(self, simulation: Simulation) -> None:
        if not simulation.tracked:
            return
        earlier = simulation.tracked[self.index % len(simulation.tracked)]
        begin, salt = earlier.request.prompt_ids, earlier.request.cache_salt
        if earlier.base is not None and earlier.base not in simulation.kept:
            return
        for request in self.requests:
            ids = (*begin, *request.prompt_ids)
            asked = replace(request, prompt_ids=ids, cache_salt=salt, branch_at=len(begin))
            simulation.add(asked, earlier.base)


@dataclass(frozen=True)
class AddAgain:
    """The prompt of an earlier request once more, or of one before a restart."""

    index: int
    seed: int

    def __call__(self, simulation: Simulation) -> None:
        earlier = [*simulation.past, *simulation.tracked.values()]
        if not earlier:
            return
        again = earlier[self.index % len(earlier)]
        has_base = again.base is None or again.base in simulation.kept
        is_kept = again.request.keep_state is not None
        if has_base and (simulation.has_room_to_keep or not is_kept):
            sampling = replace(again.request.sampling, seed=self.seed)
            simulation.add(replace(again.request, sampling=sampling), again.base)


@dataclass(frozen=True)
class Keep:
    """A user wants the state after a prompt, from nothing or from a state kept before."""

    request: EngineRequest
    index: int | None

    def __call__(self, simulation: Simulation) -> None:
        if simulation.has_room_to_keep:
            sampling = replace(self.request.sampling, max_tokens=0)
            base = _kept(simulation, self.index)
            request = replace(self.request, sampling=sampling, keep_state=StateOptions())
            simulation.add(request, base)


@dataclass(frozen=True)
class Embed:
    """Somebody wants the row of a prompt's last token, from nothing or from a kept state."""

    request: EngineRequest
    index: int | None

    def __call__(self, simulation: Simulation) -> None:
        sampling = replace(self.request.sampling, max_tokens=0)
        request = replace(self.request, sampling=sampling, returns_hidden=True, scores_from=None)
        simulation.add(request, _kept(simulation, self.index))


@dataclass(frozen=True)
class Continue:
    """Requests that go on from a state that a user kept; the prompt may be empty."""

    requests: tuple[EngineRequest, ...]
    index: int
    is_empty: bool

    def __call__(self, simulation: Simulation) -> None:
        base = _kept(simulation, self.index)
        for request in self.requests:
            if base is not None:
                prompt_ids = () if self.is_empty else request.prompt_ids
                simulation.add(replace(request, prompt_ids=prompt_ids, snapshot_hints=()), base)


@dataclass(frozen=True)
class LetGo:
    index: int

    def __call__(self, simulation: Simulation) -> None:
        simulation.let_go(self.index)


@dataclass(frozen=True)
class SwapOut:
    index: int

    def __call__(self, simulation: Simulation) -> None:
        simulation.swap_out(self.index)


@dataclass(frozen=True)
class WorkDisk:
    times: int
    fails: bool = False

    def __call__(self, simulation: Simulation) -> None:
        for _ in range(self.times):
            simulation.work_disk(fails=self.fails)


@dataclass(frozen=True)
class Restart:
    """The end of the process, after everything was saved or at once; then some ask again."""

    is_graceful: bool
    again: tuple[AddAgain, ...]

    def __call__(self, simulation: Simulation) -> None:
        if self.is_graceful:
            simulation.save()
            for _ in range(2 * simulation.setup.num_slots + 4):
                simulation.plan()
                simulation.commit()
                simulation.work_disk()
        simulation.restart()
        for add in self.again:
            add(simulation)


@dataclass(frozen=True)
class BreakFile:
    index: int

    def __call__(self, simulation: Simulation) -> None:
        simulation.break_file(self.index)


def _kept(simulation: Simulation, index: int | None) -> Kept | None:
    if index is None or not simulation.kept:
        return None
    return simulation.kept[index % len(simulation.kept)]


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
            simulation.work_disk()


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


Operation = (
    Add
    | AddAgain
    | FollowUp
    | Branch
    | Keep
    | Embed
    | Continue
    | LetGo
    | Plan
    | Commit
    | Step
    | Abort
    | SwapOut
    | WorkDisk
    | Restart
    | BreakFile
    | Reconfigure
)


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


def request(
    prompt_ids: tuple[int, ...], hints: list[int], scores: int | None, **fields: Any
) -> EngineRequest:
    length = len(prompt_ids) + 1
    inside = tuple(hint % length for hint in hints)
    scores_from = None if scores is None else scores % length
    return EngineRequest(
        prompt_ids=prompt_ids, snapshot_hints=inside, scores_from=scores_from, **fields
    )


def requests() -> st.SearchStrategy[EngineRequest]:
    return st.builds(
        request,
        request_id=st.just("r"),
        prompt_ids=prompts(),
        sampling=st.builds(
            SamplingParams,
            max_tokens=st.integers(0, 12),
            seed=st.integers(0, 3),
            stop_token_ids=st.sampled_from(((), MANY_STOP_IDS)),
        ),
        priority=st.integers(-1, 1),
        cache_salt=st.sampled_from(("", "", "", "tenant")),
        hints=st.lists(st.integers(0, 30), max_size=3),
        scores=st.sampled_from((None, None)) | st.integers(0, 40),
    )


def operations() -> st.SearchStrategy[Operation]:
    add = st.builds(Add, st.lists(requests(), min_size=1, max_size=2).map(tuple))
    burst = st.builds(Add, st.lists(requests(), min_size=3, max_size=8).map(tuple))
    equal = st.builds(lambda request, times: Add((request,) * times), requests(), st.integers(2, 5))
    follow_up = st.builds(FollowUp, st.integers(0, 10), requests())
    branch = st.builds(
        Branch, st.integers(0, 10), st.lists(requests(), min_size=1, max_size=3).map(tuple)
    )
    again = st.builds(AddAgain, st.integers(0, 10), st.integers(0, 3))
    step = st.builds(Step, st.integers(1, 6))
    go_on = st.builds(
        Continue,
        st.lists(requests(), min_size=1, max_size=3).map(tuple),
        st.integers(0, 3),
        st.booleans(),
    )
    return st.one_of(
        st.just(Plan()),  # first, as hypothesis makes this of what a failure does not need
        st.just(Commit()),
        add,
        burst,
        equal,
        *[follow_up] * 2,
        branch,
        *[again] * 3,
        st.just(Commit(fails=True)),
        *[step] * 4,
        st.builds(Step, st.integers(1, 4), fails=st.just(True)),
        st.builds(Abort, st.integers(0, 10)),
        st.builds(Keep, requests(), st.none() | st.integers(0, 3)),
        st.builds(Embed, requests(), st.none() | st.integers(0, 3)),
        *[go_on] * 2,
        st.builds(LetGo, st.integers(0, 3)),
        *[st.builds(SwapOut, st.integers(0, 5))] * 2,
        st.builds(WorkDisk, st.integers(1, 4)),
        st.builds(WorkDisk, st.just(1), fails=st.just(True)),
        st.builds(Restart, st.booleans(), st.lists(again, max_size=4).map(tuple)),
        st.builds(BreakFile, st.integers(0, 5)),
        st.builds(Reconfigure, st.integers(0, 20), st.booleans()),
    )


def scripts(min_size: int = 10, max_size: int = 25) -> st.SearchStrategy[list[Operation]]:
    """Short ones begin nothing that a later operation could disturb."""
    return st.lists(operations(), min_size=min_size, max_size=max_size)


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
        num_frames=st.sampled_from((0, 2, 4, 10, 10)),
        max_files=st.sampled_from((0, 2, 20, 20)),
        min_file_tokens=st.sampled_from((0, 0, 8)),
        time_slice_tokens=st.sampled_from((0, 0, 2, 5)),
    )
