"""DiskLink: jobs on their way to the disk's worker, and the way back for results.

The border between the event loop and that worker, as engine/pipeline.py is to the device. Without
a disk it takes nothing and is never busy.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Iterable

from engine.state.page import Disk, DiskJob, DiskResult
from engine.stopping import stop_in_thread

logger = logging.getLogger(__name__)


class DiskLink:
    """Everything but `_receive` is called on the event loop."""

    def __init__(self, disk: Disk | None, on_result: Callable[[], None]) -> None:
        self.disk = disk
        self._on_result = on_result
        self._results: deque[DiskResult] = deque()
        self._num_under_way = 0
        self._loop: asyncio.AbstractEventLoop | None = None

    @property
    def is_busy(self) -> bool:
        return self._num_under_way > 0

    def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        if self.disk is not None:
            self.disk.start(self._receive)

    def submit(self, jobs: Iterable[DiskJob]) -> None:
        for job in jobs:
            assert self.disk is not None, f"{type(job).__name__} without a disk"
            self._num_under_way += 1
            self.disk.submit(job)

    def take(self) -> DiskResult | None:
        """The oldest result, or None when none has come."""
        return self._results.popleft() if self._results else None

    async def close(self, timeout_s: float) -> bool:
        """Let the worker finish and stop; False if it did not in time and was left behind."""
        if self.disk is None or self._loop is None:
            return True
        return await stop_in_thread(self.disk.close, "disk close", timeout_s)

    def _receive(self, result: DiskResult) -> None:
        """Called by the worker, from its thread."""
        assert self._loop is not None, "a result before the start"
        try:
            self._loop.call_soon_threadsafe(self._arrive, result)
        except RuntimeError:
            logger.warning("a result of the disk came after the event loop")

    def _arrive(self, result: DiskResult) -> None:
        self._num_under_way -= 1
        self._results.append(result)
        self._on_result()
