"""Machine: one replica after the other over one folder, with device, host memory and disk.

All three are hash models, so a page that is mixed up anywhere ends in a wrong token. The machine
can be stopped, killed and started again. Knows nothing of what the requests are for.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from hashlib import blake2b
from typing import TypeVar

from engine.client import RequestStream
from engine.core import EngineCore
from engine.errors import StateMismatch
from engine.plan import SlotRef, StepPlan
from engine.state.page import DiskJob, DiskResult, PageFile
from engine.state.page import Page as CorePage
from engine.state.parts import StateParts
from engine.types import EngineRequest, FinishReason, LiveLimits, OutputDelta
from tests.engine.replica import Recorder, hash_tokenizer, limits, make_core, read_all, turn
from tests.hash_disk import HashDisk, HashFolder
from tests.hash_model import HashModel, HashRunner, Page, feed, oracle

T = TypeVar("T")
SEED = b"seed"


class EagerRunner(HashRunner):
    """Does each plan as soon as the loop is free."""

    def submit(self, plan: StepPlan) -> None:
        super().submit(plan)
        asyncio.get_running_loop().call_soon(self._deliver_next)

    def _deliver_next(self) -> None:
        if self.plans and not self.is_closed:
            self.deliver()


class MemoryDisk:
    """A `Disk` whose jobs are done at once, or when the test says so. `fails` of their kinds."""

    def __init__(self, folder: HashFolder, model: HashModel, *, is_eager: bool) -> None:
        self.fails: tuple[type[DiskJob], ...] = ()
        self.is_eager = is_eager
        self.done: list[DiskJob] = []
        self._inner = HashDisk(folder, model)
        self._on_result: Callable[[DiskResult], None] | None = None

    @property
    def jobs(self) -> list[DiskJob]:
        return list(self._inner.jobs)

    def scan_pages(self) -> list[PageFile]:
        return self._inner.scan_pages()

    def scan_records(self) -> dict[str, bytes]:
        return dict(self._inner.folder.records)

    def start(self, on_result: Callable[[DiskResult], None]) -> None:
        self._on_result = on_result

    def submit(self, job: DiskJob) -> None:
        self._inner.submit([job])
        if self.is_eager:
            self.finish()

    def finish(self) -> None:
        """Do the oldest job."""
        assert self._on_result is not None, "a job before the start"
        job = self._inner.jobs[0]
        self.done.append(job)
        self._on_result(self._inner.finish(fails=isinstance(job, self.fails)))

    def close(self) -> None:
        while self._inner.jobs:
            self.finish()


class HashCodec:
    """A `FrameCodec`. While `gate` is closed, threads in it wait in front of the frame."""

    def __init__(self, model: HashModel) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.num_inside = 0
        self._model = model

    def encode(self, file: PageFile, frame: SlotRef) -> bytes:
        self._pass_gate()
        page = self._model.frames[frame.slot]
        assert page.generation == frame.generation, f"stale {frame} is exported"
        logits = page.logits if file.has_logits else None
        return json.dumps([file.num_tokens, page.state, logits]).encode()

    def decode(self, data: bytes, frame: SlotRef) -> PageFile:
        self._pass_gate()
        old = self._model.frames.get(frame.slot)
        assert old is None or old.generation <= frame.generation, f"stale {frame} is read into"
        self._model.frames[frame.slot] = Page(0xF00, frame.generation)
        try:
            num_tokens, state, logits = json.loads(data)
        except ValueError as error:
            raise StateMismatch(f"no state: {error}", "file") from error
        self._model.frames[frame.slot] = Page(state, frame.generation, logits or 0xBAD)
        return PageFile(blake2b(data, digest_size=16).digest(), num_tokens, logits is not None)

    def _pass_gate(self) -> None:
        self.num_inside += 1
        assert self.gate.wait(10), "the gate was never opened"
        self.num_inside -= 1


class Machine:
    """`with_disk` = False: states live in memory only. `tuned`: initial states by name.

    Not `is_eager`: the test delivers steps and jobs, with `settle` or one by one.
    """

    def __init__(
        self,
        live: LiveLimits | None = None,
        *,
        num_slots: int = 4,
        num_frames: int = 24,
        num_files: int = 100,
        max_batch_size: int = 4,
        depth: int = 2,
        seed: bytes | None = SEED,
        with_disk: bool = True,
        is_eager: bool = True,
        tuned: Mapping[str, int] | None = None,
        folder: HashFolder | None = None,
    ) -> None:
        self.folder = folder or HashFolder()
        self._live = live or limits()
        self._sizes = {
            "num_slots": num_slots,
            "num_frames": num_frames,
            "num_files": num_files if with_disk else 0,
            "max_batch_size": max_batch_size,
            "depth": depth,
        }
        self._seed = seed
        self._with_disk = with_disk
        self._is_eager = is_eager
        self._tuned = dict(tuned or {})
        self.runner: HashRunner
        self.disk: MemoryDisk
        self.codec: HashCodec
        self.stats: Recorder
        self.core: EngineCore

    async def __aenter__(self) -> Machine:
        self.start()
        return self

    async def __aexit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            assert not self.core.snapshot().is_dead, self.core._death
        self.codec.gate.set()
        await self.stop()

    def start(self) -> None:
        """A new process: nothing but the folder is left of an earlier one."""
        self.runner = EagerRunner() if self._is_eager else HashRunner()
        model = self.runner.model
        self.disk = MemoryDisk(self.folder, model, is_eager=self._is_eager)
        self.codec = HashCodec(model)
        self.stats = Recorder()
        files = {}
        for number, (name, state) in enumerate(self._tuned.items(), start=1):
            model.frames[number] = Page(state, 0)
            files[name] = PageFile(blake2b(name.encode(), digest_size=16).digest(), 0, False)
        disk = self.disk if self._with_disk else None
        parts = StateParts(seed=self._seed, disk=disk, codec=self.codec, tuned=files)
        self.core = make_core(self.runner, self._live, stats=self.stats, parts=parts, **self._sizes)
        self.core.start()

    async def stop(self) -> None:
        """A graceful end."""
        await self.while_settling(self.core.close())

    async def kill(self) -> None:
        """An end without a word: what was not written is lost, jobs not begun are not done."""
        task = self.core._task
        if task is not None:  # else it was stopped before
            task.cancel()
            await asyncio.wait([task])
        self.runner.is_closed = True
        self.runner.plans.clear()
        for timer in (*self.core._responses._timers.values(), self.core._sweep_timer):
            if timer is not None:
                timer.cancel()

    async def restart(self) -> None:
        await self.stop()
        self.start()

    async def settle(self) -> None:
        """Deliver steps and jobs until there are none."""
        for _ in range(100_000):
            await turn()
            if self.runner.plans and not self.runner.is_closed:
                self.runner.deliver()
            elif self.disk.jobs:
                self.disk.finish()
            elif self.codec.num_inside and self.codec.gate.is_set():
                await asyncio.sleep(0.001)
            else:
                return
        raise AssertionError("the machine does not come to rest")

    async def while_settling(self, work: Awaitable[T]) -> T:
        """The result of `work`, which needs steps or jobs to be done."""
        task = asyncio.ensure_future(work)
        async with asyncio.timeout(20):
            while not task.done():
                await self.settle()
                await asyncio.sleep(0 if self._is_eager else 0.0005)
        return await task

    async def until(self, is_so: Callable[[], bool]) -> None:
        """Wait for a thread."""
        async with asyncio.timeout(5):
            while not is_so():  # noqa: ASYNC110
                await asyncio.sleep(0.001)

    async def answer(self, request: EngineRequest) -> OutputDelta:
        return await self.while_settling(read_all(self.core.submit(request)))

    async def suspend(self, timeout_s: float = 10) -> bool:
        return await self.while_settling(self.core.drain(timeout_s, suspends=True))

    @property
    def num_prefill_tokens(self) -> int:
        """Prompt tokens that were computed so far."""
        return sum(step.num_prefill_tokens for step in self.stats.steps)

    async def check_is_sound(self) -> None:
        """At rest, each place and each hold belongs to somebody who is known."""
        await self.settle()
        core = self.core
        assert not core._responses, f"{list(core._responses)} are still being answered"
        assert core._pipeline.is_empty, "a step is in flight"
        core._scheduler.check()
        tiers, store = core._cache.tiers, core._store
        holders: Counter[CorePage] = Counter(state.page for state in store._states.values())
        holders.update(store._tuned.values())
        suspended = core._persistence.suspensions._held.values()
        holders.update(held.page for held in suspended if held.page is not None)
        pages = {*core._cache.index, *holders}
        for page in pages:
            assert page.num_holders == holders[page], f"{page} is held by {holders[page]}"
        assert not core._persistence.suspensions._leaving, "somebody never left"
        assert core._keeper.num_imports == 0, "an import never ended"
        if tiers.frames is None:
            return
        frames = [page.frame for page in pages if page.frame is not None]
        assert len(set(frames)) == len(frames), "two pages share a frame"
        refs = [tiers.frames.refs(frame) for frame in frames]
        assert refs == [1] * len(frames), f"a frame of an idle machine is held: {refs}"
        assert tiers.num_frames_used == len(frames), "a frame is nobody's"
        for page in pages:
            self._check_content(page)

    def _check_content(self, page: CorePage) -> None:
        """All copies of a page are equal."""
        model, found = self.runner.model, set()
        if page.slot is not None:
            found.add((model.pages[page.slot.slot].state, model.pages[page.slot.slot].logits))
        if page.frame is not None:
            found.add((model.frames[page.frame.slot].state, model.frames[page.frame.slot].logits))
        if not page.has_logits:
            found = {(state, 0) for state, _ in found}
        assert len(found) <= 1, f"copies of {page} differ: {found}"


def text_state(ids: tuple[int, ...], base: tuple[int, int] = (0, 0)) -> tuple[int, int]:
    """The state after some tokens and how many they are, as the oracle takes it."""
    state, num_tokens = base
    for token in ids:
        state = feed(state, token)
    return state, num_tokens + len(ids)


def assert_answers(
    delta: OutputDelta, request: EngineRequest, base: tuple[int, int] = (0, 0)
) -> None:
    """The answer is that of the request run alone, going on from `base`."""
    answer = oracle(request, base=base)
    assert delta.token_ids == answer.token_ids
    assert delta.finish_reason is answer.finish_reason, delta.error
    assert delta.num_prompt_tokens == len(request.prompt_ids)
    is_stopped = answer.finish_reason is FinishReason.STOP
    shown = answer.token_ids[:-1] if is_stopped else answer.token_ids
    assert delta.text == hash_tokenizer().decode(shown)


def join(*deltas: OutputDelta) -> OutputDelta:
    """What the reader of a suspended and resumed answer has seen in all."""
    whole = deltas[0]
    for delta in deltas[1:]:
        stream = RequestStream("joined", lambda request_id: None)
        stream.put(OutputDelta(text=whole.text, token_ids=whole.token_ids, logprobs=whole.logprobs))
        stream.put(delta)
        joined = stream.poll()
        assert joined is not None
        whole = joined
    return whole
