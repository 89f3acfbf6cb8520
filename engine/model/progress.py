"""Progress of long work: a bar where somebody watches, one line of the log at its end anywhere."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import monotonic

logger = logging.getLogger(__name__)


@contextmanager
def shown(what: str, outcome: str, total: int) -> Iterator[Callable[[int], None]]:
    """Give what is to hear of every part of `total` that is done, from one thread at a time.

    The bar is on stderr, if that is a terminal, and goes away; nothing is written to stdout. The
    log then says `what`, `outcome` and the seconds, unless the work failed.
    """
    start = monotonic()
    if sys.stderr.isatty():
        with _bar(what, total) as advance:
            yield advance
    else:
        yield lambda _: None
    logger.info("%s: %s in %.1f s", what, outcome, monotonic() - start)


@contextmanager
def _bar(what: str, total: int) -> Iterator[Callable[[int], None]]:
    from rich.console import Console  # 0.1 s that nobody needs to wait for without a terminal
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
    console = Console(stderr=True)
    with Progress(*columns, TransferSpeedColumn(), console=console, transient=True) as progress:
        task = progress.add_task(what, total=total)
        yield lambda count: progress.advance(task, count)
