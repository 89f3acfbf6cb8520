"""PageDisk when operations fail, files are cut and the process is killed at any moment."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from engine.plan import SlotRef
from engine.state.disk import PageDisk
from engine.state.page import (
    DiskResult,
    WriteFile,
    WriteRecord,
)
from tests.engine.pages import (
    LAYOUT,
    MODEL,
    TOKENIZER,
    Desk,
    FakeFrames,
    opened,
    page_file,
)


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    with opened(tmp_path / "states") as desk:
        yield desk


OPERATIONS = ("open", "write", "fsync", "replace")


def failing(
    monkeypatch: pytest.MonkeyPatch, budget: int, error: int = errno.ENOSPC
) -> Callable[[], int]:
    """The operation after `budget` more fails, and all later ones; gives how many were left."""
    left = [budget]

    def wrap(name: str) -> None:
        original = getattr(os, name)

        def operation(*args: object, **keys: object) -> object:
            left[0] -= 1
            if left[0] < 0:
                raise OSError(error, os.strerror(error))
            return original(*args, **keys)

        monkeypatch.setattr(os, name, operation)

    for name in OPERATIONS:
        wrap(name)
    return lambda: left[0]


# mkstemp; header length, header, wkv, shift, logits; fsync; rename; open and fsync of the folder
NUM_OPERATIONS = 10


@pytest.mark.parametrize("budget", range(NUM_OPERATIONS))
@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO, errno.EACCES])
def test_a_write_that_fails_anywhere_is_an_error_and_leaves_no_rubbish(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, budget: int, error: int
) -> None:
    desk.write(1)
    with monkeypatch.context() as patch:
        failing(patch, budget, error)
        message = desk.write(2)
    assert message is not None
    assert message == f"{desk.path(2)}: {os.strerror(error)}"
    is_renamed = budget >= 8
    assert desk.names() == sorted(desk.path(seed).name for seed in (1, 2)[: 1 + is_renamed])
    assert desk.reads(1)
    assert desk.write(2) is None  # the worker goes on, and there is room again
    assert desk.reads(2)


def test_a_write_has_as_many_operations_as_were_made_to_fail(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        left = failing(patch, NUM_OPERATIONS)
        assert desk.write(1) is None
    assert left() == 0


@pytest.mark.parametrize("budget", range(6))
def test_a_record_that_cannot_be_replaced_stays_as_it_was(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, budget: int
) -> None:
    desk.do(WriteRecord("a", b"old"))
    with monkeypatch.context() as patch:
        failing(patch, budget)
        assert desk.do(WriteRecord("a", b"new")) is not None
    assert desk.disk.scan_records() == {"a": b"new" if budget >= 4 else b"old"}
    assert os.listdir(desk.folder / "records") == ["a.json"]


def test_a_write_that_is_cut_short_goes_on(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    original = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: original(fd, data[:7]))
    assert desk.write(1) is None
    assert desk.reads(1)


def test_a_folder_that_is_gone_is_an_error_of_the_job(desk: Desk) -> None:
    (desk.folder / "pages").rmdir()
    assert "No such file" in (desk.write(1) or "")
    assert desk.do(WriteRecord("a", b"{}")) is None


def test_a_bug_in_a_job_is_its_error_and_is_logged(
    desk: Desk, caplog: pytest.LogCaptureFixture
) -> None:
    error = desk.do(WriteFile(page_file(1), SlotRef(99, 0)))  # no such frame
    assert "IndexError" in (error or "")
    assert "WriteFile of" in caplog.text
    assert desk.write(1) is None


def test_what_would_end_the_worker_is_the_error_of_its_job(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    def told_to_end(*_: object) -> None:
        raise SystemExit("told to end")

    with monkeypatch.context() as patch:
        patch.setattr("engine.state.disk.write_whole", told_to_end)
        assert "SystemExit: told to end" in (desk.write(1) or "")
    assert desk.write(1) is None


def test_a_reader_of_results_that_is_gone_does_not_stop_the_writing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    disk = PageDisk(tmp_path, FakeFrames(1), LAYOUT, MODEL, TOKENIZER)

    def is_gone(_: DiskResult) -> None:
        raise RuntimeError("Event loop is closed")

    disk.start(is_gone)
    for name in "abc":
        disk.submit(WriteRecord(name, b"{}"))
    disk.close()
    assert disk.scan_records().keys() == {"a", "b", "c"}
    assert "nobody took the result of WriteRecord" in caplog.text


WRITE_BEYOND_LIMIT = """
import resource, signal, sys
from pathlib import Path
from engine.state.disk import PageDisk
from engine.state.page import WriteFile
from tests.engine.pages import *
frames = FakeFrames(1)
disk = PageDisk(Path(sys.argv[1]), frames, LAYOUT, MODEL, TOKENIZER)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (900, resource.RLIM_INFINITY))
disk.start(lambda result: print(result.error))
disk.submit(WriteFile(page_file(1), frames.put(1, random_tensors(1))))
disk.close()
assert not list(Path(sys.argv[1], "pages").iterdir())
"""


def test_a_real_failing_write_is_an_error(tmp_path: Path) -> None:
    assert run_program(WRITE_BEYOND_LIMIT, tmp_path).strip().endswith("File too large")


def run_program(program: str, folder: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-c", program, str(folder)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# Writes a page and a record in children that are killed before, or halfway through, their k-th
# operation on files; after each the folder holds the old or the new, whole.
KILL_AT_EVERY_POINT = """
import fcntl, os, sys
from pathlib import Path
from engine.plan import SlotRef
from engine.state.disk import PageDisk
from engine.state.page import ReadFile, WriteFile, WriteRecord
from tests.engine.pages import *

folder = Path(sys.argv[1])
budget = 0

def count(module, name, half=None):
    original = getattr(module, name)
    def operation(*args, **keys):
        global budget
        budget -= 1
        if budget == 0:
            if half is not None:
                half(original, *args)
            os._exit(9)
        return original(*args, **keys)
    setattr(module, name, operation)

def do(*jobs):
    errors = []
    disk = PageDisk(folder, frames, LAYOUT, MODEL, TOKENIZER)
    disk.start(lambda result: errors.append(result.error))
    for job in jobs:
        disk.submit(job)
    disk.close()
    return errors

def write(seed):
    frame = frames.put(1, random_tensors(seed))
    return do(WriteFile(page_file(seed), frame), WriteRecord("newest", str(seed).encode()))

frames = FakeFrames(2)
assert write(1) == [None, None]
for k in range(1, 100):
    child = os.fork()
    if child == 0:
        budget = k
        for name in ("open", "fsync", "replace"):
            count(os, name)
        count(os, "write", lambda write, fd, data: write(fd, data[: len(data) // 2]))
        count(fcntl, "flock")
        assert write(2) == [None, None]
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, 9), status
    disk = PageDisk(folder, frames, LAYOUT, MODEL, TOKENIZER)
    pages, records = disk.scan_pages(), disk.scan_records()
    assert pages in ([page_file(1)], [page_file(1), page_file(2)]), (k, pages)
    assert not list(folder.rglob(".tmp-*")), k
    for file in pages:
        assert do(ReadFile(file, SlotRef(2, 0))) == [None], (k, file)
        assert are_equal(frames.frame_tensors(2), random_tensors(file.digest[-1]))
    assert records in ({"newest": b"1"}, {"newest": b"2"}), (k, records)
    assert records["newest"] == b"1" or len(pages) == 2, "the record came before its page"
    if status == 0:
        print(k - 1, len(pages), records)
        break
    (folder / "pages" / f"{page_file(2).digest.hex()}.safetensors").unlink(missing_ok=True)
"""


def test_a_kill_at_any_point_of_a_write_leaves_the_old_or_the_new(tmp_path: Path) -> None:
    points, rest = run_program(KILL_AT_EVERY_POINT, tmp_path).split(maxsplit=1)
    assert int(points) == NUM_OPERATIONS + 6 + 2  # of a page, of a record, and two locks
    assert rest.strip() == "2 {'newest': b'2'}"
