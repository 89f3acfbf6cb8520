"""Watches the configuration's folders and calls back when something may have changed.

Folders, not files: editors and ConfigMaps replace files, and a watch on a file dies with it.
The callback also comes every second, for file systems that report nothing.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from pathlib import Path

from watchfiles import awatch

logger = logging.getLogger(__name__)

POLL_S = 1.0
STEP_MS = 50


async def watch_folders(
    folders_now: Callable[[], set[Path]], on_change: Callable[[], Awaitable[None]]
) -> None:
    """Runs until it is cancelled. `folders_now` is asked again after each call, in a thread."""
    while True:
        try:
            folders = await asyncio.to_thread(folders_now)
            await _watch(folders, folders_now, on_change)
        except OSError as error:
            logger.warning("cannot watch the configuration, checking every %g s: %s", POLL_S, error)
            await asyncio.sleep(POLL_S)
            await on_change()


async def _watch(
    folders: set[Path],
    folders_now: Callable[[], set[Path]],
    on_change: Callable[[], Awaitable[None]],
) -> None:
    """Watch these folders until others are to be watched."""
    changes = awatch(
        *folders,
        watch_filter=None,
        recursive=False,
        step=STEP_MS,
        rust_timeout=int(1000 * POLL_S),
        yield_on_timeout=True,
    )
    async with aclosing(changes):
        async for _ in changes:
            await on_change()
            if await asyncio.to_thread(folders_now) != folders:
                return
