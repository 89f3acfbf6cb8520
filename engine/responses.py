"""Responses: everybody who is being answered, and what becomes of their answers.

Knows what a token or an end means to a reader; when either comes is decided by the scheduler.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from itertools import count
from time import perf_counter

from engine.admission import ServiceRate
from engine.client import RequestStream
from engine.response import Response
from engine.scheduler import Progress, Scheduler
from engine.sequence import Sequence
from engine.state.store import StateStore
from engine.tokenizer import Tokenizer
from engine.types import FinishReason, StatsSink


class Responses:
    """By request id. A request whose `timeout_s` is over ends with TIMEOUT."""

    def __init__(
        self,
        scheduler: Scheduler,
        store: StateStore,
        tokenizer: Tokenizer,
        stats: StatsSink | None,
        wake: Callable[[], None],
    ) -> None:
        """`wake` makes the engine plan."""
        self.rate = ServiceRate()
        self._scheduler = scheduler
        self._store = store
        self._tokenizer = tokenizer
        self._stats = stats
        self._wake = wake
        self._seq_ids = count()
        self._responses: dict[str, Response] = {}
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._num_open_batches = 0
        self._empty = asyncio.Event()
        self._empty.set()

    def next_seq_id(self) -> int:
        return next(self._seq_ids)

    @property
    def num_promised_states(self) -> int:
        """States that were asked for and are not filed yet."""
        return sum(one.seq.request.keep_state is not None for one in self)

    def __iter__(self) -> Iterator[Response]:
        return iter(self._responses.values())

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._responses

    def __getitem__(self, request_id: str) -> Response:
        return self._responses[request_id]

    def __len__(self) -> int:
        return len(self._responses)

    def begin(self, seq: Sequence, stream: RequestStream) -> Response:
        """Queue a sequence, new or resumed, and answer it in `stream`."""
        response = Response(seq, stream, self._tokenizer)
        if seq.request.keep_state is not None and seq.base is not None:
            response.base = seq.base
            self._scheduler.cache.tiers.hold(seq.base)
        self._add(response)
        self._scheduler.add(seq)
        self._wake()
        return response

    def abort(self, request_id: str) -> None:
        """End a request now; its slot is free when this returns. Unknown ids are ignored."""
        self._end_if_there(request_id, FinishReason.ABORT)

    def abort_all(self) -> None:
        for request_id in list(self._responses):
            self.abort(request_id)

    def remove(self, request_id: str) -> Response:
        timer = self._timers.pop(request_id, None)
        if timer is not None:
            timer.cancel()
        response = self._responses.pop(request_id)
        self._note_empty()
        return response

    def hold_open(self) -> None:
        """More requests are to come that belong to those accepted: nothing is over before."""
        self._num_open_batches += 1
        self._empty.clear()

    def let_end(self) -> None:
        self._num_open_batches -= 1
        self._note_empty()

    async def wait_until_empty(self) -> None:
        await self._empty.wait()

    def progress(self, progress: Progress, now_s: float) -> float | None:
        """Hand one token, or an end, to its reader. Returns the seconds since the token before."""
        response = self[progress.seq.request.request_id]
        gap_s = None
        if progress.token_id is not None:
            gap_s = response.add_token(progress.token_id, now_s)
        if response.has_matched_stop and not response.seq.is_finished:
            self._scheduler.finish(response.seq, FinishReason.STOP)
        if progress.seq.is_finished:
            self._seal_or_settle(response)
        return gap_s

    def _seal_or_settle(self, response: Response) -> None:
        """The answer has ended; so has the request, unless its state is to be kept."""
        seq, seal, options = response.seq, response.seal, response.seq.request.keep_state
        has_answered = seq.finish_reason in (FinishReason.STOP, FinishReason.LENGTH)
        if options is None or not has_answered:
            self.settle(response)
            return
        kept = seq.kept if seal is None else seal.kept
        if kept is not None:
            state = self._store.put(seq.request.owner, kept, options, seq.request.state_id)
            response.state = self._store.info(state)
            self.settle(response)
        elif seal is None:
            self._seal(response)
        else:
            self.settle(response, f"the state could not be kept: {seal.error}")

    def _seal(self, response: Response) -> None:
        """Compute the state after the last emitted token. Snapshots make that a short way."""
        if response.base is not None:
            self._scheduler.cache.tiers.hold(response.base)
        request = response.seal_request(self._tokenizer)
        response.seal = Sequence(self.next_seq_id(), request, 0, response.base)
        self._scheduler.add(response.seal)
        self._wake()

    def end(self, response: Response, reason: FinishReason, error: str | None = None) -> None:
        """Finish a request, whatever its sequences are doing."""
        try:
            for seq in (response.seq, response.seal):
                if seq is not None and not seq.is_finished:
                    self._scheduler.finish(seq, reason, error)
            if response.seal is not None:
                response.seq.finish_reason = reason  # it did not get all that it asked for
        finally:  # even with broken books the reader must be told
            self.settle(response, error)

    def settle(
        self, response: Response, error: str | None = None, resume_id: str | None = None
    ) -> None:
        """A request has ended: tell its reader and the statistics."""
        now_s = perf_counter()
        self.remove(response.request_id)
        self.let_base_go(response)
        self.rate.count_end(now_s)
        stats = response.finish(now_s, error, resume_id)
        if self._stats is not None:
            self._stats.on_request(stats)
        self._wake()  # its slot may let somebody in

    def let_base_go(self, response: Response) -> None:
        if response.base is not None:
            self._scheduler.cache.let_go(response.base)
            response.base = None

    def _note_empty(self) -> None:
        if not self._responses and not self._num_open_batches:
            self._empty.set()

    def _add(self, response: Response) -> None:
        """The deadline counts from when the request was submitted, wherever that was."""
        request_id, timeout_s = response.request_id, response.seq.request.timeout_s
        self._responses[request_id] = response
        if timeout_s is not None:
            left_s = response.stream.submitted_s + timeout_s - perf_counter()
            loop = asyncio.get_running_loop()
            self._timers[request_id] = loop.call_later(
                left_s, self._end_if_there, request_id, FinishReason.TIMEOUT
            )
        self._empty.clear()

    def _end_if_there(self, request_id: str, reason: FinishReason) -> None:
        response = self._responses.get(request_id)
        if response is not None:
            self.end(response, reason)
