"""Stopping in a thread: nothing of what was stopped is left to that thread."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable

from engine.stopping import stop_in_thread


class Device:
    """Tells when it is freed."""

    def __init__(self, freed: threading.Event) -> None:
        self._freed = freed

    def stop(self) -> None:
        pass

    def __del__(self) -> None:
        self._freed.set()


def stop_of(freed: threading.Event) -> Callable[[], None]:
    return Device(freed).stop


async def test_what_is_stopped_is_freed_before_it_is_told() -> None:
    """Else the process could end in the middle of it, and be aborted by C++."""
    for _ in range(50):
        freed = threading.Event()
        assert await stop_in_thread(stop_of(freed), "device", 5.0)
        assert freed.is_set()


async def test_what_hangs_is_left_behind() -> None:
    hanging = threading.Event()
    assert not await stop_in_thread(hanging.wait, "device", 0.01)
    hanging.set()
    await asyncio.sleep(0)
