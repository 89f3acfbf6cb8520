"""Page: a frozen state, what it stands for and where it lies. Integers and digests only."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from engine.plan import SlotRef


@dataclass(slots=True, eq=False)
class Page:
    """The state after exactly the `num_tokens` tokens that `digest` names.

    It lies in a slot, in a frame and in a file, in any of them and in at least one, the content
    being the same; without any it does not exist. `num_holders` count those who need it to exist:
    a page that is held loses its last place to nobody.
    """

    digest: bytes
    num_tokens: int
    has_logits: bool = False
    slot: SlotRef | None = None
    frame: SlotRef | None = None
    has_file: bool = False
    num_holders: int = 0

    @property
    def exists(self) -> bool:
        return self.slot is not None or self.frame is not None or self.has_file

    @property
    def tier(self) -> str:
        """The fastest place it lies in."""
        if self.slot is not None:
            return "device"
        return "host" if self.frame is not None else "disk"


@dataclass(frozen=True, slots=True)
class PageFile:
    """What the name and header of a file say about the page in it."""

    digest: bytes
    num_tokens: int
    has_logits: bool


@dataclass(frozen=True, slots=True)
class WriteFile:
    """Write the page in `frame` to its file, for good (fsync) and whole or not at all."""

    file: PageFile
    frame: SlotRef


@dataclass(frozen=True, slots=True)
class ReadFile:
    """Read a file into `frame`, after checking all of it."""

    file: PageFile
    frame: SlotRef


@dataclass(frozen=True, slots=True)
class DeleteFile:
    digest: bytes


@dataclass(frozen=True, slots=True)
class WriteRecord:
    """Write a small JSON document, for good: what is known of a state beside its tensors."""

    name: str
    data: bytes


@dataclass(frozen=True, slots=True)
class DeleteRecord:
    name: str


DiskJob = WriteFile | ReadFile | DeleteFile | WriteRecord | DeleteRecord


@dataclass(frozen=True, slots=True)
class DiskResult:
    """A job is done, or `error` says in one line why not."""

    job: DiskJob
    error: str | None = None


class Disk(Protocol):
    """Files of pages and records in one folder, behind a worker that does jobs in order.

    The worker reads and writes frames while the device goes on: a job's frame must be held, and
    settled (no move of it in flight), from `submit` until its result.
    """

    def scan_pages(self) -> list[PageFile]:
        """Files that fit this model, least recently used first. Blocks; for before the start.

        What does not fit, or is broken, is left alone or deleted, with one log line.
        """
        ...

    def scan_records(self) -> dict[str, bytes]:
        """All records by name. Blocks, shortly."""
        ...

    def start(self, on_result: Callable[[DiskResult], None]) -> None:
        """`on_result` may be called from any thread, once per job, in order."""
        ...

    def submit(self, job: DiskJob) -> None: ...

    def close(self) -> None:
        """Finish what was submitted, then stop."""
        ...


class FrameCodec(Protocol):
    """Pages in frames from and to the bytes of a file. May be called from any thread."""

    def encode(self, file: PageFile, frame: SlotRef) -> bytes: ...

    def decode(self, data: bytes, frame: SlotRef) -> PageFile:
        """Fill a frame. The digest is one of the content, since nobody vouches for the name.

        Raises StateMismatch; then the frame holds garbage.
        """
        ...
