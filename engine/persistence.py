"""Persistence: what an engine brings to disk and takes up from there. On the event loop.

Pages and records become jobs elsewhere; here they are handed to the disk's worker, and results go
back to whoever waits for them.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Mapping

from engine.disk_link import DiskLink
from engine.errors import EngineDead
from engine.keeper import StateKeeper
from engine.scheduler import Scheduler
from engine.sequence import Sequence
from engine.state.cache import StateCache
from engine.state.page import DeleteFile, DeleteRecord, Disk, DiskJob, PageFile
from engine.state.store import StateStore
from engine.suspension import Suspensions

logger = logging.getLogger(__name__)

SAVE_TIMEOUT_S = 10.0  # for states on their way to the disk when the engine is closed


class Persistence:
    """Without a disk everything here does nothing, and nothing is suspended."""

    def __init__(
        self,
        disk: Disk | None,
        cache: StateCache,
        store: StateStore,
        keeper: StateKeeper,
        scheduler: Scheduler,
        wake: Callable[[], None],
    ) -> None:
        """Takes up what lies on the disk, which blocks."""
        self.suspensions = Suspensions(cache)
        self._link = DiskLink(disk, wake)
        self._cache = cache
        self._store = store
        self._keeper = keeper
        self._scheduler = scheduler
        self._wake = wake
        self._rescan: asyncio.Task[None] | None = None
        self._deleted: set[DiskJob] = set()  # what a scan under way may have seen all the same
        self._is_suspending = False
        if disk is not None:
            self._take_up(disk.scan_pages(), disk.scan_records())

    def start(self) -> None:
        self._link.start()

    def begin_suspending(self) -> None:
        """From now on resumable generations are taken off to the disk."""
        has_room = self._cache.tiers.files.max_files > 0
        self._is_suspending = self._link.disk is not None and has_room
        self._wake()

    def suspend(self, seqs: Iterable[Sequence]) -> list[tuple[str, Sequence]]:
        """Those of `seqs` that are resumable go to the disk; ids and sequences of who is there."""
        for seq in seqs if self._is_suspending else ():
            is_due = seq.request.is_resumable and not self.suspensions.has(seq)
            if is_due and not seq.is_finished and self._scheduler.set_aside(seq):
                self.suspensions.begin(seq)
        for seq in self.suspensions.take_lost():
            self._scheduler.add(seq)  # which ends it
        return self.suspensions.settle()

    def finish_jobs(self) -> None:
        """Take in what the worker has done."""
        while (result := self._link.take()) is not None:
            self._cache.tiers.finish_job(result)
            if result.error is not None:
                logger.warning("%s: %s", type(result.job).__name__, result.error)
            self._store.finish_job(result)
            left_behind = self.suspensions.finish_job(result)
            if left_behind is not None:  # a full disk, perhaps: it goes on here and now
                self._is_suspending = False
                self._scheduler.add(left_behind)
            self._deleted -= {result.job} if self._rescan is None else set()
            self._keeper.changed()

    def hand_out_jobs(self) -> None:
        """Give the worker what there is to do."""
        for source in (self._cache.tiers.files, self._store, self.suspensions):
            jobs = source.take_jobs()
            self._deleted.update(job for job in jobs if isinstance(job, DeleteFile | DeleteRecord))
            if self._link.disk is not None:
                self._link.submit(jobs)

    def rescan(self) -> None:
        """Look for files that another replica has left since. Returns at once."""
        if self._link.disk is not None and self._rescan is None:
            self._rescan = asyncio.create_task(self._rescan_disk(self._link.disk))

    async def save(self) -> None:
        """Bring to disk what may be wanted after a restart, as far as that goes in time."""
        if self._link.disk is None:
            return
        self._cache.save_all()
        try:
            async with asyncio.timeout(SAVE_TIMEOUT_S):
                while not self._cache.tiers.is_saved or self._link.is_busy:
                    self._wake()
                    await self._keeper.wait_for_change()
        except TimeoutError:
            logger.warning("not every state could be saved in %.0f s", SAVE_TIMEOUT_S)
        except EngineDead as error:
            logger.warning("not every state could be saved: %s", error)

    async def close(self, timeout_s: float) -> bool:
        """Let the worker finish; False if it did not in time."""
        if self._rescan is not None:
            self._rescan.cancel()
            await asyncio.wait([self._rescan])
        self.hand_out_jobs()
        return await self._link.close(timeout_s)

    def _take_up(self, files: list[PageFile], records: Mapping[str, bytes]) -> None:
        self._cache.adopt_files(files)
        self._store.restore(records)
        self.suspensions.restore(records)
        self._cache.tiers.files.trim()  # not before it is known who holds what

    async def _rescan_disk(self, disk: Disk) -> None:
        try:
            files = await asyncio.to_thread(disk.scan_pages)
            records = await asyncio.to_thread(disk.scan_records)
            self.hand_out_jobs()  # so that everything deleted so far is known
            gone = self._deleted
            self._take_up(
                [file for file in files if DeleteFile(file.digest) not in gone],
                {name: data for name, data in records.items() if DeleteRecord(name) not in gone},
            )
            self._wake()
        except OSError as error:
            logger.warning("the files of other replicas could not be looked for: %s", error)
        finally:
            self._rescan = None
            if not self._link.is_busy:
                self._deleted.clear()
