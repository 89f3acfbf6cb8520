"""PageFiles: which files there are to be, and what the worker is told."""

from __future__ import annotations

import pytest

from engine.plan import SlotRef
from engine.state.files import MAX_WRITES, PAUSE_AFTER_ERROR, PageFiles
from engine.state.page import DeleteFile, Page, PageFile, ReadFile, WriteFile

FRAME = SlotRef(1, 0)


class Books:
    """PageFiles, and what it says to its owner."""

    def __init__(self, max_files: int = 4, min_tokens: int = 0) -> None:
        self.changed: list[Page] = []
        self.lost: list[Page] = []
        self.files = PageFiles(max_files, min_tokens, self.changed.append, self.lost.append)

    def page(self, number: int) -> Page:
        return Page(bytes([number]), number, frame=FRAME)

    def page_with_file(self, number: int) -> Page:
        page = self.page(number)
        self.files.add(page)
        return page

    def write(self, page: Page, error: str | None = None) -> None:
        self.files.write(page, FRAME)
        (job,) = self.files.take_jobs()
        assert isinstance(job, WriteFile)
        self.files.written(job, error)


def test_a_job_names_the_page_and_the_frame() -> None:
    books = Books()
    page = Page(b"x", 7, has_logits=True, frame=FRAME)
    books.files.write(page, FRAME)
    assert books.files.has_jobs
    assert books.files.take_jobs() == [WriteFile(PageFile(b"x", 7, True), FRAME)]
    assert not books.files.has_jobs
    assert books.files.is_busy


def test_a_page_has_its_file_when_the_worker_says_so() -> None:
    books = Books()
    page = books.page(1)
    books.files.write(page, FRAME)
    (job,) = books.files.take_jobs()
    assert isinstance(job, WriteFile)
    assert not page.has_file
    books.files.written(job, None)
    assert page.has_file
    assert (books.changed, books.files.num_written) == ([page], 1)
    assert not books.files.is_busy


def test_a_write_that_failed_leaves_no_file() -> None:
    books = Books()
    page = books.page(1)
    books.write(page, "no space left")
    assert not page.has_file
    assert books.files.num_written == 0
    assert len(books.files.order) == 0


def test_after_a_write_that_failed_some_are_passed_over_but_none_that_is_held() -> None:
    books = Books()
    books.write(books.page(1), "no space left")
    held = books.page(2)
    held.num_holders = 1
    assert books.files.wants(held)
    wanted = [books.files.wants(books.page(3)) for _ in range(PAUSE_AFTER_ERROR)]
    assert wanted == [False] * (PAUSE_AFTER_ERROR - 1) + [True]


def test_no_page_is_written_twice() -> None:
    books = Books()
    page = books.page(1)
    books.files.write(page, FRAME)
    assert not books.files.wants(page)
    assert not books.files.wants(books.page(1)), "another of the same text"
    assert not books.files.wants(books.page_with_file(2))


def test_without_a_budget_or_a_name_no_page_is_wanted() -> None:
    assert not Books(max_files=0).files.wants(Page(b"x", 1, frame=FRAME))
    assert not Books().files.wants(Page(b"", 1, frame=FRAME))


def test_only_so_many_are_on_their_way_but_for_those_that_are_held() -> None:
    books = Books(max_files=99)
    for number in range(MAX_WRITES):
        assert books.files.wants(books.page(number))
        books.files.write(books.page(number), FRAME)
    assert not books.files.wants(books.page(50))
    books.files.is_patient = True
    assert books.files.wants(books.page(50))
    books.files.is_patient = False
    held = books.page(51)
    held.num_holders = 1
    assert books.files.wants(held)


def test_the_file_of_a_page_dropped_while_it_was_written_is_deleted() -> None:
    books = Books()
    page = books.page(1)
    books.files.write(page, FRAME)
    (job,) = books.files.take_jobs()
    assert isinstance(job, WriteFile)
    page.frame = None
    books.files.written(job, None)
    assert books.files.take_jobs() == [DeleteFile(page.digest)]
    assert not page.has_file


def test_over_budget_the_least_recently_used_that_nobody_holds_goes() -> None:
    books = Books(max_files=2)
    held, second, third = (books.page_with_file(number) for number in (1, 2, 3))
    held.num_holders = 1
    books.files.trim()
    assert books.lost == [second]
    assert books.files.take_jobs() == [DeleteFile(second.digest)]
    assert [page.has_file for page in (held, second, third)] == [True, False, True]


def test_files_that_are_held_may_exceed_the_budget() -> None:
    books = Books(max_files=1)
    for number in (1, 2, 3):
        books.page_with_file(number).num_holders = 1
    books.files.trim()
    assert len(books.files.order) == 3
    assert books.files.take_jobs() == []


def test_a_page_is_read_into_a_frame() -> None:
    books = Books()
    page = books.page_with_file(1)
    books.files.read(page, FRAME)
    assert books.files.is_reading(page)
    (job,) = books.files.take_jobs()
    assert job == ReadFile(PageFile(page.digest, 1, False), FRAME)
    assert isinstance(job, ReadFile)
    assert books.files.was_read(job, None) is page
    assert not books.files.is_reading(page)
    assert books.files.num_read == 1


@pytest.mark.parametrize("error", [None, "broken"])
def test_what_was_read_for_a_page_that_is_gone_is_nobodys(error: str | None) -> None:
    books = Books()
    page = books.page_with_file(1)
    page.frame = None
    books.files.read(page, FRAME)
    job = books.files.take_jobs()[0]
    books.files.delete(page)
    assert isinstance(job, ReadFile)
    assert books.files.was_read(job, error) is None
    assert books.lost == [page]  # once


def test_a_page_loses_a_file_that_cannot_be_read() -> None:
    books = Books()
    page = books.page_with_file(1)
    books.files.read(page, FRAME)
    (job,) = books.files.take_jobs()
    assert isinstance(job, ReadFile)
    assert books.files.was_read(job, "broken") is None
    assert not page.has_file
    assert books.lost == [page]
    assert page not in books.files.order


def test_reading_a_page_without_a_file_is_noticed() -> None:
    books = Books()
    with pytest.raises(AssertionError, match="without a file is read"):
        books.files.read(books.page(1), FRAME)
