"""Stored responses: what is kept, for how long, and what a broken disk does to it."""

from __future__ import annotations

import os
import sqlite3
import stat
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from api.response_database import (
    COLUMNS,
    FILE_NAME,
    LostState,
    ResponseDatabase,
    StoredResponse,
)
from api.response_store import MAX_NUM_UNWRITTEN, ResponseStore

ONE = StoredResponse(
    response_id="resp_1",
    owner="tom",
    model_name="m",
    previous_id=None,
    created_unix_s=100.0,
    expires_unix_s=None,
    instructions=None,
    tools=None,
    initial_state=None,
    state_id="state-1",
    body=b'{"status": "completed"}',
    items=b"[]",
)
NOW_S = 150.0


def numbered(number: int, **fields: object) -> StoredResponse:
    given = {
        "response_id": f"resp_{number}",
        "created_unix_s": float(number),
        "state_id": f"state-{number}",
    }
    return replace(ONE, **given | fields)


class Site:
    """A store, the time, and the states that it has let go."""

    def __init__(self, *folders: Path | None) -> None:
        self.now_s = NOW_S
        self.released: list[str] = []
        self.store = ResponseStore(
            lambda: folders, lambda lost: self.released.append(lost.state_id), lambda: self.now_s
        )


@asynccontextmanager
async def opened(*folders: Path | None) -> AsyncIterator[Site]:
    site = Site(*folders)
    try:
        yield site
    finally:
        await site.store.close()


class TestDatabase:
    @pytest.fixture(params=["memory", "file"])
    def folder(self, request: pytest.FixtureRequest, tmp_path: Path) -> Path | None:
        return tmp_path if request.param == "file" else None

    def test_gives_back_what_was_put(self, folder: Path | None):
        database = ResponseDatabase(folder)
        other = numbered(2, previous_id="resp_1", instructions="Be kind.", initial_state="t")
        assert database.put([(ONE, 9), (other, 9)], NOW_S) == []
        assert database.get("tom", "resp_1", NOW_S) == ONE
        assert database.get("tom", "resp_2", NOW_S) == other
        assert database.get("ann", "resp_1", NOW_S) is None
        database.delete("resp_1")
        assert database.get("tom", "resp_1", NOW_S) is None
        database.close()

    def test_what_expires_is_not_found_and_then_dropped(self, folder: Path | None):
        database = ResponseDatabase(folder)
        database.put([(replace(ONE, expires_unix_s=200.0), 9)], NOW_S)
        assert database.get("tom", "resp_1", 199.0)
        assert database.get("tom", "resp_1", 200.0) is None
        assert database.put([(numbered(2), 9)], 201.0) == [LostState("m", "tom", "state-1")]
        assert database.get("tom", "resp_1", 0.0) is None
        database.close()

    def test_only_the_newest_of_a_model_have_states(self, folder: Path | None):
        database = ResponseDatabase(folder)
        database.put([(numbered(0, model_name="other"), 2)], NOW_S)
        lost = [database.put([(numbered(number), 2)], NOW_S) for number in range(1, 5)]
        names = [[state.state_id for state in states] for states in lost]
        assert names == [[], [], ["state-1"], ["state-2"]]
        found = [database.get("tom", f"resp_{number}", NOW_S) for number in range(5)]
        assert [one and one.state_id for one in found] == [
            "state-0",
            None,
            None,
            "state-3",
            "state-4",
        ]
        database.close()

    def test_the_oldest_go_where_there_is_no_room(self, folder: Path | None):
        database = ResponseDatabase(folder, max_bytes=400_000)
        for number in range(100):
            database.put([(numbered(number, body=b"x" * 10_000), 1000)], NOW_S)
        kept = [n for n in range(100) if database.get("tom", f"resp_{n}", NOW_S)]
        assert 25 <= len(kept) < 40
        assert kept == list(range(100 - len(kept), 100))
        database.close()

    def test_one_that_is_larger_than_the_room_does_not_stay(self, folder: Path | None):
        database = ResponseDatabase(folder, max_bytes=100_000)
        assert database.put([(replace(ONE, body=b"x" * 200_000), 9)], NOW_S) == [
            LostState("m", "tom", "state-1")
        ]
        assert database.get("tom", "resp_1", NOW_S) is None
        database.put([(numbered(2), 9)], NOW_S)
        assert database.get("tom", "resp_2", NOW_S)
        database.close()

    def test_file_of_an_earlier_version_gets_the_columns_it_lacks(self, tmp_path: Path):
        columns = [name for name in COLUMNS if name != "tools"]
        values = [getattr(ONE, name) for name in columns]
        connection = sqlite3.connect(tmp_path / FILE_NAME)
        connection.execute(f"CREATE TABLE responses ({', '.join(columns)})")
        with connection:
            marks = ", ".join("?" for _ in values)
            connection.execute(f"INSERT INTO responses VALUES ({marks})", values)
        connection.close()
        database = ResponseDatabase(tmp_path)
        assert database.get("tom", "resp_1", NOW_S) == ONE
        other = numbered(2, tools="told")
        database.put([(other, 9)], NOW_S)
        database.close()
        database = ResponseDatabase(tmp_path)
        assert database.get("tom", "resp_2", NOW_S) == other
        database.close()

    def test_only_its_owner_may_read_the_file(self, tmp_path: Path):
        ResponseDatabase(tmp_path / "new").close()
        mode = (tmp_path / "new" / FILE_NAME).stat().st_mode
        assert stat.S_IMODE(mode) == 0o600


class TestStore:
    async def test_survives_a_restart_in_a_folder_only(self, tmp_path: Path):
        async with opened(tmp_path, None) as site:
            site.store.put(ONE, tmp_path, 9)
            site.store.put(numbered(2), None, 9)
            assert await site.store.get("tom", "resp_1") == ONE
            assert await site.store.get("tom", "resp_2")
        async with opened(tmp_path, None) as site:
            assert await site.store.get("tom", "resp_1") == ONE
            assert await site.store.get("ann", "resp_1") is None
            assert await site.store.get("tom", "resp_2") is None

    async def test_reading_makes_no_file(self, tmp_path: Path):
        async with opened(tmp_path) as site:
            assert await site.store.get("tom", "resp_1") is None
        assert os.listdir(tmp_path) == []

    async def test_is_there_before_it_is_written(self, tmp_path: Path):
        async with opened(tmp_path) as site:
            site.store.put(ONE, tmp_path, 9)
            assert not (tmp_path / FILE_NAME).exists()
            assert await site.store.get("tom", "resp_1") == ONE
            assert await site.store.get("ann", "resp_1") is None

    async def test_states_that_lose_their_place_are_released(self, tmp_path: Path):
        async with opened(tmp_path) as site:
            for number in range(4):
                site.store.put(numbered(number), tmp_path, 2)
        assert site.released == ["state-1", "state-0"] or site.released == ["state-0", "state-1"]

    async def test_delete_takes_it_wherever_it_is(self, tmp_path: Path):
        async with opened(tmp_path, None) as site:
            for folder in (tmp_path, None):
                site.store.put(ONE, folder, 9)
                await site.store.delete(ONE)
                assert await site.store.get("tom", "resp_1") is None
                site.store.put(ONE, folder, 9)
                await site.store.get("tom", "another")  # it is written
                await site.store.delete(ONE)
                assert await site.store.get("tom", "resp_1") is None
        assert site.released == ["state-1"] * 4

    async def test_broken_disk_keeps_the_latest_in_memory(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ):
        folder = tmp_path / "folder"
        folder.write_text("a file is in the way")
        async with opened(folder) as site:
            site.store.put(ONE, folder, 9)
            await site.store._writer  # type: ignore[misc]
            assert "cannot be stored" in caplog.text
            assert await site.store.get("tom", "resp_1") == ONE
            for number in range(2, MAX_NUM_UNWRITTEN + 2):
                site.store.put(numbered(number), folder, 9)
            assert await site.store.get("tom", "resp_2") is not None
            assert site.released == ["state-1"]
            await site.store._writer  # type: ignore[misc]
            folder.unlink()
            site.store.put(numbered(3), folder, 9)
        async with opened(folder) as site:
            assert await site.store.get("tom", f"resp_{MAX_NUM_UNWRITTEN + 1}") is not None

    async def test_file_that_is_no_database_is_told_once_and_finds_nothing(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ):
        (tmp_path / FILE_NAME).write_bytes(b"garbage" * 1000)
        async with opened(tmp_path) as site:
            assert await site.store.get("tom", "resp_1") is None
        assert "cannot be read" in caplog.text

    async def test_two_processes_may_share_a_folder(self, tmp_path: Path):
        async with opened(tmp_path) as one, opened(tmp_path) as other:
            for number in range(20):
                site = (one, other)[number % 2]
                site.store.put(numbered(number), tmp_path, 100)
                assert await site.store.get("tom", "another") is None
            for number in range(20):
                assert await one.store.get("tom", f"resp_{number}")
                assert await other.store.get("tom", f"resp_{number}")
