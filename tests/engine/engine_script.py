"""Scripts: random days of a Machine and its Guests, as hypothesis strategies."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Protocol

from hypothesis import strategies as st

from engine.types import EngineRequest, SamplingParams, StateOptions
from tests.engine.guests import Guests, Setup
from tests.engine.scripts import MANY_STOP_IDS, prompts

OWNERS = ("ann", "bob")


class Operation(Protocol):
    async def __call__(self, guests: Guests) -> None: ...


@dataclass(frozen=True)
class Ask:
    """Several requests together; from the state of number `base`, if there are any."""

    requests: tuple[EngineRequest, ...]
    base: int | None = None
    is_empty: bool = False  # the prompt, if it goes on from a state

    async def __call__(self, guests: Guests) -> None:
        base = None if self.base is None else guests.pick(self.base)
        for request in self.requests:
            is_empty = self.is_empty and base is not None
            guests.ask(replace(request, prompt_ids=()) if is_empty else request, base)


@dataclass(frozen=True)
class Step:
    times: int
    fails: bool = False  # the last one

    async def __call__(self, guests: Guests) -> None:
        for rest in reversed(range(self.times)):
            await guests.step(fails=self.fails and rest == 0)
            if rest % 2 == 0:
                await guests.work_disk()


@dataclass(frozen=True)
class WorkDisk:
    times: int
    fails: bool = False

    async def __call__(self, guests: Guests) -> None:
        for _ in range(self.times):
            await guests.work_disk(fails=self.fails)


@dataclass(frozen=True)
class StepsAlone:
    """The device goes on while the disk does not."""

    times: int

    async def __call__(self, guests: Guests) -> None:
        for _ in range(self.times):
            await guests.step()


@dataclass(frozen=True)
class OnState:
    verb: str  # of Guests: fork, delete, abort, resume, break_file
    index: int

    async def __call__(self, guests: Guests) -> None:
        getattr(guests, self.verb)(self.index)


@dataclass(frozen=True)
class Move:
    """A state leaves as bytes, and what has left earlier comes to somebody."""

    index: int
    owner: str
    times: int  # steps until they are looked for

    async def __call__(self, guests: Guests) -> None:
        guests.export(self.index)
        for _ in range(self.times):
            await guests.step()
            await guests.work_disk()
        guests.import_(self.index, self.owner)


@dataclass(frozen=True)
class Settle:
    """Everybody who was asked something answers."""

    async def __call__(self, guests: Guests) -> None:
        await guests.settle()


@dataclass(frozen=True)
class Stop:
    """A restart, graceful or not; some of the suspended go on."""

    kind: str
    num_resumed: int

    async def __call__(self, guests: Guests) -> None:
        if self.kind == "kill":
            await guests.kill()
        elif self.kind == "begin, kill":
            guests.machine.core._persistence.begin_suspending()
            for _ in range(self.num_resumed):
                await guests.step()
                await guests.work_disk()
            await guests.kill()
        else:
            await guests.stop(suspends=self.kind == "suspend")
        for index in range(self.num_resumed):
            guests.resume(index)


@dataclass(frozen=True)
class Reconfigure:
    decode_first: bool
    time_slice_tokens: int

    async def __call__(self, guests: Guests) -> None:
        live = replace(
            guests.setup.live,
            decode_first=self.decode_first,
            time_slice_tokens=self.time_slice_tokens,
        )
        guests.machine.core.reconfigure(live)


def request(is_prompt_only: bool, keeps: bool, **fields: Any) -> EngineRequest:
    sampling: SamplingParams = fields.pop("sampling")
    if is_prompt_only and keeps:
        sampling = replace(sampling, max_tokens=0)
    keep = StateOptions(label="x") if keeps else None
    return EngineRequest(request_id="r", sampling=sampling, keep_state=keep, **fields)


def requests() -> st.SearchStrategy[EngineRequest]:
    return st.builds(
        request,
        is_prompt_only=st.booleans(),
        keeps=st.sampled_from((True, True, False)),
        prompt_ids=prompts(),
        sampling=st.builds(
            SamplingParams,
            max_tokens=st.integers(1, 12),
            seed=st.integers(0, 3),
            stop_token_ids=st.sampled_from(((), MANY_STOP_IDS)),
            stop=st.sampled_from(((), (), ("7",), ("56", "é6", "a"))),
        ),
        priority=st.sampled_from((0, 0, 0, 1)),
        cache_salt=st.sampled_from(("", "", "", "tenant")),
        owner=st.sampled_from(OWNERS),
        initial_state=st.sampled_from((None, None, None, "poet")),
        is_resumable=st.booleans(),
    )


def operations() -> st.SearchStrategy[Operation]:
    few = st.lists(requests(), min_size=1, max_size=2).map(tuple)
    many = st.lists(requests(), min_size=3, max_size=8).map(tuple)
    equal = st.builds(lambda one, times: Ask((one,) * times), requests(), st.integers(2, 5))
    index = st.integers(0, 5)
    from_state = st.builds(Ask, few, index, st.booleans())
    step = st.builds(Step, st.integers(1, 6))
    kinds = st.sampled_from(("kill", "begin, kill", "stop", "suspend", "suspend"))
    return st.one_of(
        st.builds(Ask, few),
        *[step] * 4,
        st.builds(StepsAlone, st.integers(1, 8)),
        st.builds(Ask, many),
        equal,
        *[from_state] * 3,
        *[st.builds(OnState, st.just(verb), index) for verb in ("fork", "delete", "abort")],
        *[st.builds(OnState, st.just(verb), index) for verb in ("resume", "resume", "break_file")],
        *[st.builds(Move, index, st.sampled_from(OWNERS), st.integers(0, 5))] * 3,
        *[st.just(Settle())] * 2,
        st.builds(WorkDisk, st.integers(1, 4)),
        st.builds(WorkDisk, st.just(1), fails=st.just(True)),
        st.builds(Step, st.integers(1, 4), fails=st.just(True)),
        *[st.builds(Stop, kinds, st.integers(0, 4))] * 2,
        st.builds(Reconfigure, st.booleans(), st.sampled_from((0, 2))),
    )


def scripts(min_size: int = 10, max_size: int = 25) -> st.SearchStrategy[list[Operation]]:
    return st.lists(operations(), min_size=min_size, max_size=max_size)


def setups() -> st.SearchStrategy[Setup]:
    return st.builds(
        Setup,
        num_slots=st.integers(1, 6),
        max_batch_size=st.integers(1, 5),
        depth=st.integers(1, 3),
        num_frames=st.sampled_from((4, 5, 8, 12, 30)),
        num_files=st.sampled_from((5, 40, 40)),
        has_cache=st.sampled_from((True, True, False)),
        has_disk=st.sampled_from((True, True, True, False)),
        decode_first=st.booleans(),
        time_slice_tokens=st.sampled_from((0, 0, 1, 3)),
        extra_batch_tokens=st.integers(0, 20),
        has_trouble=st.booleans(),
    )
