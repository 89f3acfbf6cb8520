"""PageDisk: pages and records as files, behind one worker thread. Knows no plans and no requests.

    FOLDER/pages/<digest>.safetensors   one page each, see pagefile.py
    FOLDER/records/<name>.json          small documents, whatever is in them
    .tmp-*                              being written, or left over by a crash

One folder belongs to one model; several processes that serve it may share it. A file is written
under another name, flushed, and renamed: it is there whole or not at all, whenever the power
goes. Files can be read by their owner only, since a state tells the text that it stands for.
"""

from __future__ import annotations

import fcntl
import logging
import os
import queue
import re
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from torch import Tensor

from engine.errors import InvalidRequest, StateMismatch
from engine.plan import SlotRef
from engine.state.layout import PageLayout
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
from engine.state.pagefile import DamagedPage, PageFormat

logger = logging.getLogger(__name__)

MAX_RECORD_BYTES = 1 << 26
TEMPORARY = ".tmp-"
_PAGE_NAME = re.compile(r"((?:[0-9a-f]{2}){8,64})\.safetensors")
_RECORD_NAME = re.compile(r"([A-Za-z0-9_-]{1,80})\.json")


class Frames(Protocol):
    """Host memory for pages."""

    def frame_tensors(self, frame: int) -> dict[str, Tensor]:
        """Views of a frame on the CPU: wkv [L, H, N, N], shift [L, 2, C], logits [V]."""
        ...


def folder_of(state_dir: Path, seed: bytes) -> Path:
    """Where the files of one model lie; `seed` names all that a state depends on but tokens."""
    return state_dir / seed.hex()[:16]


class PageDisk:
    """The `Disk` of engine.state.page. Jobs never raise: a result says what went wrong."""

    def __init__(
        self,
        folder: Path,
        frames: Frames,
        layout: PageLayout,
        model_fingerprint: str,
        tokenizer_fingerprint: str,
    ) -> None:
        """Make the folder. Raises InvalidRequest naming `state_dir` where it cannot be used."""
        self.format = PageFormat(layout, model_fingerprint, tokenizer_fingerprint)
        self._frames = frames
        self._pages, self._records = folder / "pages", folder / "records"
        self._jobs: queue.SimpleQueue[DiskJob | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        for path in (folder, self._pages, self._records):
            _make_private(path)

    def scan_pages(self) -> list[PageFile]:
        """Headers only: the content is checked when a page is read."""
        found: list[tuple[int, str, PageFile]] = []
        for path, name in _files(self._pages, _PAGE_NAME):
            try:
                file, mtime_ns = self._inspect(path)
                if file.digest.hex() != name:
                    raise StateMismatch(f"it holds page {file.digest.hex()}")
            except DamagedPage as error:
                logger.warning("%s: %s", path, _discard(path, error))
            except FileNotFoundError:
                continue  # another process that serves the model deleted it
            except (StateMismatch, OSError) as error:
                logger.warning("%s is ignored: %s", path, error)
            else:
                found.append((mtime_ns, name, file))
        return [file for _, _, file in sorted(found)]

    def scan_records(self) -> dict[str, bytes]:
        records: dict[str, bytes] = {}
        for path, name in _files(self._records, _RECORD_NAME):
            try:
                if (num_bytes := path.stat().st_size) > MAX_RECORD_BYTES:
                    raise OSError(f"it has {num_bytes} bytes, at most {MAX_RECORD_BYTES} are read")
                records[name] = path.read_bytes()
            except FileNotFoundError:
                continue
            except OSError as error:
                logger.warning("%s is ignored: %s", path, error)
        return records

    def start(self, on_result: Callable[[DiskResult], None]) -> None:
        assert self._thread is None, "the disk is started once"
        self._thread = threading.Thread(
            target=self._run, args=(on_result,), name="disk", daemon=True
        )
        self._thread.start()

    def submit(self, job: DiskJob) -> None:
        if isinstance(job, WriteRecord | DeleteRecord):
            assert _RECORD_NAME.fullmatch(f"{job.name}.json"), f"{job.name!r} is no record name"
        self._jobs.put(job)

    def close(self) -> None:
        if self._thread is not None:
            self._jobs.put(None)
            self._thread.join()
            self._thread = None

    def _run(self, on_result: Callable[[DiskResult], None]) -> None:
        while (job := self._jobs.get()) is not None:
            result = DiskResult(job, self._do(job))
            try:
                on_result(result)
            except Exception:  # the loop may be gone; what is left must be written all the same
                logger.exception("nobody took the result of %s", type(job).__name__)

    def _do(self, job: DiskJob) -> str | None:
        """Why it could not be done, in one line."""
        path = self._path(job)
        try:
            match job:
                case WriteFile():
                    self._write_page(path, job.file, job.frame)
                case ReadFile():
                    self._read_page(path, job.file, job.frame)
                case WriteRecord():
                    _write_record(path, job.data)
                case DeleteFile():
                    path.unlink(missing_ok=True)
                case DeleteRecord():
                    path.unlink(missing_ok=True)
                    _sync_folder(path.parent)  # what a user deleted does not come back
        except DamagedPage as error:
            return f"{path}: {_discard(path, error)}"
        except StateMismatch as error:
            return f"{path}: {error}"
        except OSError as error:
            return f"{path}: {error.strerror or error}"
        except BaseException as error:  # a bug, of which whoever waits for the page must hear
            logger.exception("%s of %s failed", type(job).__name__, path)
            return f"{path}: {type(error).__name__}: {error}"
        return None

    def _path(self, job: DiskJob) -> Path:
        match job:
            case WriteRecord(name=name) | DeleteRecord(name=name):
                return self._records / f"{name}.json"
            case WriteFile(file=file) | ReadFile(file=file):
                return self._page_path(file.digest)
            case DeleteFile(digest=digest):
                return self._page_path(digest)

    def _page_path(self, digest: bytes) -> Path:
        return self._pages / f"{digest.hex()}.safetensors"

    def _inspect(self, path: Path) -> tuple[PageFile, int]:
        """What the header says, and when the page was used last."""
        with path.open("rb", buffering=0) as stream:
            return self.format.read_header(stream).file, os.fstat(stream.fileno()).st_mtime_ns

    def _write_page(self, path: Path, file: PageFile, frame: SlotRef) -> None:
        if self._is_there(path, file):
            os.utime(path)
            _sync_folder(path.parent)  # the one who wrote it may have failed to
            return
        tensors = self._frames.frame_tensors(frame.slot)
        write_whole(path, self.format.pieces(file, tensors))

    def _is_there(self, path: Path, file: PageFile) -> bool:
        try:
            return self._inspect(path)[0] == file
        except (StateMismatch, OSError):
            return False  # then it is replaced

    def _read_page(self, path: Path, file: PageFile, frame: SlotRef) -> None:
        with path.open("rb", buffering=0) as stream:
            found = self.format.read(stream, self._frames.frame_tensors(frame.slot))
        if found != file:
            raise StateMismatch(f"expected {file}, found {found}")
        with suppress(OSError):  # only the order of giving up suffers
            os.utime(path)


def write_whole(path: Path, pieces: Iterable[bytes | memoryview]) -> None:
    """Write a file that is there whole or not at all, and for good. Raises OSError.

    What was at `path` stays until the new file replaces it in one move. If only the very last
    step fails, flushing the folder, the new file is there but might not outlive a power cut.
    """
    descriptor, temporary = tempfile.mkstemp(prefix=TEMPORARY, dir=path.parent)  # mode 0600
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)  # until it is closed: it is not left over
        for piece in pieces:
            _write_all(descriptor, memoryview(piece))
        os.fsync(descriptor)
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):  # the first error is the one to tell
            os.unlink(temporary)
        raise
    finally:
        os.close(descriptor)
    _sync_folder(path.parent)


def _write_all(descriptor: int, data: memoryview) -> None:
    while data:
        data = data[os.write(descriptor, data) :]


def _write_record(path: Path, data: bytes) -> None:
    if len(data) > MAX_RECORD_BYTES:
        raise OSError(f"a record of {len(data)} bytes, at most {MAX_RECORD_BYTES} are read back")
    write_whole(path, [data])


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _make_private(folder: Path) -> None:
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
        reason = None if os.access(folder, os.R_OK | os.W_OK | os.X_OK) else "no permission"
    except OSError as error:
        reason = error.strerror
    if reason is not None:
        raise InvalidRequest(
            f"state_dir: {folder} cannot be written to ({reason}); name a folder that this "
            "user may write to, or leave state_dir out to keep no states on disk",
            field="state_dir",
        )


def _files(folder: Path, pattern: re.Pattern[str]) -> Iterator[tuple[Path, str]]:
    """Files named like ours, and the name's first group. Left-over temporary ones are deleted."""
    for path in sorted(folder.iterdir()):
        match = pattern.fullmatch(path.name)
        if path.is_symlink() or (path.exists() and not path.is_file()):
            logger.warning("%s is ignored: it is no file", path)
        elif match is not None:
            yield path, match[1]
        elif path.name.startswith(TEMPORARY):
            _remove_left_over(path)
        else:
            logger.warning("%s is ignored: its name is none that is given here", path)


def _remove_left_over(path: Path) -> None:
    """Delete a temporary file unless somebody is writing it, who then holds its lock."""
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
    except (BlockingIOError, FileNotFoundError):
        return  # it is being written, or was just finished
    except OSError as error:
        logger.warning("%s is left over and cannot be deleted: %s", path, error.strerror)


def _discard(path: Path, reason: StateMismatch) -> str:
    """Delete a damaged file and say both."""
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        return f"{reason}; it cannot be deleted: {error.strerror}"
    return f"{reason}; deleted"
