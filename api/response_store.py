"""ResponseStore: stored responses by id and owner, on the event loop.

A response is there as soon as it is put; a thread writes it, beside the states of its model if
that has a `state_dir`, so that both survive a restart. While a disk is full or broken, the latest
responses stay in memory.
"""

from __future__ import annotations

import asyncio
import logging
import sqlite3
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from api.response_database import FILE_NAME, LostState, ResponseDatabase, StoredResponse

logger = logging.getLogger(__name__)

MAX_NUM_UNWRITTEN = 1000


@dataclass(frozen=True, slots=True)
class Pending:
    response: StoredResponse
    folder: Path | None
    max_num_states: int


class ResponseStore:
    """`folders` says where responses may lie; `release` is called with states to be given up."""

    def __init__(
        self,
        folders: Callable[[], Iterable[Path | None]],
        release: Callable[[LostState], None],
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._folders = folders
        self._release = release
        self._clock = clock
        self._unwritten: OrderedDict[str, Pending] = OrderedDict()
        self._databases: dict[Path | None, ResponseDatabase] = {}
        self._thread = ThreadPoolExecutor(1, "responses")
        self._writer: asyncio.Task[None] | None = None
        self._is_closed = False

    def put(self, response: StoredResponse, folder: Path | None, max_num_states: int) -> None:
        """Keep a response, in memory without a folder.

        At most `max_num_states` of its model go on from a state, the newest; the others from text.
        """
        if self._is_closed:
            return  # the server goes down, and an answer was cut off at the last moment
        self._unwritten[response.response_id] = Pending(response, folder, max_num_states)
        if len(self._unwritten) > MAX_NUM_UNWRITTEN:
            _, oldest = self._unwritten.popitem(last=False)
            self._release_all(_states_of(oldest.response))
        if self._writer is None:
            self._writer = asyncio.create_task(self._write())

    async def get(self, owner: str, response_id: str) -> StoredResponse | None:
        """None for an unknown, expired or another owner's."""
        if (pending := self._unwritten.get(response_id)) is not None:
            return pending.response if pending.response.owner == owner else None
        loop, folders = asyncio.get_running_loop(), set(self._folders())
        try:
            return await loop.run_in_executor(self._thread, self._read, folders, owner, response_id)
        except (sqlite3.Error, OSError) as error:
            logger.warning("stored responses cannot be read: %s", error)
            return None

    async def delete(self, response: StoredResponse) -> None:
        """Forget a response and its state. Raises OSError or sqlite3.Error where it stays."""
        self._unwritten.pop(response.response_id, None)  # being written, it is so before the rest
        loop, folders = asyncio.get_running_loop(), set(self._folders())
        await loop.run_in_executor(self._thread, self._erase, folders, response.response_id)
        self._release_all(_states_of(response))

    async def close(self) -> None:
        """Write what is left. Nothing is taken afterwards."""
        self._is_closed = True
        if self._writer is not None:
            await self._writer
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(self._thread, self._close_databases)
        self._thread.shutdown()

    async def _write(self) -> None:
        """All that waits, in one transaction for each file."""
        loop = asyncio.get_running_loop()
        try:
            while self._unwritten:
                batch = list(self._unwritten.values())
                lost = await loop.run_in_executor(self._thread, self._put, batch)
                for pending in batch:
                    response_id = pending.response.response_id
                    if self._unwritten.get(response_id) is pending:
                        del self._unwritten[response_id]
                self._release_all(lost)
        except (sqlite3.Error, OSError) as error:
            logger.warning("responses cannot be stored, the latest stay in memory: %s", error)
        finally:
            self._writer = None

    def _release_all(self, lost: Iterable[LostState]) -> None:
        for state in lost:
            self._release(state)

    # In the thread

    def _put(self, batch: list[Pending]) -> list[LostState]:
        lost = []
        for folder in {pending.folder for pending in batch}:
            mine = [(p.response, p.max_num_states) for p in batch if p.folder == folder]
            lost += self._database(folder).put(mine, self._clock())
        return lost

    def _read(
        self, folders: set[Path | None], owner: str, response_id: str
    ) -> StoredResponse | None:
        for database in self._known_databases(folders):
            if found := database.get(owner, response_id, self._clock()):
                return found
        return None

    def _erase(self, folders: set[Path | None], response_id: str) -> None:
        for database in self._known_databases(folders):
            database.delete(response_id)

    def _known_databases(self, folders: set[Path | None]) -> list[ResponseDatabase]:
        """Those that are open, and those that an earlier process has left."""
        for folder in folders:
            if folder is not None and (folder / FILE_NAME).exists():
                self._database(folder)
        return list(self._databases.values())

    def _database(self, folder: Path | None) -> ResponseDatabase:
        if folder not in self._databases:
            self._databases[folder] = ResponseDatabase(folder)
        return self._databases[folder]

    def _close_databases(self) -> None:
        for database in self._databases.values():
            database.close()


def _states_of(response: StoredResponse) -> list[LostState]:
    if response.state_id is None:
        return []
    return [LostState(response.model_name, response.owner, response.state_id)]
