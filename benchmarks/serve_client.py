"""Many streams at once, read by a process that does as little as possible. Knows no server.

It runs on the cores of the server that it measures, so it parses nothing while tokens come: it
counts events by their first bytes, and looks at the clock once for all that came at a time.
"""

from __future__ import annotations

import json
import re
import selectors
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from types import TracebackType

EVENT = b"data: {"
SILENCE_S = 300.0  # a server that says nothing for so long has failed
PIECE_BYTES = 1 << 16
TAIL_BYTES = 4096  # of the end of an answer, where its usage is
COMPLETION_TOKENS = re.compile(rb'"completion_tokens":\s*(\d+)')


@dataclass(frozen=True, slots=True)
class Timing:
    """One answer. Seconds count from when the first of the requests was sent."""

    num_tokens: int  # as the server has counted them
    event_s: list[float]  # when each event came; those after the last token are left out


@dataclass(frozen=True, slots=True)
class Load:
    """What came of requests that were sent together."""

    timings: list[Timing]
    total_s: float  # until the last one was complete
    client_cpu_s: float


@dataclass(slots=True)
class _Stream:
    sock: socket.socket
    tail: bytes = b""
    times_s: list[float] = field(default_factory=list)

    def take(self, data: bytes, now_s: float) -> None:
        # A piece may end in the middle of a mark.
        num_events = (self.tail[1 - len(EVENT) :] + data).count(EVENT)
        self.times_s += [now_s] * num_events
        self.tail = (self.tail + data)[-TAIL_BYTES:]

    def timing(self, started_s: float) -> Timing:
        found = COMPLETION_TOKENS.search(self.tail)
        if found is None:
            raise SystemExit(f"no complete answer: {self.tail!r}")
        num_tokens = int(found[1])
        return Timing(num_tokens, [at_s - started_s for at_s in self.times_s[:num_tokens]])


def send_all(address: str, path: str, bodies: Sequence[str]) -> Load:
    """Send all requests at once, read until all are answered. Raises SystemExit if one is not."""
    host, _, port = address.rpartition(":")
    streams = [_Stream(socket.create_connection((host, int(port)))) for _ in bodies]
    selector = selectors.DefaultSelector()
    for stream in streams:
        selector.register(stream.sock, selectors.EVENT_READ, stream)
    requests = [_request(address, path, body) for body in bodies]
    cpu_s, started_s = time.process_time(), time.perf_counter()
    for stream, request in zip(streams, requests, strict=True):
        stream.sock.sendall(request)
    num_open = len(streams)
    while num_open:
        ready = selector.select(SILENCE_S)
        if not ready:
            raise SystemExit(f"{address} has said nothing for {SILENCE_S:.0f} s")
        now_s = time.perf_counter()
        for key, _ in ready:
            stream = key.data
            if data := stream.sock.recv(PIECE_BYTES):
                stream.take(data, now_s)
            else:
                selector.unregister(stream.sock)
                stream.sock.close()
                num_open -= 1
    total_s = time.perf_counter() - started_s
    used_s = time.process_time() - cpu_s
    selector.close()
    return Load([stream.timing(started_s) for stream in streams], total_s, used_s)


def _request(address: str, path: str, body: str) -> bytes:
    data = body.encode()
    head = (
        f"POST {path} HTTP/1.1\r\nHost: {address}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(data)}\r\nConnection: close\r\n\r\n"
    )
    return head.encode() + data


class Client:
    """The same in a process of its own. A context manager."""

    def __enter__(self) -> Client:
        command = [sys.executable, "-m", "benchmarks.serve_client"]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._process.communicate()

    def send_all(self, address: str, path: str, bodies: Sequence[str]) -> Load:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps([address, path, bodies]), file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        if not answer:
            raise SystemExit("the client failed")
        found = json.loads(answer)
        timings = [Timing(**timing) for timing in found.pop("timings")]
        return Load(timings, **found)


def main() -> None:
    for line in sys.stdin:
        print(json.dumps(asdict(send_all(*json.loads(line)))), flush=True)


if __name__ == "__main__":
    main()
