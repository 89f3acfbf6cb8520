"""EngineCore: the event loop's side of one replica: submit, plan, commit, abort, drain.

Knows integers, text and mailboxes; the tensors are behind the Runner. Everything here runs on
one event loop, so nothing is locked.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import replace
from itertools import count
from time import perf_counter

from engine.admission import ServiceRate, check_request
from engine.client import RequestStream
from engine.errors import Draining, EngineDead, EngineError, InvalidRequest, Overloaded
from engine.pipeline import Pipeline
from engine.plan import Runner, StepPlan, StepResult
from engine.response import Response
from engine.scheduler import Scheduler
from engine.sequence import Sequence
from engine.state.cache import StateCache
from engine.state.pool import SlotPool
from engine.tokenizer import Tokenizer
from engine.types import (
    EngineRequest,
    EngineSnapshot,
    FinishReason,
    LiveLimits,
    ModelInfo,
    OutputDelta,
    StatsSink,
    StepStats,
)

logger = logging.getLogger(__name__)

DEPTH = 2  # plans in flight: the device starts one while the loop handles the other's result
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
        cache_seed: bytes | None = None,
    ) -> None:
        """`cache_seed` names what states depend on besides tokens; None: nothing is reused."""
        cache = StateCache(SlotPool(info.num_slots), info.paragraph_len, cache_seed)
        self._scheduler = Scheduler(cache, limits, max_batch_size=info.max_batch_size)
        self._info = info
        self._tokenizer = tokenizer
        self._stats = stats
        self._seq_ids = count()
        self._rate = ServiceRate()
        self._responses: dict[str, Response] = {}  # by request_id, of everybody not finished
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._wake = asyncio.Event()
        self._pipeline = Pipeline(runner, depth, self._wake.set)
        self._idle = asyncio.Event()
        self._idle.set()
        self._is_accepting = True
        self._death: str | None = None
        self._task: asyncio.Task[None] | None = None
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

    def start(self) -> None:
        """Start the runner and the loop task. Called once, on the event loop."""
        assert self._task is None, "the engine is started once"
        self._pipeline.start()
        self._task = asyncio.create_task(self._run(), name=f"engine {self._info.model_name}")

    def submit(self, request: EngineRequest) -> RequestStream:
        """Queue a request. Raises InvalidRequest, Overloaded, Draining or EngineDead at once."""
        self._check_acceptable(request)
        scheduler, limits = self._scheduler, self._scheduler.limits
        if scheduler.num_waiting - scheduler.num_admissible >= limits.max_waiting:
            retry_s = self._rate.retry_after_s(scheduler.num_waiting, perf_counter())
            raise Overloaded(
                f"{scheduler.num_waiting} requests wait already (max_waiting ="
                f" {limits.max_waiting}): try again in {retry_s:.0f} s",
                retry_s,
            )
        stream = RequestStream(request.request_id, self.abort)
        self._enqueue(request, stream)
        return stream

    def take_waiting(self) -> list[tuple[EngineRequest, RequestStream]]:
        """Hand over the requests that have not begun; this engine forgets them."""
        taken = [self._forget(seq.request.request_id) for seq in self._scheduler.take_waiting()]
        return [(response.seq.request, response.stream) for response in taken]

    def adopt(self, request: EngineRequest, stream: RequestStream) -> None:
        """Take over a request that waited elsewhere; it keeps its stream, age and deadline.

        Never raises: what this engine cannot serve ends with an error in its stream. The limit
        of the queue is not applied, since the request was accepted once.
        """
        if stream.is_closed:
            return
        try:
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
        response = self._responses.get(request_id)
        if response is None:
            return
        self._end(response, FinishReason.ABORT)

    def reconfigure(self, limits: LiveLimits) -> None:
        """Change limits between two steps. Raises ValueError and keeps the old ones."""
        self._scheduler.reconfigure(limits)
        self._wake.set()

    def snapshot(self) -> EngineSnapshot:
        return EngineSnapshot(
            num_running=self._scheduler.num_running,
            num_waiting=self._scheduler.num_waiting,
            num_slots=self._info.num_slots,
            num_free_slots=self._scheduler.cache.num_available,
            cache=self._scheduler.cache.stats,
            is_accepting=self._is_accepting and self._death is None,
            is_dead=self._death is not None,
            seconds_since_commit=self._pipeline.seconds_since_result,
        )

    async def drain(self, timeout_s: float) -> bool:
        """Refuse new requests, finish the accepted ones; abort what is left. True if none was."""
        self._is_accepting = False
        try:
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
        except TimeoutError:
            self._abort_all()
            return False
        return True

    async def close(self) -> None:
        """Abort what runs, stop the device thread. Safe to call twice, and if it is cancelled."""
        self._is_accepting = False
        if self._closing is None:
            self._closing = asyncio.create_task(self._shut_down())
        await asyncio.shield(self._closing)

    def _check_acceptable(self, request: EngineRequest) -> None:
        if self._death is not None:
            raise EngineDead(f"{self._info.model_name} is out of service: {self._death}")
        if not self._is_accepting:
            raise Draining(f"{self._info.model_name} is shutting down and takes nothing new")
        limits = self._scheduler.limits
        check_request(
            request, vocab_size=self._info.vocab_size, max_context_len=limits.max_context_len
        )
        if request.request_id in self._responses:
            raise InvalidRequest(
                f"request_id = {request.request_id!r} is in use by a request not yet finished",
                "request_id",
            )

    def _enqueue(self, request: EngineRequest, stream: RequestStream) -> None:
        assert self._task is not None, "start the engine before it is given requests"
        max_tokens = request.sampling.max_tokens
        context_len = self._scheduler.limits.max_context_len
        if context_len > 0:
            max_tokens = min(max_tokens, context_len - len(request.prompt_ids))
        seq = Sequence(next(self._seq_ids), request, max_tokens)
        self._responses[request.request_id] = Response(seq, stream, self._tokenizer)
        self._scheduler.add(seq)
        if request.timeout_s is not None:
            left_s = stream.submitted_s + request.timeout_s - perf_counter()
            loop = asyncio.get_running_loop()
            self._timers[request.request_id] = loop.call_later(
                left_s, self.abort, request.request_id
            )
        self._idle.clear()
        self._wake.set()

    async def _run(self) -> None:
        try:
            while self._death is None:
                await self._wake.wait()
                self._wake.clear()
                self._commit_results()
                self._plan_ahead()
                if not self._responses and self._pipeline.is_empty:
                    self._scheduler.check()
        except Exception as error:
            logger.exception("the loop of %s failed", self._info.model_name)
            self._die(f"{type(error).__name__}: {error}")

    def _plan_ahead(self) -> None:
        while self._death is None and self._pipeline.has_room:
            plan = self._scheduler.plan()
            if plan is None:
                return
            self._pipeline.submit(plan)

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
            response = self._responses[progress.seq.request.request_id]
            if progress.token_id is not None:
                gap_s = response.add_token(progress.token_id, now_s)
                if gap_s is not None:
                    gaps_s.append(gap_s)
            if response.has_matched_stop:
                self._end(response, FinishReason.STOP)
            elif progress.seq.is_finished:
                self._settle(response)
        if self._stats is not None:
            self._stats.on_step(step_stats(plan, result, gaps_s))

    def _end(self, response: Response, reason: FinishReason, error: str | None = None) -> None:
        """Finish a request, whatever its sequence is doing."""
        try:
            if not response.seq.is_finished:
                self._scheduler.finish(response.seq, reason, error)
        finally:  # even with broken books the reader must be told
            self._settle(response)

    def _settle(self, response: Response) -> None:
        """A sequence has finished: tell its reader and the statistics."""
        now_s = perf_counter()
        self._forget(response.request_id)
        self._rate.count_end(now_s)
        stats = response.finish(now_s)
        if self._stats is not None:
            self._stats.on_request(stats)
        self._wake.set()  # its slot may let somebody in

    def _forget(self, request_id: str) -> Response:
        timer = self._timers.pop(request_id, None)
        if timer is not None:
            timer.cancel()
        response = self._responses.pop(request_id)
        if not self._responses:
            self._idle.set()
        return response

    def _die(self, error: str) -> None:
        """The device, or this engine, cannot go on: fail everybody, accept nobody."""
        self._death = error
        self._pipeline.forget()
        for response in list(self._responses.values()):
            try:
                self._end(response, FinishReason.ERROR, f"the engine died: {error}")
            except Exception:
                logger.exception("%s could not be ended in order", response.request_id)

    def _abort_all(self) -> None:
        for request_id in list(self._responses):
            self.abort(request_id)

    async def _shut_down(self) -> None:
        self._abort_all()
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
        if not await self._pipeline.close(CLOSE_TIMEOUT_S):
            logger.error(
                "the device thread of %s did not stop in %.0f s and is left behind",
                self._info.model_name,
                CLOSE_TIMEOUT_S,
            )


def step_stats(plan: StepPlan, result: StepResult, gaps_s: list[float]) -> StepStats:
    prefill = [row.num_tokens for row in plan.rows if row.tokens is not None]
    return StepStats(
        duration_s=result.duration_s,
        num_decode_rows=len(plan.rows) - len(prefill),
        num_prefill_rows=len(prefill),
        num_prefill_tokens=sum(prefill),
        inter_token_s=tuple(gaps_s),
    )
