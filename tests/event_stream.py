"""A strict reader of text/event-stream, written from the WHATWG HTML standard (9.2.5, 9.2.6).

Bytes in, events out, however they are cut. Stricter than a browser: what a browser would pass over
in silence (broken UTF-8, an unknown field, an unfinished event) is an error here. Knows nothing of
what the data means.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable
from dataclasses import dataclass


class EventStreamError(ValueError):
    """The bytes are no event stream that a careful server would write."""


@dataclass(frozen=True, slots=True)
class Event:
    """What a browser would dispatch; `name` is "message" where the stream says none."""

    name: str
    data: str
    last_id: str = ""


class EventStream:
    """The state between two pieces of a stream."""

    def __init__(self) -> None:
        self.comments: list[str] = []
        self.retry_ms: int | None = None
        self._decoder = codecs.getincrementaldecoder("utf-8")("strict")
        self._is_first = True  # a byte order mark may come
        self._is_after_cr = False  # a line feed now belongs to the line that has ended
        self._line = ""
        self._name = ""
        self._data: list[str] = []
        self._last_id = ""

    def feed(self, data: bytes) -> list[Event]:
        """The events that these bytes complete."""
        try:
            text = self._decoder.decode(data)
        except UnicodeDecodeError as error:
            raise EventStreamError(f"no UTF-8: {error}") from error
        return [event for char in text if (event := self._take(char)) is not None]

    def close(self) -> None:
        """The stream has ended; nothing may be unfinished."""
        rest = self._decoder.getstate()[0]
        if rest or self._line or self._data or self._name:
            raise EventStreamError(f"ends within an event: {rest!r} {self._line!r} {self._data}")

    def _take(self, char: str) -> Event | None:
        is_first, self._is_first = self._is_first, False
        is_after_cr, self._is_after_cr = self._is_after_cr, char == "\r"
        if (is_first and char == "\ufeff") or (is_after_cr and char == "\n"):
            return None
        if char not in "\r\n":
            self._line += char
            return None
        line, self._line = self._line, ""
        if not line:
            return self._dispatch()
        self._process(*line.partition(":")[::2])
        return None

    def _process(self, field: str, value: str) -> None:
        value = value.removeprefix(" ")
        match field:
            case "":
                self.comments.append(value)
            case "data":
                self._data.append(value)
            case "event":
                self._name = value
            case "id" if "\0" not in value:
                self._last_id = value
            case "retry" if value.isascii() and value.isdigit():
                self.retry_ms = int(value)
            case _:
                raise EventStreamError(f"a browser would ignore the field {field!r}: {value!r}")

    def _dispatch(self) -> Event | None:
        name, data = self._name, self._data
        self._name, self._data = "", []
        if data:
            return Event(name or "message", "\n".join(data), self._last_id)
        if name:
            raise EventStreamError(f"the event {name!r} has no data and is never dispatched")
        return None


def events_of(data: bytes) -> list[Event]:
    """Those of a whole stream, read byte by byte."""
    return read_all(bytes([byte]) for byte in data)[0]


def read_all(pieces: Iterable[bytes]) -> tuple[list[Event], list[str]]:
    """Events and comments of a whole stream."""
    stream = EventStream()
    events = [event for piece in pieces for event in stream.feed(piece)]
    stream.close()
    return events, stream.comments
