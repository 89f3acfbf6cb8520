"""PageDisk: what is written is there whole or not at all, and what is read was checked."""

from __future__ import annotations

import fcntl
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.errors import InvalidRequest
from engine.plan import SlotRef
from engine.state import disk as disk_module
from engine.state.disk import MAX_RECORD_BYTES, PageDisk, folder_of
from engine.state.layout import PageLayout
from engine.state.page import (
    DeleteFile,
    DeleteRecord,
    Disk,
    DiskJob,
    DiskResult,
    PageFile,
    ReadFile,
    WriteFile,
    WriteRecord,
)
from tests.engine.pages import (
    FORMAT,
    LAYOUT,
    MODEL,
    TOKENIZER,
    Desk,
    FakeFrames,
    are_equal,
    opened,
    page_file,
    random_tensors,
)


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    with opened(tmp_path / "states") as desk:
        yield desk


def test_it_is_a_disk(desk: Desk) -> None:
    disk: Disk = desk.disk
    assert disk.scan_pages() == []
    assert disk.scan_records() == {}


@pytest.mark.parametrize("has_logits", [True, False])
def test_what_is_written_is_read_bit_by_bit(desk: Desk, has_logits: bool) -> None:
    assert desk.write(1, has_logits) is None
    assert desk.reads(1, has_logits)
    assert desk.disk.scan_pages() == [page_file(1, has_logits=has_logits)]


def test_reading_a_page_without_logits_leaves_those_of_the_frame(desk: Desk) -> None:
    desk.write(1, has_logits=False)
    assert desk.do(ReadFile(page_file(1, has_logits=False), SlotRef(3, 0))) is None
    assert desk.frames.frame_tensors(3)["logits"].isnan().all()


def test_another_process_finds_what_was_written(desk: Desk, tmp_path: Path) -> None:
    for seed in (1, 2):
        desk.write(seed)
    desk.do(WriteRecord("kept", b"{}"))
    with opened(tmp_path / "states") as other:
        assert len(other.disk.scan_pages()) == 2
        assert other.disk.scan_records() == {"kept": b"{}"}
        assert other.reads(2)


def test_pages_are_found_in_the_order_of_their_last_use(desk: Desk) -> None:
    for seed in (1, 2, 3):
        desk.write(seed)
        os.utime(desk.path(seed), (seed, seed))
    assert desk.reads(1)
    assert desk.disk.scan_pages() == [page_file(2), page_file(3), page_file(1)]
    assert desk.write(2) is None
    assert [file.digest[-1] for file in desk.disk.scan_pages()] == [3, 1, 2]


def test_a_page_that_is_there_is_not_written_again(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk.write(1)
    inode = desk.path(1).stat().st_ino
    monkeypatch.setattr(os, "write", never)
    assert desk.write(1) is None
    assert desk.path(1).stat().st_ino == inode


def never(*_: object) -> int:
    raise AssertionError("was called")


@pytest.mark.parametrize(
    "before", [b"", b"damaged", FORMAT.encode(page_file(7), random_tensors(7))]
)
def test_a_file_that_is_not_the_page_is_replaced(desk: Desk, before: bytes) -> None:
    desk.path(1).write_bytes(before)
    assert desk.write(1) is None
    assert desk.reads(1)


def test_a_page_that_has_got_logits_since_replaces_the_one_without(desk: Desk) -> None:
    desk.write(1, has_logits=False)
    assert desk.write(1, has_logits=True) is None
    assert desk.reads(1, has_logits=True)


def test_files_and_folders_are_private(desk: Desk) -> None:
    desk.write(1)
    desk.do(WriteRecord("a", b"{}"))
    files = [desk.path(1), desk.folder / "records" / "a.json"]
    assert {path.stat().st_mode & 0o777 for path in files} == {0o600}
    assert {path.parent.stat().st_mode & 0o777 for path in files} == {0o700}


def test_deleted_is_deleted_also_twice(desk: Desk) -> None:
    desk.write(1)
    desk.do(WriteRecord("a", b"{}"))
    for _ in range(2):
        assert desk.do(DeleteFile(page_file(1).digest)) is None
        assert desk.do(DeleteRecord("a")) is None
    assert desk.names() == []
    assert desk.disk.scan_records() == {}
    assert "No such file" in desk.read_error(1)


def test_a_record_is_replaced_whole(desk: Desk) -> None:
    for data in (b'{"n": 1, "long": "xxxxxxxx"}', b'{"n": 2}'):
        assert desk.do(WriteRecord("state-1_A", data)) is None
        assert desk.disk.scan_records() == {"state-1_A": data}


@pytest.mark.parametrize("name", ["", "a/b", "..", "a.b", "x" * 81, "é", "a\n"])
def test_a_record_of_another_name_is_a_bug(desk: Desk, name: str) -> None:
    for job in (WriteRecord(name, b""), DeleteRecord(name)):
        with pytest.raises(AssertionError, match="is no record name"):
            desk.disk.submit(job)


def test_a_record_that_would_not_be_read_back_is_not_written(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(disk_module, "MAX_RECORD_BYTES", 10)
    assert desk.do(WriteRecord("a", b"x" * 10)) is None
    error = desk.do(WriteRecord("b", b"x" * 11))
    assert error is not None
    assert error.endswith("a record of 11 bytes, at most 10 are read back")
    (desk.folder / "records" / "c.json").write_bytes(b"x" * 11)
    assert desk.disk.scan_records() == {"a": b"x" * 10}
    assert "c.json is ignored: it has 11 bytes" in caplog.text
    assert MAX_RECORD_BYTES >= 1 << 24  # a million tokens fit


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_a_changed_byte_is_found_when_the_page_is_read_and_the_file_deleted(desk: Desk) -> None:
    desk.write(1)
    flip(desk.path(1))
    assert desk.disk.scan_pages() == [page_file(1)]  # reads headers only
    assert "checksum is" in (error := desk.read_error(1))
    assert error.endswith("; deleted")
    assert not desk.path(1).exists()


@pytest.mark.parametrize("size", [0, 5, 400, 1000, -1])
def test_a_truncated_file_is_deleted_with_one_line(
    desk: Desk, size: int, caplog: pytest.LogCaptureFixture
) -> None:
    desk.write(1)
    desk.write(2)
    whole = desk.path(1).read_bytes()
    desk.path(1).write_bytes(whole[:size])
    assert desk.disk.scan_pages() == [page_file(2)]
    assert desk.names() == [desk.path(2).name]
    assert len(caplog.records) == 1
    assert "truncated" in caplog.text
    assert "; deleted" in caplog.text
    desk.path(1).write_bytes(whole[:size])
    assert desk.read_error(1).endswith("; deleted")
    assert not desk.path(1).exists()


def test_foreign_and_misnamed_files_are_left_alone_with_one_line_each(
    desk: Desk, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with opened(tmp_path / "other", model="other") as other:
        other.write(1)
        foreign = other.path(1).read_bytes()
    pages = desk.folder / "pages"
    desk.write(9)
    desk.path(9).rename(desk.path(8))  # holds another page than its name says
    desk.path(1).write_bytes(foreign)
    desk.path(2).mkdir()
    desk.path(3).symlink_to(desk.path(8))
    os.mkfifo(desk.path(4))
    for name in ("notes.txt", "weights.safetensors", f"{'A' * 32}.safetensors", "ab.safetensors"):
        (pages / name).write_bytes(b"")
    before = desk.names()
    assert desk.disk.scan_pages() == []
    assert desk.names() == before
    assert len(caplog.records) == len(before) == 9
    assert all("is ignored: " in record.getMessage() for record in caplog.records)
    assert "model_fingerprint: expected '0123456789abcdef', found 'other'" in caplog.text


def test_reading_a_foreign_file_is_an_error_and_leaves_it(desk: Desk) -> None:
    desk.write(9)
    desk.path(9).rename(desk.path(1))
    assert "expected PageFile" in desk.read_error(1)
    assert desk.path(1).exists()


def test_left_over_temporary_files_are_deleted_silently(
    desk: Desk, caplog: pytest.LogCaptureFixture
) -> None:
    for folder in ("pages", "records"):
        (desk.folder / folder / ".tmp-abc").write_bytes(b"half")
    desk.disk.scan_pages()
    desk.disk.scan_records()
    assert not list(desk.folder.rglob(".tmp-*"))
    assert caplog.text == ""


def test_a_temporary_file_being_written_by_another_stays(desk: Desk) -> None:
    path = desk.folder / "pages" / ".tmp-abc"
    with path.open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        desk.disk.scan_pages()
        assert path.exists()
    desk.disk.scan_pages()
    assert not path.exists()


def test_models_that_share_a_folder_do_not_see_each_other(tmp_path: Path) -> None:
    seeds = [bytes([i]) * 32 for i in (1, 2)]
    folders = [folder_of(tmp_path, seed) for seed in seeds]
    assert [folder.name for folder in folders] == ["01" * 8, "02" * 8]
    with opened(folders[0], "one") as one, opened(folders[1], "two") as two:
        one.write(1)
        assert two.disk.scan_pages() == []
        two.write(1)
        assert one.reads(1)
        assert two.reads(1)


def test_a_folder_that_cannot_be_made_is_the_users_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(InvalidRequest, match=r"state_dir: .*file.* cannot be written") as info:
            Desk(folder)
        assert info.value.field == "state_dir"


def test_close_finishes_what_was_submitted_in_order(tmp_path: Path) -> None:
    frames = FakeFrames(8)
    disk = PageDisk(tmp_path, frames, LAYOUT, MODEL, TOKENIZER)
    results: list[DiskResult] = []
    jobs: list[DiskJob] = []
    for seed in range(1, 9):
        jobs += [
            WriteFile(page_file(seed), frames.put(seed, random_tensors(seed))),
            WriteRecord(f"r{seed}", b"{}"),
        ]
    jobs.append(DeleteFile(page_file(3).digest))
    disk.start(results.append)
    for job in jobs:
        disk.submit(job)
    disk.close()
    disk.close()
    assert [result.job for result in results] == jobs
    assert {result.error for result in results} == {None}
    assert {file.digest[-1] for file in disk.scan_pages()} == {1, 2, 4, 5, 6, 7, 8}


def test_closing_a_disk_that_was_never_started_returns(tmp_path: Path) -> None:
    PageDisk(tmp_path, FakeFrames(1), LAYOUT, MODEL, TOKENIZER).close()


def test_the_loop_is_not_held_up_by_a_page_of_a_7b_model(tmp_path: Path) -> None:
    """No copy or hash of the whole page keeps the interpreter lock; other noise may, once."""
    layout = PageLayout(
        num_cells=32, num_heads=64, head_size=64, vocab_size=65536,
        wkv_dtype="float32", shift_dtype="bfloat16",
    )  # fmt: skip
    with opened(tmp_path, layout=layout) as desk:
        for tensor in desk.frames.frame_tensors(1).values():
            tensor.fill_(1.0)
        assert (
            min(longest_pause(desk, PageFile(bytes([i]) * 16, 1, True)) for i in range(3)) < 0.025
        )
        written, read = (desk.frames.frame_tensors(frame) for frame in (1, 2))
        assert are_equal(written, read)


def longest_pause(desk: Desk, file: PageFile) -> float:
    """Seconds that this thread stood still while the page was written and read."""
    longest, last = 0.0, time.perf_counter()
    for job in (WriteFile(file, SlotRef(1, 0)), ReadFile(file, SlotRef(2, 0))):
        desk.disk.submit(job)
        while desk.results.empty():
            time.sleep(0.0005)
            now = time.perf_counter()
            longest, last = max(longest, now - last), now
        assert desk.results.get().error is None
    return longest


def test_nothing_is_logged_when_all_is_well(desk: Desk, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        desk.write(1)
        desk.do(WriteRecord("a", b"{}"))
        assert desk.reads(1)
        desk.disk.scan_pages()
        desk.disk.scan_records()
    assert caplog.text == ""
