"""Guests: everybody who uses a Machine, what they have asked, been told and kept.

Each answer is compared with the oracle's, token by token as it comes. Knows what may go wrong
after which trouble; whatever the trouble, a wrong token or a lost reader is never excused.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

from engine.errors import EngineError, InvalidRequest, StateNotFound, StatesFull
from engine.types import (
    EngineRequest,
    FinishReason,
    LiveLimits,
    OutputDelta,
    SamplingParams,
    StateInfo,
    StateOptions,
)
from tests.engine.asked import Asked, Kept, emitted_ids
from tests.engine.machine import SEED, Machine, text_state
from tests.engine.replica import limits, turn

TUNED = {"poet": 12345}
LOST = "the state it was to go on from is lost"
ERRORS = {"injected failure", LOST}
ERRORS |= {f"the state could not be kept: {error}" for error in ERRORS}


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    num_slots: int = 4
    max_batch_size: int = 4
    depth: int = 2
    num_frames: int = 12
    num_files: int = 40
    has_cache: bool = True
    has_disk: bool = True
    decode_first: bool = True
    time_slice_tokens: int = 0
    extra_batch_tokens: int = 8
    has_trouble: bool = False  # steps and jobs may fail, files may break

    @property
    def live(self) -> LiveLimits:
        return limits(
            decode_first=self.decode_first,
            max_batch_tokens=self.max_batch_size + 4 + self.extra_batch_tokens,
            time_slice_tokens=self.time_slice_tokens,
            max_waiting=10_000,
        )


class Guests:
    """They live through restarts and kills of the machine."""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self.machine = Machine(
            setup.live,
            num_slots=setup.num_slots,
            num_frames=setup.num_frames,
            num_files=setup.num_files,
            max_batch_size=setup.max_batch_size,
            depth=setup.depth,
            seed=SEED if setup.has_cache else None,
            with_disk=setup.has_disk,
            is_eager=False,
            tuned=TUNED,
        )
        self.asked: list[Asked] = []
        self.suspended: list[tuple[str, Asked]] = []
        self.kept: list[Kept] = []
        self.files: list[tuple[bytes, tuple[int, int]]] = []
        self.num_answers = 0
        self._had_trouble = False
        self._was_killed = False  # perhaps before a deletion came to the disk
        self._exports: list[tuple[asyncio.Task[bytes], Kept]] = []
        self._imports: list[tuple[asyncio.Task[StateInfo], str, tuple[int, int]]] = []
        self._num_ids = 0

    # What they do

    def ask(self, request: EngineRequest, base: Kept | None) -> None:
        self._num_ids += 1
        request = replace_id(request, f"r{self._num_ids}", base)
        start = (0, 0) if base is None else base.base
        if base is None and request.initial_state is not None:
            start = (TUNED[request.initial_state], 0)
        one = Asked(request, start)
        try:
            one.stream = self.machine.core.submit(request)
        except StatesFull:
            assert request.keep_state is not None
            return
        except StateNotFound:
            assert base is not None
            self._is_missing(base)
            return
        except InvalidRequest:
            assert request.prompt_ids == (), "refused, though it has a prompt"
            return
        self.asked.append(one)

    def resume(self, index: int) -> None:
        if not self.suspended:
            return
        resume_id, one = self.suspended.pop(index % len(self.suspended))
        self._num_ids += 1
        try:
            name = f"r{self._num_ids}"
            one.stream = self.machine.core.resume(resume_id, one.request.owner, name)
        except StateNotFound:
            is_from_state = one.request.state_id is not None and not one.tokens
            assert self._had_trouble or is_from_state, f"{resume_id} is lost"
            return
        self.asked.append(one)

    def abort(self, index: int) -> None:
        alive = [one for one in self.asked if one.stream is not None]
        if alive:
            one = alive[index % len(alive)]
            assert one.stream is not None
            one.is_aborted = True
            self.machine.core.abort(one.stream.request_id)

    def fork(self, index: int) -> None:
        state = self.pick(index)
        if state is not None:
            try:
                info = self.machine.core.states.fork(state.owner, state.state_id, StateOptions())
            except StateNotFound:
                self._is_missing(state)
                return
            self.kept.append(Kept(info.state_id, state.owner, state.base))

    def delete(self, index: int) -> None:
        state = self.pick(index)
        if state is not None:
            self.kept.remove(state)
            try:
                self.machine.core.states.delete(state.owner, state.state_id)
            except StateNotFound:
                assert self._had_trouble

    def export(self, index: int) -> None:
        state = self.pick(index)
        if state is not None:
            work = self.machine.core.states.export_file(state.owner, state.state_id)
            self._exports.append((asyncio.ensure_future(work), state))

    def import_(self, index: int, owner: str) -> None:
        if self.files:
            data, base = self.files[index % len(self.files)]
            work = self.machine.core.states.import_file(owner, data, StateOptions())
            self._imports.append((asyncio.ensure_future(work), owner, base))

    def pick(self, index: int) -> Kept | None:
        return self.kept[index % len(self.kept)] if self.kept else None

    # What happens to them

    async def step(self, *, fails: bool = False) -> None:
        """The device finishes the oldest step in flight."""
        await turn()
        if self.machine.runner.plans:
            if fails and self.setup.has_trouble:
                self._had_trouble = True
                self.machine.runner.deliver_failure()
            else:
                self.machine.runner.deliver()
            await turn()
        self.listen()

    async def work_disk(self, *, fails: bool = False) -> None:
        await turn()
        if self.machine.disk.jobs:
            fails = fails and self.setup.has_trouble
            self._had_trouble |= fails
            self.machine.disk.fails = (object,) if fails else ()  # type: ignore[assignment]
            self.machine.disk.finish()
            self.machine.disk.fails = ()
            await turn()
        self.listen()

    def break_file(self, index: int) -> None:
        digests = sorted(self.machine.folder.files)
        if digests and self.setup.has_trouble:
            self._had_trouble = True
            self.machine.folder.broken.add(digests[index % len(digests)])

    async def stop(self, *, suspends: bool) -> None:
        """A graceful stop and a new start; who asked for it may go on."""
        if suspends:
            assert await self.machine.suspend()
            self.listen()
            assert not any(one.stream for one in self.asked), "somebody was left at the drain"
        for one in self.asked:
            one.is_aborted = one.stream is not None
        await self.machine.stop()
        await self._await_files()
        self.listen()
        self._forget_lost(self.setup.has_disk)
        self.machine.start()

    async def kill(self) -> None:
        tasks = self._file_tasks()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._exports.clear()
        self._imports.clear()
        self.listen()
        await self.machine.kill()
        self._was_killed = True
        self.asked.clear()
        records = self.machine.folder.records
        self.suspended = [(name, one) for name, one in self.suspended if name in records]
        self.kept = [state for state in self.kept if state.state_id in records]
        self.machine.start()
        self._forget_lost(is_certain=True)

    def listen(self) -> None:
        """Take what has come, and compare it."""
        for one in [one for one in self.asked if one.stream is not None]:
            assert one.stream is not None
            delta = one.stream.poll()
            if delta is not None:
                self._hear(one, delta)
        self.asked = [one for one in self.asked if one.stream is not None]
        self._take_files()

    async def finish(self) -> None:
        """Nobody new; everybody must get an answer, and everything be given back."""
        await self.settle()
        for _ in list(self.suspended):
            self.resume(0)
        await self.settle()
        assert self.suspended == []
        for state in list(self.kept):
            sampling = SamplingParams(max_tokens=3)
            request = EngineRequest(request_id="last", prompt_ids=(3, 1, 4), sampling=sampling)
            self.ask(request, state)
            await self.settle()
        await self.machine.check_is_sound()
        while self.kept:
            self.delete(0)
        await self.machine.check_is_sound()
        is_clean = not (self._had_trouble or self._was_killed)
        assert len(self.machine.core._store) == 0 or not is_clean, "a state nobody has an id of"
        await self.machine.stop()
        if is_clean:
            assert self.machine.folder.records == {}, "a record is left"

    async def settle(self) -> None:
        await self.machine.settle()
        await self._await_files()
        self.listen()
        left = [one.request for one in self.asked]
        assert not left, f"never answered: {left}"

    def _hear(self, one: Asked, delta: OutputDelta) -> None:
        tokens, _, text = one.expected
        one.tokens += delta.token_ids
        one.text += delta.text
        assert one.tokens == tokens[: len(one.tokens)], f"{one.request}: wrong at {len(one.tokens)}"
        assert delta.num_output_tokens >= len(one.tokens)
        if delta.finish_reason is None:
            assert text.startswith(one.text)
            return
        one.stream, one.reason = None, delta.finish_reason
        if delta.finish_reason is FinishReason.SUSPENDED:
            assert one.request.is_resumable
            assert delta.resume_id is not None
            self.suspended.append((delta.resume_id, one))
        elif delta.finish_reason is FinishReason.ERROR:
            assert self._had_trouble, delta.error
            assert delta.error in ERRORS
        elif delta.finish_reason is FinishReason.ABORT:
            assert one.is_aborted, f"{one.request} was aborted by nobody"
        else:
            assert (one.tokens, delta.finish_reason, one.text) == one.expected
            self.num_answers += 1
            self._keep(one, delta)

    def _keep(self, one: Asked, delta: OutputDelta) -> None:
        if one.request.keep_state is None:
            assert delta.state is None
            return
        assert delta.state is not None, "the state was not kept"
        ids = emitted_ids(one.request, one.tokens, delta.matched_stop)
        base = text_state((*one.request.prompt_ids, *ids), one.base)
        assert delta.state.num_tokens == base[1]
        self.kept.append(Kept(delta.state.state_id, one.request.owner, base))

    def _take_files(self) -> None:
        exports, imports = self._exports, self._imports
        self._exports = [one for one in exports if not one[0].done()]
        self._imports = [one for one in imports if not one[0].done()]
        for export, state in exports:
            if export.done() and _is_good(export):
                self.files.append((export.result(), state.base))
        for task, owner, base in imports:
            if task.done() and _is_good(task):
                self.kept.append(Kept(task.result().state_id, owner, base))

    def _file_tasks(self) -> list[asyncio.Future[Any]]:
        return [*(task for task, *_ in self._exports), *(task for task, *_ in self._imports)]

    async def _await_files(self) -> None:
        if tasks := self._file_tasks():
            await self.machine.while_settling(asyncio.wait(tasks))

    def _is_missing(self, state: Kept) -> None:
        assert self._had_trouble, f"{state} is missing"
        self.kept = [other for other in self.kept if other is not state]

    def _forget_lost(self, is_certain: bool) -> None:
        """What is still known after a restart. `is_certain`: all that we know should be there."""
        if not self.setup.has_disk:
            self.kept, self.suspended = [], []
            return
        records = self.machine.folder.records
        lost = [state for state in self.kept if state.state_id not in records]
        assert self._had_trouble or not (lost and is_certain), f"{lost} were not saved"
        self.kept = [state for state in self.kept if state.state_id in records]


def replace_id(request: EngineRequest, name: str, base: Kept | None) -> EngineRequest:
    fields = {slot: getattr(request, slot) for slot in EngineRequest.__slots__}
    fields["request_id"] = name
    if base is not None:
        fields |= {"state_id": base.state_id, "owner": base.owner, "initial_state": None}
    return EngineRequest(**fields)


def _is_good(task: asyncio.Future[Any]) -> bool:
    """Else the engine was stopped, there was no room, or the state is gone."""
    error = task.exception()
    assert error is None or isinstance(error, EngineError), error
    return error is None
