"""EngineCore: the event loop's side of one replica: submit, plan, commit, abort, drain.

Knows integers, text and mailboxes; the tensors are behind the Runner. Everything here runs on
one event loop, so nothing is locked.
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress
from dataclasses import replace
from time import perf_counter

from engine.admission import check_grammar, check_request
from engine.batch import Batch
from engine.client import RequestStream, Resumed, States
from engine.errors import Draining, EngineDead, EngineError, InvalidRequest, Overloaded
from engine.grammar import GrammarCompiler
from engine.keeper import StateKeeper
from engine.persistence import Persistence
from engine.pipeline import Pipeline
from engine.plan import Runner, StepPlan, StepResult
from engine.responses import Responses
from engine.scheduler import Scheduler
from engine.sequence import Sequence, SequenceStatus
from engine.state.parts import StateParts
from engine.step_stats import step_stats
from engine.tokenizer import Tokenizer
from engine.types import (
    EngineRequest,
    EngineSnapshot,
    FinishReason,
    LiveLimits,
    ModelInfo,
    OutputDelta,
    StatsSink,
)

logger = logging.getLogger(__name__)

DEPTH = 2  # plans in flight: the device starts one while the loop handles the other's result
SWEEP_S = 60.0
CLOSE_TIMEOUT_S = 10.0  # then a device thread that does not stop is left behind


class EngineCore:
    """An EngineClient in this process. Give it a runner, `start()` it on the loop, `close()` it.

    `max_waiting` counts requests beyond those that could start at once.
    """

    def __init__(
        self,
        info: ModelInfo,
        tokenizer: Tokenizer,
        runner: Runner,
        limits: LiveLimits,
        stats: StatsSink | None = None,
        depth: int = DEPTH,
        parts: StateParts | None = None,
        grammars: GrammarCompiler | None = None,
    ) -> None:
        """Without `parts` nothing is reused, and states live on the device only; without
        `grammars` no request can name one."""
        parts = parts or StateParts()
        cache = parts.open_cache(info)
        self._cache = cache
        self._store = parts.open_store(info, cache)
        self._scheduler = Scheduler(cache, limits, max_batch_size=info.max_batch_size)
        self._info = info
        self._tokenizer = tokenizer
        self._grammars = grammars
        self._stats = stats
        self._wake = asyncio.Event()
        self._responses = Responses(self._scheduler, self._store, tokenizer, stats, self._wake.set)
        self._pipeline = Pipeline(runner, depth, self._wake.set)
        responses = self._responses  # no part refers to the whole: only so its memory is freed
        self._keeper = StateKeeper(
            self._store, cache, parts.codec, self._wake.set, lambda: responses.num_promised_states
        )
        self._persistence = Persistence(
            parts.disk, cache, self._store, self._keeper, self._scheduler, self._wake.set
        )
        self._is_accepting = True
        self._death: str | None = None
        self._task: asyncio.Task[None] | None = None
        self._sweep_timer: asyncio.TimerHandle | None = None
        self._closing: asyncio.Task[None] | None = None

    @property
    def info(self) -> ModelInfo:
        """With the limits as they are now."""
        limits = self._scheduler.limits
        return replace(
            self._info,
            max_batch_tokens=limits.max_batch_tokens,
            max_context_len=limits.max_context_len,
        )

    @property
    def tokenizer(self) -> Tokenizer:
        return self._tokenizer

    @property
    def states(self) -> States:
        return self._keeper

    def start(self) -> None:
        """Start the runner and the loop task. Called once, on the event loop."""
        assert self._task is None, "the engine is started once"
        self._pipeline.start()
        self._persistence.start()
        self._sweep()
        self._task = asyncio.create_task(self._run(), name=f"engine {self._info.model_name}")

    async def prepare(self, grammar: str) -> None:
        """Compile a grammar off the loop. Raises InvalidRequest."""
        if self._grammars is None:
            raise InvalidRequest("this engine follows no grammars; leave it out", "grammar")
        await self._grammars.prepare(grammar)

    def submit(self, request: EngineRequest) -> RequestStream:
        """Queue a request. Raises InvalidRequest, Overloaded, Draining or EngineDead at once."""
        self._check_open()
        self._check_acceptable(request)
        self._check_queue()
        if request.keep_state is not None:
            self._store.check_room(self._num_coming_states)
        stream = RequestStream(request.request_id, self.abort)
        self._enqueue(request, stream)
        return stream

    def open_batch(self) -> Batch:
        """Accept requests that come a few at a time. Raises Overloaded, Draining or EngineDead."""
        self._check_open()
        self._check_queue()
        self._responses.hold_open()
        return Batch(self._submit_part, self._responses.let_end)

    def resume(self, resume_id: str, owner: str, request_id: str) -> RequestStream:
        """Go on with a suspended generation. Raises StateNotFound, Draining or EngineDead."""
        self._check_open()
        self._check_id(request_id)
        suspensions = self._persistence.suspensions
        seq = suspensions.take(resume_id, owner, request_id, self._responses.next_seq_id())
        stream = RequestStream(request_id, self.abort)
        memo = seq.request.memo
        if seq.status is SequenceStatus.WAITING:
            stream.resumed = Resumed(memo, "")
            self._enqueue(seq.request, stream)
            return stream
        with suppress(InvalidRequest):  # needed only to keep the state at the end
            seq.base = self._store.base_of(seq.request)
            if seq.base is not None:
                self._cache.tiers.hold(seq.base)
        stream.resumed = Resumed(memo, self._responses.begin(seq, stream).replay())
        return stream

    def rescan(self) -> None:
        """Look for files that another replica has left since the start. Returns at once."""
        self._persistence.rescan()

    def take_waiting(self) -> list[tuple[EngineRequest, RequestStream]]:
        """Hand over the requests that have not begun; this engine forgets them."""
        seals = [response.seal for response in self._responses if response.seal is not None]
        taken = [
            self._responses.remove(seq.request.request_id)
            for seq in self._scheduler.take_waiting(staying=seals)
        ]
        for response in taken:
            self._responses.let_base_go(response)
        return [(response.seq.request, response.stream) for response in taken]

    def adopt(self, request: EngineRequest, stream: RequestStream) -> None:
        """Take over a request that waited elsewhere; it keeps its stream, age and deadline.

        Never raises: what this engine cannot serve ends with an error in its stream. The limit
        of the queue is not applied, since the request was accepted once.
        """
        if stream.is_closed:
            return
        try:
            self._check_open()
            self._check_acceptable(request)
        except EngineError as error:
            stream.put(
                OutputDelta(
                    finish_reason=FinishReason.ERROR,
                    num_prompt_tokens=len(request.prompt_ids),
                    error=str(error),
                )
            )
            return
        stream.rebind(self.abort)
        self._enqueue(request, stream)

    def abort(self, request_id: str) -> None:
        """End a request now; its slot is free when this returns. Unknown ids are ignored."""
        self._responses.abort(request_id)

    def reconfigure(self, limits: LiveLimits) -> None:
        """Change limits between two steps. Raises ValueError and keeps the old ones."""
        self._scheduler.reconfigure(limits)
        self._wake.set()

    def snapshot(self) -> EngineSnapshot:
        return EngineSnapshot(
            num_running=self._scheduler.num_running,
            num_waiting=self._scheduler.num_waiting,
            num_slots=self._info.num_slots,
            num_free_slots=self._scheduler.cache.tiers.num_available,
            cache=self._scheduler.cache.stats,
            is_accepting=self._is_accepting and self._death is None,
            is_dead=self._death is not None,
            seconds_since_commit=self._pipeline.seconds_since_result,
            death=self._death,
        )

    async def drain(self, timeout_s: float, *, suspends: bool = False) -> bool:
        """Refuse new requests, finish the accepted ones; abort what is left. True if none was.

        With `suspends`, resumable ones go to the disk at once, where there is one.
        """
        self._is_accepting = False
        if suspends:
            self._persistence.begin_suspending()
        try:
            async with asyncio.timeout(timeout_s):
                await self._responses.wait_until_empty()
        except TimeoutError:
            self._responses.abort_all()
            return False
        return True

    async def close(self) -> None:
        """Abort what runs, stop the device thread. Safe to call twice, and if it is cancelled."""
        self._is_accepting = False
        if self._closing is None:
            self._closing = asyncio.create_task(self._shut_down())
        await asyncio.shield(self._closing)

    @property
    def _num_coming_states(self) -> int:
        """States that were promised and are not filed yet."""
        return self._responses.num_promised_states + self._keeper.num_imports

    def _check_open(self) -> None:
        self._check_alive()
        if not self._is_accepting:
            raise Draining(f"{self._info.model_name} is shutting down and takes nothing new")

    def _check_alive(self) -> None:
        if self._death is not None:
            raise EngineDead(f"{self._info.model_name} is out of service: {self._death}")

    def _check_queue(self) -> None:
        scheduler, limits = self._scheduler, self._scheduler.limits
        num_over = scheduler.num_waiting - limits.max_waiting
        if num_over >= 0 and num_over >= scheduler.num_admissible:
            retry_s = self._responses.rate.retry_after_s(scheduler.num_waiting, perf_counter())
            raise Overloaded(
                f"{scheduler.num_waiting} requests wait already (max_waiting ="
                f" {limits.max_waiting}): try again in {retry_s:.0f} s",
                retry_s,
            )

    def _check_id(self, request_id: str) -> None:
        if request_id in self._responses:
            raise InvalidRequest(
                f"request_id = {request_id!r} is in use by a request not yet finished",
                "request_id",
            )

    def _check_acceptable(self, request: EngineRequest) -> None:
        self._check_id(request.request_id)
        limits = self._scheduler.limits
        base = self._store.base_of(request)
        check_request(
            request,
            vocab_size=self._info.vocab_size,
            max_context_len=limits.max_context_len if limits.rejects_long_context else 0,
            has_start=base is not None and base.has_logits,
        )
        check_grammar(request.sampling, self._grammars)
        if request.keep_state is not None and self._info.num_frames == 0:
            raise InvalidRequest("states need host memory: set host_state_mib", "keep_state")

    def _submit_part(self, request: EngineRequest) -> RequestStream:
        """Of a batch that was accepted before."""
        self._check_alive()
        if self._closing is not None:
            raise Draining(f"{self._info.model_name} is shut down")
        self._check_acceptable(request)
        stream = RequestStream(request.request_id, self.abort)
        self._enqueue(request, stream)
        return stream

    def _enqueue(self, request: EngineRequest, stream: RequestStream) -> None:
        max_tokens = request.sampling.max_tokens
        limits = self._scheduler.limits
        if limits.max_context_len > 0 and limits.rejects_long_context:
            max_tokens = min(max_tokens, limits.max_context_len - len(request.prompt_ids))
        base = self._store.base_of(request)
        if base is not None:
            self._cache.tiers.hold(base)
        self._responses.begin(
            Sequence(self._responses.next_seq_id(), request, max_tokens, base), stream
        )

    def _sweep(self) -> None:
        """Now and then: states that have expired go; those that a full disk refused are tried."""
        self._store.sweep()
        self._store.retry()
        self._wake.set()
        self._sweep_timer = asyncio.get_running_loop().call_later(SWEEP_S, self._sweep)

    async def _run(self) -> None:
        try:
            while self._death is None:
                await self._wake.wait()
                self._wake.clear()
                self._persistence.finish_jobs()
                self._commit_results()
                self._suspend()
                self._plan_ahead()
                self._persistence.hand_out_jobs()
                if not self._responses and self._pipeline.is_empty:
                    self._scheduler.check()
        except Exception as error:
            logger.exception("the loop of %s failed", self._info.model_name)
            self._die(f"{type(error).__name__}: {error}")

    def _suspend(self) -> None:
        """Tell the readers of those that are on the disk by now."""
        seqs = [response.seq for response in self._responses]
        for resume_id, seq in self._persistence.suspend(seqs):
            self._scheduler.finish(seq, FinishReason.SUSPENDED)
            self._responses.settle(self._responses[seq.request.request_id], resume_id=resume_id)

    def _plan_ahead(self) -> None:
        while self._death is None and self._pipeline.has_room:
            plan = self._scheduler.plan()
            if plan is not None:
                self._pipeline.submit(plan)
            for progress in self._scheduler.take_ended():
                self._responses.progress(progress, perf_counter())
            if plan is None:
                return

    def _commit_results(self) -> None:
        while (pair := self._pipeline.take()) is not None:
            plan, result = pair
            self._commit(plan, result)
            if result.error is not None:
                logger.error("step %d failed: %s", result.step_id, result.error)
                if result.is_fatal:
                    self._die(result.error)

    def _commit(self, plan: StepPlan, result: StepResult) -> None:
        """Hand the tokens of one step to their readers."""
        now_s = perf_counter()
        gaps_s = []
        for progress in self._scheduler.commit(plan, result):
            gap_s = self._responses.progress(progress, now_s)
            if gap_s is not None:
                gaps_s.append(gap_s)
        self._keeper.changed()
        if self._stats is not None:
            self._stats.on_step(step_stats(plan, result, gaps_s))

    def _die(self, error: str) -> None:
        """The device, or this engine, cannot go on: fail everybody, accept nobody."""
        self._death = error
        self._keeper.stop(f"{self._info.model_name} is out of service: {error}")
        self._pipeline.forget()
        for response in list(self._responses):
            try:
                self._responses.end(response, FinishReason.ERROR, f"the engine died: {error}")
            except Exception:
                logger.exception("%s could not be ended in order", response.request_id)

    async def _shut_down(self) -> None:
        name = self._info.model_name
        self._responses.abort_all()
        if self._sweep_timer is not None:
            self._sweep_timer.cancel()
        if self._task is not None:
            if self._death is None:
                await self._persistence.save()
            self._keeper.stop(f"{name} is closed")
            self._task.cancel()
            await asyncio.wait([self._task])
            self._task = None  # a cancelled task refers to its frame, and that to the engine
        if not await self._pipeline.close(CLOSE_TIMEOUT_S):
            logger.error("the device thread of %s did not stop and is left behind", name)
        if not await self._persistence.close(CLOSE_TIMEOUT_S):
            logger.error("the disk of %s did not finish and is left behind", name)
