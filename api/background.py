"""BackgroundResponses: responses that are computed while nobody waits for them.

Knows that they run and how to end them; what they do, and where they are stored, is their work's.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from dataclasses import dataclass

from api.answers import Answers
from api.response_encode import ResponseEncoder


@dataclass(slots=True)
class BackgroundResponse:
    """`encoder.response` is the object as it is now, `items` its input as JSON."""

    owner: str
    answers: Answers
    encoder: ResponseEncoder
    items: bytes
    is_cancelled: bool = False


class BackgroundResponses:
    """Those that run, by id; who has ended is found in the store."""

    def __init__(self) -> None:
        self._running: dict[str, tuple[BackgroundResponse, asyncio.Task[None]]] = {}

    def begin(self, run: BackgroundResponse, work: Coroutine[None, None, None]) -> None:
        """Do the `work`, which stores the response when its answers have ended."""
        response_id = run.answers.request_id
        task = asyncio.create_task(work, name=response_id)
        self._running[response_id] = (run, task)
        task.add_done_callback(lambda _: self._running.pop(response_id))

    def get(self, owner: str, response_id: str) -> BackgroundResponse | None:
        """None for one that does not run, or another owner's."""
        run, _ = self._running.get(response_id, (None, None))
        return None if run is None or run.owner != owner else run

    async def cancel(self, owner: str, response_id: str) -> None:
        """End it where it runs; afterwards it is in the store."""
        run, task = self._running.get(response_id, (None, None))
        if run is None or task is None or run.owner != owner:
            return
        run.is_cancelled = True
        run.answers.close()
        await asyncio.wait([task])

    async def close(self) -> None:
        """Wait until all have had their last word, once the engines have ended their answers."""
        if self._running:
            await asyncio.wait([task for _, task in self._running.values()])
