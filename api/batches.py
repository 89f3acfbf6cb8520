"""A list of prompts as one HTTP request: they are computed a few at a time, all or none.

Knows engines through EngineClient only.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from typing import Self

from blacksheep import Request

from api.answers import COMPLETE
from api.errors import from_engine
from api.generation import failure_of
from api.lifetime import lifetime_of
from api.registry import Replica
from api.service import Service
from engine.batch import Batch
from engine.client import RequestStream, merge
from engine.errors import EngineError
from engine.types import EngineRequest, OutputDelta


class PromptBatch:
    """A context manager: what has not ended when it is left is aborted.

    As many requests are under way as can run at once, so that those of others come in between.
    """

    def __init__(self, service: Service, http_request: Request, replica: Replica) -> None:
        """Accepted, or ApiError."""
        self._service = service
        self._lifetime = lifetime_of(http_request)
        self._max_num_open = replica.table.max_batch_size
        try:
            self._batch = replica.client.open_batch()
        except EngineError as error:
            raise from_engine(error) from None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._batch.close()

    async def compute(
        self, requests: Sequence[EngineRequest], fields: Sequence[str]
    ) -> list[OutputDelta]:
        """The whole answer to each request, in their order. `fields` are what errors about each
        prompt name. Raises ApiError. May be called again."""
        work = _Work(self._batch, requests, fields, self._max_num_open)
        running = self._service.running.enter(self._lifetime, work.abort)
        failed = await work.run()
        if failed is not None:
            running.check()
            raise failure_of(self._service, failed)
        return work.answers


class _Work:
    def __init__(
        self,
        batch: Batch,
        requests: Sequence[EngineRequest],
        fields: Sequence[str],
        max_num_open: int,
    ) -> None:
        self._batch = batch
        self._max_num_open = max_num_open
        self._waiting = deque(zip(range(len(requests)), requests, fields, strict=True))
        self._open: dict[int, RequestStream] = {}
        self._found: dict[int, OutputDelta] = {}
        self._wake = asyncio.Event()

    @property
    def answers(self) -> list[OutputDelta]:
        return [self._found[number] for number in sorted(self._found)]

    async def run(self) -> OutputDelta | None:
        """Until all have ended, or one has failed, which is returned."""
        while self._waiting or self._open:
            while self._waiting and len(self._open) < self._max_num_open:
                self._submit()
            await self._wake.wait()
            self._wake.clear()
            failed = self._take()
            if failed is not None:
                return failed
        return None

    def abort(self) -> None:
        for stream in list(self._open.values()):
            stream.abort()

    def _submit(self) -> None:
        number, request, field = self._waiting.popleft()
        try:
            stream = self._batch.submit(request)
        except EngineError as error:
            raise from_engine(error, field) from None
        stream.wake_with(self._wake.set)
        self._open[number] = stream

    def _take(self) -> OutputDelta | None:
        for number, stream in list(self._open.items()):
            delta = stream.poll()
            if delta is None:
                continue
            before = self._found.get(number)
            self._found[number] = delta if before is None else merge(before, delta)
            if delta.finish_reason is None:
                continue
            if delta.finish_reason not in COMPLETE:
                return delta
            del self._open[number]
        return None
