"""A folder of files in memory, and the worker before it, for pages of the hash model.

A real worker may touch a frame at any time between a job and its result. So a read fills its
frame as soon as it is asked for, and a write looks at its frame as late as it can: whoever uses
the frame in between is found out.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from engine.state.page import (
    DeleteFile,
    DeleteRecord,
    DiskJob,
    DiskResult,
    PageFile,
    ReadFile,
    WriteFile,
    WriteRecord,
)
from tests.hash_model import HashModel, Page


@dataclass(slots=True)
class HashFile:
    file: PageFile
    state: int
    logits: int


@dataclass(slots=True)
class HashFolder:
    """What survives a restart. `broken` are files that cannot be read any more."""

    files: dict[bytes, HashFile] = field(default_factory=dict)
    records: dict[str, bytes] = field(default_factory=dict)
    broken: set[bytes] = field(default_factory=set)


class HashDisk:
    def __init__(self, folder: HashFolder, model: HashModel) -> None:
        self.folder = folder
        self.jobs: deque[DiskJob] = deque()
        self._model = model

    def scan_pages(self) -> list[PageFile]:
        return [file.file for file in self.folder.files.values()]

    def submit(self, jobs: Iterable[DiskJob]) -> None:
        for job in jobs:
            self.jobs.append(job)
            if isinstance(job, ReadFile):
                self._read(job)

    def finish(self, *, fails: bool = False) -> DiskResult:
        """Do the oldest job and report it. One that fails leaves no file and a filled frame."""
        job = self.jobs.popleft()
        match job:
            case WriteFile(file, frame) if not fails:
                page = self._model.frames.get(frame.slot)
                assert page is not None, f"{frame} is written to a file before it was filled"
                assert page.generation == frame.generation, f"stale {frame} is written to a file"
                self.folder.files[file.digest] = HashFile(file, page.state, page.logits)
                self.folder.broken.discard(file.digest)
            case ReadFile(file, frame):
                has_file = (
                    file.digest in self.folder.files and file.digest not in self.folder.broken
                )
                if fails or not has_file:
                    self.folder.files.pop(file.digest, None)
                    return DiskResult(job, "no such file, or a broken one")
            case DeleteFile(digest):
                self.folder.files.pop(digest, None)
            case WriteRecord(name, data) if not fails:
                self.folder.records[name] = data
            case DeleteRecord(name):
                self.folder.records.pop(name, None)
        return DiskResult(job, "no space left on device" if fails else None)

    def _read(self, job: ReadFile) -> None:
        """What is in the file goes to the frame; garbage, where there is nothing good in it."""
        found = self.folder.files.get(job.file.digest)
        if found is None or job.file.digest in self.folder.broken:
            found = HashFile(job.file, 0xF00, 0xF00)
        frame = job.frame
        old = self._model.frames.get(frame.slot)
        assert old is None or old.generation <= frame.generation, f"stale {frame} is read into"
        logits = found.logits if job.file.has_logits else 0xBAD
        self._model.frames[frame.slot] = Page(found.state, frame.generation, logits)
