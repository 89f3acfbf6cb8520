"""What the outside sees of a running engine: submit, read, abort, drain. Plain data only.

`EngineClient` is the seam: today the engine lives in this process, later it may live in one
process per device behind the same verbs.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING, Protocol

from msgspec.structs import replace

from engine.tokenizer import Tokenizer
from engine.types import (
    EngineRequest,
    EngineSnapshot,
    LiveLimits,
    ModelInfo,
    OutputDelta,
    StateInfo,
    StateOptions,
)

if TYPE_CHECKING:
    from engine.batch import Batch


class States(Protocol):
    """The states that users hold, each under an unguessable id and its owner.

    Every verb that takes an id raises StateNotFound where it is unknown, expired or another
    owner's; which of these is not told.
    """

    def list(self, owner: str) -> list[StateInfo]:
        """Newest first."""
        ...

    def get(self, owner: str, state_id: str) -> StateInfo: ...

    def fork(self, owner: str, state_id: str, options: StateOptions) -> StateInfo:
        """A second id for the same state; nothing is copied. Raises StatesFull."""
        ...

    def update(
        self,
        owner: str,
        state_id: str,
        *,
        label: str | None = None,
        is_pinned: bool | None = None,
        ttl_s: float | None = None,
    ) -> StateInfo:
        """Change what is given; `ttl_s` counts from now, math.inf = until it is deleted."""
        ...

    def delete(self, owner: str, state_id: str) -> None:
        """Running requests that began from it go on."""
        ...

    async def export_file(self, owner: str, state_id: str) -> bytes:
        """The state as a safetensors file (docs/states.md says what is in it)."""
        ...

    async def import_file(self, owner: str, data: bytes, options: StateOptions) -> StateInfo:
        """Raises StateMismatch for another model or layout, or a broken file; StatesFull."""
        ...


class EngineClient(Protocol):
    @property
    def info(self) -> ModelInfo: ...

    @property
    def states(self) -> States: ...

    @property
    def tokenizer(self) -> Tokenizer: ...

    async def prepare(self, grammar: str) -> None:
        """Compile in a thread what a request is to name as `sampling.grammar`.

        `submit` does it on the event loop otherwise. Raises InvalidRequest that says what is wrong.
        """
        ...

    def submit(self, request: EngineRequest) -> RequestStream:
        """Queue a request. Raises InvalidRequest, Overloaded, Draining or EngineDead at once."""
        ...

    def open_batch(self) -> Batch:
        """Accept requests that come a few at a time. Raises Overloaded, Draining or EngineDead."""
        ...

    def resume(self, resume_id: str, owner: str, request_id: str) -> RequestStream:
        """Go on with a generation that a graceful stop has suspended; its text goes on too.

        Raises StateNotFound and whatever `submit` raises. Works once: an id that was resumed is
        used up, unless the engine is stopped again before the end.
        """
        ...

    def rescan(self) -> None:
        """Look for files that another replica has left since the start. Returns at once."""
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

    async def drain(self, timeout_s: float, *, suspends: bool = False) -> bool:
        """Refuse new requests, let running ones finish; abort what is left. True if none was.

        With `suspends`, resumable requests go to the disk at once, where there is one.
        """
        ...

    async def close(self) -> None:
        """Stop the device thread and give all memory back. Running requests are aborted.

        Where there is a disk, snapshots worth keeping are written first.
        """
        ...


@dataclass(frozen=True, slots=True)
class Resumed:
    """What a resumed request was before: its memo, and the text that was delivered."""

    memo: str
    text: str


class RequestStream(AsyncIterator[OutputDelta]):
    """The mailbox of one request: the engine puts, one reader takes everything at once.

    A slow reader finds one merged delta, so memory is bounded by `max_tokens` and the engine
    never waits. Close it (or read it to the end) so that the request cannot outlive its reader.
    """

    def __init__(self, request_id: str, abort: Callable[[str], None]) -> None:
        self.request_id = request_id
        self.submitted_s = perf_counter()
        self.resumed: Resumed | None = None
        self._abort = abort
        self._pending: OutputDelta | None = None
        self._is_finished = False  # the last delta was put
        self._is_read = False  # the last delta was taken
        self._news = asyncio.Event()
        self._wake: Callable[[], None] = self._news.set

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
        self._wake()

    async def __anext__(self) -> OutputDelta:
        if self._is_read:
            raise StopAsyncIteration
        while (delta := self.poll()) is None:
            self._news.clear()
            await self._news.wait()
        return delta

    def wake_with(self, wake: Callable[[], None]) -> None:
        """From now on call `wake` when something comes: for who reads with `poll`."""
        self._wake = wake

    def poll(self) -> OutputDelta | None:
        """What has come, without waiting."""
        delta, self._pending = self._pending, None
        if delta is not None:
            self._is_read = delta.finish_reason is not None
        return delta

    def abort(self) -> None:
        """End the request now; its reader finds what there is, and FinishReason.ABORT."""
        if not self._is_finished:
            self._abort(self.request_id)

    def close(self) -> None:
        """Abort the request unless it has ended. Synchronous, so it works in any `finally`."""
        self.abort()
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
        second,
        text=first.text + second.text,
        token_ids=first.token_ids + second.token_ids,
        logprobs=first.logprobs + second.logprobs,
        tops=first.tops + second.tops,
        prompt_logprobs=first.prompt_logprobs + second.prompt_logprobs,
        prompt_tops=first.prompt_tops + second.prompt_tops,
    )
