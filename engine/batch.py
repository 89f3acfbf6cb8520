"""Batch: requests that were accepted together and are submitted a few at a time.

A long list of texts must not fill the queue that everybody waits in. Whoever opened a batch was
accepted: neither a full queue nor a drain refuses the rest of it, and a drain waits for its end.
Knows no scheduler.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Self

from engine.client import RequestStream
from engine.types import EngineRequest


class Batch:
    """A context manager; at its end what was submitted and has not ended is aborted."""

    def __init__(
        self, submit: Callable[[EngineRequest], RequestStream], on_close: Callable[[], None]
    ) -> None:
        self._submit = submit
        self._on_close = on_close
        self._streams: list[RequestStream] = []

    def submit(self, request: EngineRequest) -> RequestStream:
        """Queue one of them; all are computed by this engine, also if it is replaced meanwhile.

        Raises InvalidRequest or EngineDead at once.
        """
        stream = self._submit(replace(request, is_bound=True))
        self._streams.append(stream)
        return stream

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Abort what was submitted and has not ended."""
        for stream in self._streams:
            stream.close()
        self._on_close()
