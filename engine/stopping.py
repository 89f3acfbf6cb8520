"""Ending a thread that may hang, without hanging with it."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable

logger = logging.getLogger(__name__)


async def stop_in_thread(stop: Callable[[], None], name: str, timeout_s: float) -> bool:
    """Run a `stop` that blocks; False if it did not return in time and was left behind.

    In a daemon thread, because what does not stop must not keep the process alive.
    """
    loop = asyncio.get_running_loop()
    stopped = asyncio.Event()

    def run() -> None:
        nonlocal stop
        try:
            stop()
        except Exception:
            logger.exception("%s failed", name)
        # What it belongs to, a model maybe, must not be freed later in this thread: the process
        # may be ending by then, and what is in C++ code at that moment aborts it.
        del stop
        try:
            loop.call_soon_threadsafe(stopped.set)
        except RuntimeError:
            logger.warning("%s ended after the event loop", name)

    threading.Thread(target=run, name=name, daemon=True).start()
    try:
        async with asyncio.timeout(timeout_s):
            await stopped.wait()
    except TimeoutError:
        return False
    return True
