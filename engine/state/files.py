"""PageFiles: which pages have a file, and what the disk's worker is to do. Does no I/O itself."""

from __future__ import annotations

from collections.abc import Callable

from engine.plan import SlotRef
from engine.state.order import Slru
from engine.state.page import DeleteFile, DiskJob, Page, PageFile, ReadFile, WriteFile

MAX_WRITES = 8  # files on their way for the cache alone; states that are held come on top
PAUSE_AFTER_ERROR = 100  # pages not written after one that could not be: the disk may be full
MIN_FILE_TOKENS = 256  # fewer are computed as fast as they are read


class PageFiles:
    """At most `max_files`, the least recently used of those that nobody holds going first.

    Jobs name frames, which the caller holds until their result.
    """

    def __init__(
        self,
        max_files: int,
        min_tokens: int,
        on_change: Callable[[Page], None],
        on_loss: Callable[[Page], None],
    ) -> None:
        """`on_change` and `on_loss` hear of pages that have got, or lost, their file."""
        self.max_files = max_files
        self.min_tokens = min_tokens
        self.order = Slru(max_files // 2)
        self.num_written = self.num_read = 0
        self._num_to_skip = 0
        self.is_patient = False  # everything is to be written, however long it takes
        self._on_change = on_change
        self._on_loss = on_loss
        self._writes: dict[bytes, Page] = {}  # under way, by digest
        self._reads: dict[bytes, Page] = {}
        self._jobs: list[DiskJob] = []

    def add(self, page: Page) -> None:
        """The page's file is there, as a scan or the worker says. `trim` keeps the budget."""
        page.has_file = True
        self.order.insert(page)
        self._on_change(page)

    def delete(self, page: Page) -> None:
        self._jobs.append(DeleteFile(page.digest))
        self._lose(page)

    def trim(self) -> None:
        while len(self.order) > self.max_files:
            victim = next((page for page in self.order if page.num_holders == 0), None)
            if victim is None:
                return
            self.delete(victim)

    def wants(self, page: Page) -> bool:
        """The page is worth a file and none is there or on its way."""
        is_there = page.has_file or page.digest in self._writes
        is_urgent = page.num_holders > 0 or self.is_patient
        is_busy = len(self._writes) >= MAX_WRITES or self._num_to_skip > 0
        self._num_to_skip = max(self._num_to_skip - 1, 0)
        is_busy = is_busy and not is_urgent
        return self.max_files > 0 and bool(page.digest) and not is_there and not is_busy

    def write(self, page: Page, frame: SlotRef) -> None:
        self._writes[page.digest] = page
        self._jobs.append(WriteFile(_file_of(page), frame))

    def written(self, job: WriteFile, error: str | None) -> None:
        page = self._writes.pop(job.file.digest)
        if error is not None:
            self._num_to_skip = PAUSE_AFTER_ERROR
            return
        self.num_written += 1
        if page.exists:
            self.add(page)
            self.trim()
        else:  # it was dropped meanwhile
            self._jobs.append(DeleteFile(page.digest))

    def read(self, page: Page, frame: SlotRef) -> None:
        assert page.has_file, "a page without a file is read"
        self._reads[page.digest] = page
        self._jobs.append(ReadFile(_file_of(page), frame))

    def is_reading(self, page: Page) -> bool:
        return page.digest in self._reads

    def was_read(self, job: ReadFile, error: str | None) -> Page | None:
        """The page whose content is in the job's frame now; None if it is not, or not wanted."""
        page = self._reads.pop(job.file.digest)
        if error is not None:
            if page.has_file:
                self._lose(page)
            return None
        self.num_read += 1
        return page if page.exists else None

    @property
    def has_jobs(self) -> bool:
        return bool(self._jobs)

    @property
    def is_busy(self) -> bool:
        """Something is to be done, or being done, whose result is of interest."""
        return bool(self._jobs or self._writes or self._reads)

    def take_jobs(self) -> list[DiskJob]:
        """What the worker is to do, in order."""
        jobs, self._jobs = self._jobs, []
        return jobs

    def _lose(self, page: Page) -> None:
        self.order.remove(page)
        page.has_file = False
        self._on_loss(page)


def _file_of(page: Page) -> PageFile:
    return PageFile(page.digest, page.num_tokens, page.has_logits)
