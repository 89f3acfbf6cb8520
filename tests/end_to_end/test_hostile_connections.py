"""Clients that send slowly, read slowly or not at all, leave, or speak no HTTP."""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from tests.api.harness import parse_reply, request_bytes
from tests.end_to_end.hostile import (
    PROTOCOLS,
    Protocol,
    deaf_socket,
    eventually,
    is_idle,
    num_files,
    report,
    unharmed,
)
from tests.end_to_end.process import read_all
from tests.end_to_end.site import STORY, Server, Site

EACH_PROTOCOL = pytest.mark.parametrize("protocol", PROTOCOLS.values(), ids=PROTOCOLS)
RESET = struct.pack("ii", 1, 0)  # close with RST instead of FIN
HEALTH = b"GET /health/live HTTP/1.1\r\nHost: t\r\n\r\n"
POST = b"POST /v1/completions HTTP/1.1\r\nHost: t\r\nContent-Type: application/json\r\n"
HTTP2_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
LAST_CHUNK = b"0\r\n\r\n"
TLS_HELLO = bytes.fromhex("1603010200010001fc0303") + bytes(200)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    site = Site(tmp_path_factory.mktemp("hostile"), model={})
    with site.serving(module="tests.end_to_end.impatient") as running:
        yield running


def wait_running(server: Server, count: int, timeout_s: float = 20.0) -> None:
    eventually(lambda: report(server)["running"] == count, timeout_s)


def test_reader_that_stops_for_ever_is_cut_off_and_a_slow_one_is_not(server: Server):
    with unharmed(server), ExitStack() as stack:
        slow = stack.enter_context(deaf_socket(server))
        slow.sendall(PROTOCOLS["completions"].endless(stream=True))
        deaf = [stack.enter_context(deaf_socket(server)) for _ in PROTOCOLS]
        for sock, protocol in zip(deaf, PROTOCOLS.values(), strict=True):
            sock.sendall(protocol.endless(stream=True))
        wait_running(server, 1 + len(PROTOCOLS))
        deadline_s = time.monotonic() + 60
        while report(server)["running"] > 1:
            assert time.monotonic() < deadline_s, "those who never read still run"
            assert slow.recv(2000), "the slow reader was cut off"
            time.sleep(0.05)
        assert slow.recv(2000)
        for sock in deaf:
            sock.settimeout(20)
            assert not read_all(sock).endswith(LAST_CHUNK), (
                "what the kernel held is no whole answer"
            )
        assert report(server)["running"] == 1


@EACH_PROTOCOL
@pytest.mark.parametrize("is_stream", [True, False])
def test_who_closes_one_direction_or_both_ends_the_request(
    server: Server, protocol: Protocol, is_stream: bool
):
    """Half-closed, closed and reset, while the answer is under way."""
    with unharmed(server), ExitStack() as stack:
        socks = [stack.enter_context(server.process.connect()) for _ in range(3)]
        half, closed, reset = socks
        for sock in socks:
            sock.sendall(protocol.endless(stream=is_stream))
        wait_running(server, 3)
        if is_stream:
            for sock in socks:
                assert sock.recv(100).startswith(b"HTTP/1.1 200 ")
        half.shutdown(socket.SHUT_WR)
        assert b"[DONE]" not in read_all(half)
        closed.close()
        reset.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        reset.close()


@EACH_PROTOCOL
def test_who_leaves_before_the_first_byte_ends_the_request(server: Server, protocol: Protocol):
    """While it waits for a seat, and while a long prompt is computed."""
    with unharmed(server), ExitStack() as stack:
        num_seats = report(server)["max_batch_size"]
        for _ in range(num_seats + 4):
            sock = stack.enter_context(server.process.connect())
            sock.sendall(protocol.endless(STORY * 300, stream=True))
        eventually(lambda: report(server)["waiting"] >= 4)


def test_client_that_leaves_between_turns_of_a_connection_costs_nothing(server: Server):
    body = request_bytes("POST", "/v1/completions", PROTOCOLS["completions"].body("Once", 3))
    asked = body.replace(b"Connection: close\r\n", b"")
    with unharmed(server):
        for ending in (b"", b"POST /v1/comp", POST + b"Content-Length: 10\r\n\r\n{"):
            with server.process.connect() as sock:
                sock.sendall(asked)
                read_until(sock, b"}}}")
                sock.sendall(ending)


def test_pipelined_requests_are_answered_in_order_and_die_with_their_connection(server: Server):
    with unharmed(server):
        answer = server.process.raw(HEALTH * 20 + request_bytes("GET", "/version"))
        assert answer.count(b"HTTP/1.1 200 OK") == 21
        assert answer.rpartition(b"\r\n\r\n")[2].startswith(b'{"version"')
        with server.process.connect() as sock:
            sent = PROTOCOLS["chat"].endless().replace(b"Connection: close\r\n", b"")
            sock.sendall(sent * 5 + SMUGGLED)
            wait_running(server, 1)
            time.sleep(0.3)
            assert report(server)["running"] == 1, "the next one begins when the first is answered"


def test_drips_are_cut_off_and_others_are_served(server: Server):
    """Headers and bodies, a byte at a time, on fifty connections each."""
    header = b"POST /v1/chat/completions HTTP/1.1\r\nx-drip: "
    body = POST + b"Content-Length: 1000\r\n\r\n"
    with unharmed(server), ExitStack() as stack:
        drips = []
        for begin in [header, body] * 50:
            sock = stack.enter_context(server.process.connect())
            sock.sendall(begin)
            sock.setblocking(False)
            drips.append(sock)
        answers: dict[socket.socket, bytes] = {}
        deadline_s = time.monotonic() + 30
        while len(answers) < len(drips):
            assert time.monotonic() < deadline_s, f"only {len(answers)} were cut off"
            for sock in drips:
                if sock not in answers and (answer := drip(sock)):
                    answers[sock] = answer
            server.get("/health")
            time.sleep(0.2)
        assert all(b" 408 " in answer.partition(b"\r\n")[0] for answer in answers.values())


def drip(sock: socket.socket) -> bytes:
    """Send one more byte. Returns what has come back."""
    try:
        sock.send(b"x")
        return sock.recv(65536)
    except BlockingIOError:
        return b""


SMUGGLED = b"GET /smuggled HTTP/1.1\r\nHost: t\r\n\r\n"
MALFORMED = {
    "two lengths": POST + b"Content-Length: 2\r\nContent-Length: 30\r\n\r\n{}" + SMUGGLED,
    "length and chunked": POST
    + b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
    + SMUGGLED,
    "chunked and length": POST
    + b"Transfer-Encoding: chunked\r\nContent-Length: 2\r\n\r\n0\r\n\r\n"
    + SMUGGLED,
    "unknown coding": POST + b"Transfer-Encoding: chunked, gzip\r\n\r\n0\r\n\r\n" + SMUGGLED,
    "hidden coding": POST + b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n" + SMUGGLED,
    "negative length": POST + b"Content-Length: -1\r\n\r\n" + SMUGGLED,
    "signed length": POST + b"Content-Length: +2\r\n\r\n{}" + SMUGGLED,
    "length is no number": POST + b"Content-Length: 2x\r\n\r\n{}" + SMUGGLED,
    "length of 30 digits": POST + b"Content-Length: " + b"9" * 30 + b"\r\n\r\n{}",
    "chunk is no number": POST + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n0\r\n\r\n",
    "chunk of 30 digits": POST + b"Transfer-Encoding: chunked\r\n\r\n" + b"f" * 30 + b"\r\n{}",
    "chunk without end": POST + b"Transfer-Encoding: chunked\r\n\r\n1\r\nxx\r\n0\r\n\r\n",
    "space before colon": b"GET / HTTP/1.1\r\nHost : t\r\n\r\n",
    "folded header": b"GET /version HTTP/1.1\r\nx: a\r\n\x00b\r\n\r\n",
    "NUL in a header": b"GET /version HTTP/1.1\r\nx: a\x00b\r\n\r\n",
    "no method": b" / HTTP/1.1\r\n\r\n",
    "unknown method": b"FROB / HTTP/1.1\r\n\r\n",
    "wrong version": b"GET /version HTTP/9.9\r\n\r\n",
    "CONNECT": b"CONNECT example.com:443 HTTP/1.1\r\nHost: example.com\r\n\r\n" + SMUGGLED,
    "HTTP/2": HTTP2_PREFACE,
    "TLS": TLS_HELLO,
    "garbage": bytes(range(256)) * 40,
}


@pytest.mark.parametrize("sent", MALFORMED.values(), ids=MALFORMED)
def test_what_is_no_http_is_400_and_closed(server: Server, sent: bytes):
    """Nothing behind it is taken for a request."""
    answer = server.process.raw(sent)
    reply = parse_reply(answer)
    assert (reply.status, reply.error["code"]) == (400, "invalid_http"), reply
    assert reply.headers["connection"] == "close"
    assert answer.count(b"HTTP/1.1") == 1


def test_after_what_is_no_http_nothing_is_lost(server: Server):
    with unharmed(server):
        for sent in MALFORMED.values():
            server.process.raw(sent)


def test_absurd_length_is_413_at_once(server: Server):
    reply = parse_reply(server.process.raw(POST + b"Content-Length: 9223372036854775807\r\n\r\n"))
    assert (reply.status, reply.error["code"]) == (413, "request_too_large")


def test_expecting_client_is_told_to_go_on_or_why_not(server: Server):
    body = b'{"model": "rwkv-lm-tiny", "prompt": "Once", "max_tokens": 1}'
    head = POST + b"Connection: close\r\nExpect: 100-continue\r\nContent-Length: %d\r\n\r\n"
    with unharmed(server), server.process.connect() as sock:
        sock.sendall(head % len(body))
        assert sock.recv(1000) == b"HTTP/1.1 100 Continue\r\n\r\n"
        sock.sendall(body)
        assert parse_reply(read_all(sock)).status == 200
    too_large = parse_reply(server.process.raw(head % 10**9))
    assert too_large.status == 413, "without reading a byte of the body"


@pytest.mark.parametrize("protocol", [b"h2c", b"websocket"])
def test_offer_of_another_protocol_is_ignored(server: Server, protocol: bytes):
    """The body is read, and so is the next request; behind a pipelined one nothing is."""
    sent = request_bytes("POST", "/v1/completions", PROTOCOLS["completions"].body("Once", 2))
    offer = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: %b\r\n" % protocol
    offering = sent.replace(b"Connection: close\r\n", offer)
    with unharmed(server), server.process.connect() as sock:
        for _ in range(2):
            sock.sendall(offering)
            assert b'"text_completion"' in read_until(sock, b"}}}")
        sock.sendall(offering * 2 + SMUGGLED)
        answer = read_all(sock)
        assert answer.count(b'"text_completion"') == 1
        assert b"/smuggled" not in answer


def read_until(sock: socket.socket, end: bytes) -> bytes:
    data = b""
    while not data.endswith(end):
        part = sock.recv(65536)
        assert part, f"closed after {data!r}"
        data += part
    return data


def test_http_1_0_is_answered_and_closed(server: Server):
    for version in (b"", b" HTTP/1.0"):
        assert b" 200 OK\r\n" in server.process.raw(b"GET /version%b\r\n\r\n" % version)
    stream = PROTOCOLS["completions"].body("Once", 3, stream=True)
    sent = request_bytes("POST", "/v1/completions", stream).replace(b"HTTP/1.1", b"HTTP/1.0")
    answer = server.process.raw(sent.replace(b"Connection: close\r\n", b""))
    assert b" 200 OK\r\n" in answer
    assert b"data: [DONE]\n\n" in answer


def test_idle_connections_make_way_where_files_are_few(tmp_path_factory: pytest.TempPathFactory):
    """A thousand silent clients of a server that may open 300 files: others are still served."""
    site = Site(tmp_path_factory.mktemp("few"), model={})
    with site.serving(max_open_files=300) as server, ExitStack() as stack:
        with unharmed(server):
            kept = stack.enter_context(server.process.connect())
            kept.sendall(PROTOCOLS["chat"].endless(stream=True))
            wait_running(server, 1)
            socks = []
            for number in range(1000):
                socks.append(stack.enter_context(server.process.connect()))
                if number % 100 == 99:
                    assert num_files(server) < 300
                    assert server.ask("GET", "/version").status == 200
            assert report(server)["running"] == 1, "who is being answered stays"
            for sock in [kept, *socks]:
                sock.close()
        assert is_idle(server)


@pytest.mark.slow
def test_documented_seconds_are_those_of_the_server(tmp_path_factory: pytest.TempPathFactory):
    """10 s for a header, 30 s for a body without one, and 30 s for a reader that has stopped."""
    site = Site(tmp_path_factory.mktemp("patient"), model={})
    with site.serving() as server, ExitStack() as stack, unharmed(server):
        sent = {
            "silence": (b"", 10),
            "header": (b"GET / HT", 10),
            "body": (POST + b"Content-Length: 9\r\n\r\n{", 30),
        }
        started_s = time.monotonic()
        socks = {}
        for name, (begin, _) in sent.items():
            socks[name] = stack.enter_context(server.process.connect())
            socks[name].settimeout(60)
            socks[name].sendall(begin)
        deaf = stack.enter_context(deaf_socket(server))
        deaf.sendall(PROTOCOLS["chat"].endless(stream=True))
        for name, (_, limit_s) in sent.items():
            read_all(socks[name])
            elapsed_s = time.monotonic() - started_s
            assert limit_s - 1 < elapsed_s < limit_s + 10, (name, elapsed_s)
        wait_running(server, 0, timeout_s=60)
        assert time.monotonic() - started_s > 30
