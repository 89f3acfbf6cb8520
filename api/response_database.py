"""ResponseDatabase: stored responses in one SQLite database, in a file or in memory.

Blocking, and for one thread only; api/response_store.py is its face on the event loop.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterable
from dataclasses import astuple, dataclass, fields
from pathlib import Path

FILE_NAME = "responses.sqlite3"
MAX_MEMORY_BYTES = 64 << 20
MAX_FILE_BYTES = 1 << 30
LOCK_TIMEOUT_S = 5.0  # for another process that shares the file
DROPPED_SHARE = 20  # of the responses, a twentieth goes at a time


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredResponse:
    """A response that has ended. `body` and `items` are JSON, as clients get them."""

    response_id: str
    owner: str
    model_name: str
    previous_id: str | None
    created_unix_s: float
    expires_unix_s: float | None
    instructions: str | None  # in effect after it: the last that were given in its conversation
    tools: (
        str | None
    )  # what the model was told of its tools, last; "" = in their form, None = never
    initial_state: str | None  # the tuned state that its conversation begins with
    state_id: str | None  # the engine's state after it; None = its text only
    body: bytes
    items: bytes  # the input items, a list


@dataclass(frozen=True, slots=True)
class LostState:
    """A state that no response goes on from any more."""

    model_name: str
    owner: str
    state_id: str


COLUMNS = tuple(field.name for field in fields(StoredResponse))
SCHEMA = f"""
CREATE TABLE IF NOT EXISTS responses ({", ".join(COLUMNS)}, PRIMARY KEY (response_id));
CREATE INDEX IF NOT EXISTS by_age ON responses (created_unix_s);
CREATE INDEX IF NOT EXISTS by_end ON responses (expires_unix_s);
CREATE INDEX IF NOT EXISTS by_state ON responses (model_name, created_unix_s)
    WHERE state_id IS NOT NULL;
"""
COLUMN_LIST = ", ".join(COLUMNS)
INSERT = (
    f"INSERT OR REPLACE INTO responses ({COLUMN_LIST}) VALUES ({', '.join('?' for _ in COLUMNS)})"
)
STATE_COLUMNS = "model_name, owner, state_id"


class ResponseDatabase:
    """Every method may raise sqlite3.Error, for a full disk say; then nothing was changed."""

    def __init__(self, folder: Path | None, max_bytes: int | None = None) -> None:
        """Without a folder it is in memory."""
        if folder is not None:
            _make_private(folder / FILE_NAME)
        place = ":memory:" if folder is None else str(folder / FILE_NAME)
        default = MAX_MEMORY_BYTES if folder is None else MAX_FILE_BYTES
        self._max_bytes = default if max_bytes is None else max_bytes
        self._connection = sqlite3.connect(place, timeout=LOCK_TIMEOUT_S)
        try:
            self._connection.executescript(SCHEMA)
            self._add_columns()
        except sqlite3.Error:
            self._connection.close()
            raise

    def put(
        self, responses: Iterable[tuple[StoredResponse, int]], now_unix_s: float
    ) -> list[LostState]:
        """Add responses, each with how many of its model may have a state: the newest ones.

        What has expired, or is too old for the room there is, is dropped.
        """
        lost: list[LostState] = []
        with self._connection:
            for response, max_num_states in responses:
                self._connection.execute(INSERT, astuple(response))
                lost += self._take_states(response.model_name, max_num_states)
            lost += self._drop("expires_unix_s <= ?", (now_unix_s,))
            while self._num_bytes > self._max_bytes and (num_rows := self._num_rows):
                oldest = "SELECT response_id FROM responses ORDER BY created_unix_s LIMIT ?"
                num_dropped = max(1, num_rows // DROPPED_SHARE)
                lost += self._drop(f"response_id IN ({oldest})", (num_dropped,))
        return lost

    def get(self, owner: str, response_id: str, now_unix_s: float) -> StoredResponse | None:
        cursor = self._connection.execute(
            f"SELECT {COLUMN_LIST} FROM responses WHERE response_id = ? AND owner = ?"
            " AND (expires_unix_s IS NULL OR expires_unix_s > ?)",
            (response_id, owner, now_unix_s),
        )
        row = cursor.fetchone()
        return None if row is None else StoredResponse(**dict(zip(COLUMNS, row, strict=True)))

    def delete(self, response_id: str) -> None:
        with self._connection:
            self._drop("response_id = ?", (response_id,))

    def close(self) -> None:
        self._connection.close()

    def _add_columns(self) -> None:
        """Those that a file of an earlier version lacks."""
        known = {name for _, name, *_ in self._connection.execute("PRAGMA table_info(responses)")}
        for column in COLUMNS:
            if column not in known:
                self._connection.execute(f"ALTER TABLE responses ADD COLUMN {column}")

    @property
    def _num_bytes(self) -> int:
        """In use, free pages of the file not counted."""
        (num_pages,), (num_free,), (page_bytes,) = (
            self._connection.execute(f"PRAGMA {name}").fetchone()
            for name in ("page_count", "freelist_count", "page_size")
        )
        num_bytes: int = (num_pages - num_free) * page_bytes
        return num_bytes

    @property
    def _num_rows(self) -> int:
        (num_rows,) = self._connection.execute("SELECT count(*) FROM responses").fetchone()
        found: int = num_rows
        return found

    def _take_states(self, model_name: str, max_num_states: int) -> list[LostState]:
        """The states of all but the newest of a model; their responses live on as text."""
        rest = (
            "SELECT response_id FROM responses WHERE model_name = ? AND state_id IS NOT NULL"
            " ORDER BY created_unix_s DESC LIMIT -1 OFFSET ?"
        )
        condition = f"response_id IN ({rest})"
        lost = self._states_where(condition, (model_name, max_num_states))
        if lost:
            self._connection.execute(
                f"UPDATE responses SET state_id = NULL WHERE {condition}",
                (model_name, max_num_states),
            )
        return lost

    def _drop(self, condition: str, values: tuple[object, ...]) -> list[LostState]:
        lost = self._states_where(condition, values)
        self._connection.execute(f"DELETE FROM responses WHERE {condition}", values)
        return lost

    def _states_where(self, condition: str, values: tuple[object, ...]) -> list[LostState]:
        rows = self._connection.execute(
            f"SELECT {STATE_COLUMNS} FROM responses WHERE {condition} AND state_id IS NOT NULL",
            values,
        )
        return [LostState(*row) for row in rows]


def _make_private(path: Path) -> None:
    """Only its owner may read what was said."""
    path.parent.mkdir(parents=True, exist_ok=True)
    os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
