"""Server-sent events: Answers as the byte pieces of a text/event-stream body.

One piece per step of the engine, or whatever came while the reader was slow; a comment after each
silence of `keep_alive_s`. Knows no route; the encoder says what the events hold.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Protocol

from api.answers import Answers
from api.encode import Encoder, Usage
from api.errors import ApiError
from engine.types import OutputDelta

logger = logging.getLogger(__name__)

KEEP_ALIVE = b": keep-alive\n\n"
DONE = b"data: [DONE]\n\n"


def data_event(item: bytes) -> bytes:
    """One JSON object as an event without a name."""
    return b"data: %b\n\n" % item


@dataclass(frozen=True, slots=True, kw_only=True)
class Framing:
    """What is around the objects of an encoder. All of it is pieces of the body."""

    event: Callable[[bytes], bytes] = data_event
    error: Callable[[ApiError], bytes] = lambda error: data_event(error.body())
    keep_alive: bytes = KEEP_ALIVE
    end: bytes = DONE


OPENAI = Framing()


def named_events(error: Callable[[ApiError], bytes], keep_alive: bytes = KEEP_ALIVE) -> Framing:
    """For an encoder that frames its events itself, since each has a name; nothing ends them."""
    return Framing(event=bytes, error=error, keep_alive=keep_alive, end=b"")


class Writer(Protocol):
    """What writes pieces at once, so that no task has to wake up for them."""

    def write(self, piece: bytes) -> bool:
        """False if it could not: then the piece is to be sent like the first one."""
        ...


class EventBody:
    """Read `pieces` to the end, or `close` it.

    They are never empty: BlackSheep takes an empty one for the end of the body. Where there is a
    `writer`, only the pieces that it does not take are found there, and the last one.

    `on_finish` is called when all answers are complete, before the client can know. The status
    line is long out, so the failure of one answer becomes an error event at the end, and ends the
    others.
    """

    def __init__(
        self,
        answers: Answers,
        encoder: Encoder,
        failure_of: Callable[[OutputDelta], ApiError],
        on_finish: Callable[[], Usage],
        keep_alive_s: float,
        framing: Framing = OPENAI,
        writer: Writer | None = None,
    ) -> None:
        self._answers, self._encoder = answers, encoder
        self._failure_of, self._on_finish = failure_of, on_finish
        self._keep_alive_s, self._framing, self._writer = keep_alive_s, framing, writer
        self._loop = asyncio.get_running_loop()
        self._is_over = False  # the last piece was made, or nobody reads on
        self._is_due = False  # there is news, and `_deliver` will be called
        self._next: asyncio.Future[bytes] | None = None  # what `pieces` waits for
        self._spoke_s = self._loop.time()
        self._alarm: asyncio.TimerHandle | None = None
        answers.wake_with(self._on_news)

    async def pieces(self) -> AsyncIterator[bytes]:
        self._listen(self._keep_alive_s)
        try:
            if first := self._encoder.first():
                yield self._events(first)
            while not self._is_over:
                yield self._take() or await self._wait()
        finally:
            self.close()

    def close(self) -> None:
        """Say nothing any more."""
        self._is_over = True
        if self._alarm is not None:
            self._alarm.cancel()

    async def _wait(self) -> bytes:
        self._spoke_s = self._loop.time()
        self._next = self._loop.create_future()
        try:
            return await self._next
        finally:
            self._next = None

    def _on_news(self) -> None:
        """Called by the engine, which has the next step to plan before anybody is told."""
        if not self._is_due and self._is_waiting:
            self._is_due = True
            self._loop.call_soon(self._deliver)

    def _deliver(self) -> None:
        self._is_due = False
        if self._is_waiting and (piece := self._take()):
            self._give(piece)

    def _give(self, piece: bytes) -> None:
        assert self._next is not None, "nobody waits for a piece"
        if self._is_over or self._writer is None or not self._writer.write(piece):
            self._next.set_result(piece)
        else:
            self._spoke_s = self._loop.time()

    @property
    def _is_waiting(self) -> bool:
        """What comes can be given at once; else `pieces` looks for it, once it is read on."""
        return self._next is not None and not self._next.done()

    def _listen(self, timeout_s: float) -> None:
        """One alarm for all pieces, set again when it goes off too early."""
        self._alarm = self._loop.call_later(timeout_s, self._on_alarm)

    def _on_alarm(self) -> None:
        if self._is_over:
            return
        left_s = self._spoke_s + self._keep_alive_s - self._loop.time()
        if left_s <= 0 and self._is_waiting:
            self._give(self._framing.keep_alive)
        self._listen(left_s if left_s > 0 else self._keep_alive_s)

    def _take(self) -> bytes:
        """All that has come, as one piece; b"" if nothing is to be said."""
        try:
            return self._encode()
        except Exception:
            logger.exception("the stream of %s failed", self._answers.request_id)
            error = ApiError(500, "internal error", code="internal_error")
            return self._failure([], error)

    def _encode(self) -> bytes:
        answers, encoder = self._answers, self._encoder
        objects: list[bytes] = []
        for index, delta in answers.poll():
            objects += encoder.piece(index, delta)
            if delta.finish_reason is None:
                continue
            if not answers.is_good(delta.finish_reason):
                return self._failure(objects, self._failure_of(delta))
            objects += encoder.last(index, delta)
        if not answers.is_finished:
            return self._events(objects)
        end = encoder.end(self._on_finish())
        self._is_over = True
        return self._events([*objects, *end]) + self._framing.end

    def _failure(self, objects: list[bytes], error: ApiError) -> bytes:
        self._is_over = True
        self._answers.close()
        return self._events(objects) + self._framing.error(error) + self._framing.end

    def _events(self, objects: list[bytes]) -> bytes:
        return b"".join(map(self._framing.event, objects))
