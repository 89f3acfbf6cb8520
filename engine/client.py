"""What the outside sees of a running engine: submit, read, abort, drain. Plain data only.

`EngineClient` is the seam: today the engine lives in this process, later it may live in one
process per device behind the same five verbs.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from time import perf_counter
from typing import Protocol

from engine.tokenizer import Tokenizer
from engine.types import EngineRequest, EngineSnapshot, LiveLimits, ModelInfo, OutputDelta


class EngineClient(Protocol):
    @property
    def info(self) -> ModelInfo: ...

    @property
    def tokenizer(self) -> Tokenizer: ...

    def submit(self, request: EngineRequest) -> RequestStream:
        """Queue a request. Raises InvalidRequest, Overloaded, Draining or EngineDead at once."""
        ...

    def abort(self, request_id: str) -> None:
        """End a request now; its slot is free when this returns. Unknown ids are ignored."""
        ...

    def reconfigure(self, limits: LiveLimits) -> None:
        """Change limits between two steps."""
        ...

    def snapshot(self) -> EngineSnapshot: ...

    def start(self) -> None:
        """Begin to serve, on the running event loop."""
        ...

    def take_waiting(self) -> list[tuple[EngineRequest, RequestStream]]:
        """Give up every request that has not begun to run, for another replica to adopt."""
        ...

    def adopt(self, request: EngineRequest, stream: RequestStream) -> None:
        """Queue a request taken from another replica; its reader notices nothing."""
        ...

    async def drain(self, timeout_s: float) -> bool:
        """Refuse new requests, let running ones finish; abort what is left. True if none was."""
        ...

    async def close(self) -> None:
        """Stop the device thread and give all memory back. Running requests are aborted."""
        ...


class RequestStream(AsyncIterator[OutputDelta]):
    """The mailbox of one request: the engine puts, one reader takes everything at once.

    A slow reader finds one merged delta, so memory is bounded by `max_tokens` and the engine
    never waits. Close it (or read it to the end) so that the request cannot outlive its reader.
    """

    def __init__(self, request_id: str, abort: Callable[[str], None]) -> None:
        self.request_id = request_id
        self.submitted_s = perf_counter()
        self._abort = abort
        self._pending: OutputDelta | None = None
        self._is_finished = False  # the last delta was put
        self._is_read = False  # the last delta was taken
        self._wake = asyncio.Event()

    @property
    def is_closed(self) -> bool:
        """The reader has taken everything or gone away."""
        return self._is_read

    def rebind(self, abort: Callable[[str], None]) -> None:
        """Called by the engine that adopts the request: closing the stream now ends it there."""
        self._abort = abort

    def put(self, delta: OutputDelta) -> None:
        """Called by the engine, on the loop."""
        assert not self._is_finished, f"delta after the last one of {self.request_id}"
        self._pending = delta if self._pending is None else merge(self._pending, delta)
        self._is_finished = delta.finish_reason is not None
        self._wake.set()

    async def __anext__(self) -> OutputDelta:
        if self._is_read:
            raise StopAsyncIteration
        while self._pending is None:
            self._wake.clear()
            await self._wake.wait()
        delta, self._pending = self._pending, None
        self._is_read = delta.finish_reason is not None
        return delta

    async def take(self, timeout_s: float) -> OutputDelta | None:
        """Like `anext`, but None when nothing came for `timeout_s`. Not to be called at the end.

        For readers with something to say in silence; cheaper per token than `asyncio.timeout`.
        """
        assert not self._is_read, f"read past the last delta of {self.request_id}"
        if self._pending is None:
            self._wake.clear()
            alarm = asyncio.get_running_loop().call_later(timeout_s, self._wake.set)
            try:
                await self._wake.wait()
            finally:
                alarm.cancel()
        return None if self._pending is None else await anext(self)

    def close(self) -> None:
        """Abort the request unless it has ended. Synchronous, so it works in any `finally`."""
        if not self._is_finished:
            self._abort(self.request_id)
        self._is_read = True

    async def collect(self) -> OutputDelta:
        """The whole answer as one delta, for callers that do not stream."""
        whole: OutputDelta | None = None
        try:
            async for delta in self:
                whole = delta if whole is None else merge(whole, delta)
        finally:
            self.close()
        assert whole is not None, "a request always ends with a delta"
        return whole


def merge(first: OutputDelta, second: OutputDelta) -> OutputDelta:
    """Both deltas as one; the counters and the ending are the later one's."""
    return replace(
        second, text=first.text + second.text, token_ids=first.token_ids + second.token_ids
    )
