"""The HTTP connection with limits on what a client may cost before its request is complete.

Knows sockets and uvicorn's httptools protocol, which has none of these limits; no routes. It
relies on internals of uvicorn, so uvicorn is pinned and tests/api/test_guard.py shows each limit.
Nothing here runs per event of a stream, and there is no timer per request: the server calls
`sweep` a few times per second.
"""

from __future__ import annotations

import asyncio
import math
import re
import resource
import select
from collections.abc import Collection, Iterable
from heapq import nsmallest
from typing import cast

from uvicorn._types import ASGI3Application
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from api.body_writer import BODY_WRITER_KEY, BodyWriter
from api.errors import ApiError

KIB = 1024
MAX_NUM_CONNECTIONS = 65_536
NUM_OWN_FILES = 128
HANG_UP = getattr(select, "POLLRDHUP", 0)  # of Linux; elsewhere only a reset is noticed
UPGRADE = re.compile(rb"\nupgrade:", re.IGNORECASE)
REASONS = {400: b"Bad Request", 408: b"Request Timeout", 431: b"Request Header Fields Too Large"}


class GuardedHttp(HttpToolsProtocol):
    """One connection. Tests make the limits smaller in a subclass."""

    max_header_bytes = 64 * KIB
    max_num_headers = 128
    header_timeout_s = 10.0  # from the first byte of a request, or from connecting
    body_grace_s = 30.0  # a body may take so long, and longer while it comes at this rate:
    min_body_bytes_per_s = 16 * KIB
    stall_timeout_s = 30.0  # a reader that takes nothing of a waiting answer for so long is gone
    linger_s = 1.0  # what a refused client still sends is read, and forgotten, for so long
    max_framing_per_body_byte = 8  # chunks of one byte need six; trailers are no way round 431

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._answered: RequestResponseCycle | None = None
        self._is_refused = False
        self._is_in_header = True
        self._num_header_bytes = 0
        self._num_wire_bytes = 0  # since the header ended
        self._num_body_bytes = 0
        self._deadline_s = self.loop.time() + self.header_timeout_s
        self._stall_s = math.inf
        self._num_unsent_bytes = 0
        self._waits_since_s = self.loop.time()  # for a request, or for the rest of one
        if len(self.connections) > max_num_connections():
            self.connections -= set(make_room(self.connections, max_num_connections() * 3 // 4))

    def data_received(self, data: bytes) -> None:
        if self._is_refused:
            return
        if self._is_in_header:
            data = _without_upgrade(data)
            self._num_header_bytes += len(data)
            if self._deadline_s == math.inf:
                self._deadline_s = self.loop.time() + self.header_timeout_s
        else:
            self._num_wire_bytes += len(data)
        super().data_received(data)
        if not self._is_refused and self._has_too_much_header():
            self._refuse_large_header()

    def on_headers_complete(self) -> None:
        is_large = sum(len(name) + len(value) for name, value in self.headers) + len(self.url)
        if len(self.headers) > self.max_num_headers or is_large > self.max_header_bytes:
            self._refuse_large_header()
            return
        super().on_headers_complete()  # first, as it refuses bad URLs by raising
        self._is_in_header = False
        self._num_header_bytes = self._num_wire_bytes = self._num_body_bytes = 0
        self._deadline_s = self.loop.time() + self.body_grace_s

    def on_body(self, body: bytes) -> None:
        if self._is_refused:
            return
        self._num_body_bytes += len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        if self._is_refused:
            return
        self._is_in_header = True
        self._deadline_s = math.inf
        super().on_message_complete()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        self._answered = cycle
        cast(dict[str, object], cycle.scope)[BODY_WRITER_KEY] = BodyWriter(cycle)
        super()._start_asgi_task(cycle, app)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        if self._answered is not None:  # uvicorn tells the newest request only, which may wait
            self._answered.disconnected = True
            self._answered.message_event.set()

    def on_response_complete(self) -> None:
        self._waits_since_s = self.loop.time()
        super().on_response_complete()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._num_unsent_bytes = self.transport.get_write_buffer_size()
        self._stall_s = self.loop.time() + self.stall_timeout_s

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stall_s = math.inf

    def send_400_response(self, msg: str) -> None:
        self._refuse(ApiError(400, f"not a valid HTTP request: {msg}", code="invalid_http"))

    def _unsupported_upgrade_warning(self) -> None:
        """The parser has stopped, which is what it does after an offer in a pipelined request."""
        self.send_400_response("nothing can follow the offer of another protocol")

    def check_deadlines(self, now_s: float) -> None:
        """Close the connection if its client has been too slow."""
        if self.transport.is_closing():
            return
        if now_s > self._stall_s:
            self._check_stall(now_s)
        if self._is_refused:
            return
        if self.pipeline and _has_hung_up(self.transport.get_extra_info("socket").fileno()):
            self.transport.abort()  # we do not read on, so nobody else would notice
            return
        if self.pipeline or (self._is_in_header and self._is_answering):
            # An earlier request is being answered: until then it is we who do not read on.
            self._deadline_s = max(self._deadline_s, now_s + self.header_timeout_s)
            return
        slack_s = 0 if self._is_in_header else self._num_body_bytes / self.min_body_bytes_per_s
        if now_s > self._deadline_s + slack_s:
            if self._is_in_header and not self._num_header_bytes:
                self.transport.close()  # connected and said nothing: there is nothing to answer
            else:
                self._refuse(ApiError(408, "the request took too long", code="request_timeout"))

    @property
    def waits_since_s(self) -> float | None:
        """Since when it is the client's turn: it is silent, or has sent a part of a request."""
        is_waiting = not self._is_in_header or not self._is_answering
        return self._waits_since_s if is_waiting and not self.transport.is_closing() else None

    def _check_stall(self, now_s: float) -> None:
        num_unsent_bytes = self.transport.get_write_buffer_size()
        if num_unsent_bytes < self._num_unsent_bytes:
            self._num_unsent_bytes = num_unsent_bytes
            self._stall_s = now_s + self.stall_timeout_s
        else:
            self.transport.abort()

    @property
    def _is_answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _has_too_much_header(self) -> bool:
        if self._is_in_header:
            return self._num_header_bytes > self.max_header_bytes
        allowed = self.max_header_bytes + self.max_framing_per_body_byte * self._num_body_bytes
        return self._num_wire_bytes > allowed

    def _refuse_large_header(self) -> None:
        message = (
            f"the request has more than {self.max_header_bytes} bytes or "
            f"{self.max_num_headers} lines of headers"
        )
        self._refuse(ApiError(431, message, code="headers_too_large"))

    def _refuse(self, error: ApiError) -> None:
        """Read no further; close after an answer that tells why, where one is still due."""
        if self._is_refused or self.transport.is_closing():
            return
        self._is_refused = True
        if self._is_in_header:
            if self._is_answering:
                self.cycle.keep_alive = False  # an earlier request gets its answer first
            else:
                self._answer_and_close(error)
        elif self.pipeline or self.cycle.response_started:
            self.transport.close()
        else:
            self._answer_and_close(error)
            self.cycle.disconnected = True  # its handler still waits for the body
            self.cycle.message_event.set()

    def _answer_and_close(self, error: ApiError) -> None:
        body = error.body()
        head = b"HTTP/1.1 %d %s\r\n" % (error.status, REASONS[error.status])
        fields = b"content-type: application/json\r\nx-content-type-options: nosniff\r\n"
        fields += b"content-length: %d\r\n" % len(body)
        self.transport.write(head + fields + b"connection: close\r\n\r\n" + body)
        self.transport.write_eof()
        # Closing with bytes unread resets the connection and may overtake the answer.
        self.loop.call_later(self.linger_s, self.transport.close)


def sweep(connections: Iterable[object], now_s: float) -> None:
    """Check every connection. `now_s` is loop.time()."""
    for connection in list(connections):
        if isinstance(connection, GuardedHttp):
            connection.check_deadlines(now_s)


def max_num_connections() -> int:
    """What the process may have open, less what it needs itself. More could not be accepted."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MAX_NUM_CONNECTIONS if soft < 0 else min(MAX_NUM_CONNECTIONS, soft - NUM_OWN_FILES)


def make_room(connections: Collection[object], most: int) -> list[GuardedHttp]:
    """Close those above `most` whose clients have been silent for the longest time."""
    waiting = [
        (connection.waits_since_s, number, connection)
        for number, connection in enumerate(connections)
        if isinstance(connection, GuardedHttp) and connection.waits_since_s is not None
    ]
    closed = [connection for _, _, connection in nsmallest(len(connections) - most, waiting)]
    for connection in closed:
        connection.transport.close()
    return closed


def _without_upgrade(data: bytes) -> bytes:
    """A client may offer to go on in another protocol, as Java's does, and is answered in this one.

    The parser would stop there instead, and the body be lost.
    """
    head, end, rest = data.partition(b"\r\n\r\n")
    return UPGRADE.sub(b"\nignored:", head) + end + rest if UPGRADE.search(head) else data


def _has_hung_up(file: int) -> bool:
    """The other side has closed, even if there is something to be read before that."""
    poll = select.poll()
    poll.register(file, HANG_UP)
    return bool(poll.poll(0))
