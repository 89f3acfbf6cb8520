"""What one connection may cost: header, deadlines, stalls; and that honest ones pass."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import socket
import time
from pathlib import Path

from tests.api.harness import (
    FastGuard,
    Running,
    chat_body,
    eventually,
    parse_reply,
    request_bytes,
    running,
)
from tests.api.scripted import recited

HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: t\r\nContent-Type: application/json\r\n"
BODY = json.dumps(chat_body()).encode()


async def test_large_header_is_431(tmp_path: Path):
    async with running(tmp_path, http=FastGuard) as server:
        one = await server.raw(b"GET / HTTP/1.1\r\nx: " + b"a" * 10_000 + b"\r\n\r\n")
        many = await server.raw(b"GET / HTTP/1.1\r\n" + b"x: a\r\n" * 129 + b"\r\n")
        endless = await server.raw(b"GET / HTTP/1.1\r\nx: " + b"a" * 500_000)
        long_url = await server.raw(b"GET /" + b"a" * 10_000 + b" HTTP/1.1\r\n\r\n")
        fits = await server.raw(
            b"GET / HTTP/1.1\r\nConnection: close\r\n" + b"x: a\r\n" * 126 + b"\r\n"
        )
    for answer in (one, many, endless, long_url):
        assert answer.startswith(b"HTTP/1.1 431 Request Header Fields Too Large\r\n")
        assert parse_reply(answer).error["code"] == "headers_too_large"
    assert fits.startswith(b"HTTP/1.1 200 ")


async def test_endless_trailers_are_431(tmp_path: Path):
    head = b"POST /v1/completions HTTP/1.1\r\nHost: t\r\nTransfer-Encoding: chunked\r\n\r\n"
    async with running(tmp_path, http=FastGuard) as server:
        answer = await server.raw(head + b"1\r\nx\r\n0\r\n" + b"t: x\r\n" * 100_000)
    assert b" 431 " in answer.partition(b"\r\n")[0]


async def test_slow_header_is_408_and_silence_is_closed(tmp_path: Path):
    async with running(tmp_path, http=FastGuard) as server:
        slow = await server.raw(b"GET / HT")
        silent = await server.raw(b"")
    assert parse_reply(slow).error["code"] == "request_timeout"
    assert silent == b""


async def test_dripped_header_does_not_extend_the_deadline(tmp_path: Path):
    async with running(tmp_path, http=FastGuard) as server:
        reader, writer = await server.open()
        answer = asyncio.create_task(reader.read())
        writer.write(b"GET / HTTP/1.1\r\n")
        for number in range(40):
            if answer.done():
                break
            writer.write(b"x%d: y\r\n" % number)
            await asyncio.sleep(0.05)
        assert answer.done(), "still open after 2 s of a deadline of 0.4 s"
        assert b" 408 " in answer.result()
        writer.close()


async def test_half_sent_body_is_408(tmp_path: Path):
    async with running(tmp_path, http=FastGuard) as server:
        answer = await server.raw(HEAD + b"Content-Length: 100\r\n\r\n{")
        assert (await server.chat()).status == 200
    assert b" 408 " in answer.partition(b"\r\n")[0]


async def test_steady_upload_may_take_longer_than_the_grace(tmp_path: Path):
    """40 kB at about 40 kB/s: more than the lowest rate, though slower than the grace alone."""
    body = BODY.ljust(40_000)
    async with running(tmp_path, http=FastGuard) as server:
        reader, writer = await server.open()
        writer.write(HEAD + b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(body))
        for start in range(0, len(body), 2000):
            writer.write(body[start : start + 2000])
            await asyncio.sleep(0.05)
        answer = await reader.read()
        writer.close()
    assert answer.startswith(b"HTTP/1.1 200 ")


async def test_idle_connection_between_two_requests_is_kept(tmp_path: Path):
    async with running(tmp_path, http=FastGuard) as server:
        reader, writer = await server.open()
        for _ in range(2):
            writer.write(b"GET /health/live HTTP/1.1\r\nHost: t\r\n\r\n")
            await reader.readuntil(b"}")
            await asyncio.sleep(0.8)
        writer.close()


async def test_long_answer_is_not_cut_by_any_deadline(tmp_path: Path):
    """Even with stray bytes behind the request, as some clients send them."""
    async with running(tmp_path, http=FastGuard, delay_s=0.05) as server:
        body = json.dumps(chat_body(stream=True, max_tokens=30)).encode()
        reader, writer = await server.open()
        writer.write(HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        await reader.readuntil(b"data: ")
        writer.write(b"\r\n")
        async with asyncio.timeout(10):
            assert (await reader.readuntil(b"[DONE]")).count(b"data: ") > 30
        writer.close()


async def test_pipelined_requests_are_answered_in_order(tmp_path: Path):
    sent = HEAD + b"Content-Length: %d\r\n\r\n" % len(BODY) + BODY
    last = request_bytes("GET", "/health/live")
    async with running(tmp_path, http=FastGuard, delay_s=0.1) as server:
        answer = await server.raw(sent * 3 + last)
    assert answer.count(b"HTTP/1.1 200 OK") == 4
    assert answer.count(b'"object":"chat.completion"') == 3
    assert answer.endswith(b'{"status":"ok"}')


async def test_pipelined_upload_has_time_until_the_answer_before_it_is_out(tmp_path: Path):
    sent = HEAD + b"Content-Length: %d\r\n\r\n" % len(BODY) + BODY
    async with running(tmp_path, http=FastGuard, delay_s=0.2) as server:
        reader, writer = await server.open()
        writer.write(sent + sent[:-5])
        async with asyncio.timeout(10):
            await reader.readuntil(b'"reasoning_tokens":0}}}')
            writer.write(sent[-5:])
            assert b" 200 OK" in await reader.readuntil(b'"reasoning_tokens":0}}}')
        writer.close()


async def test_rubbish_behind_a_request_does_not_cost_its_answer(tmp_path: Path):
    sent = HEAD + b"Content-Length: %d\r\n\r\n" % len(BODY) + BODY
    async with running(tmp_path, http=FastGuard, delay_s=0.02) as server:
        answer = await server.raw(sent + b"\x00rubbish\r\n\r\n")
    assert answer.count(b"HTTP/1.1 ") == 1
    assert parse_reply(answer).json()["object"] == "chat.completion"


async def test_rubbish_in_a_body_ends_its_request(tmp_path: Path, caplog):
    caplog.set_level("INFO", "api.access")
    head = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
    async with running(tmp_path, http=FastGuard) as server:
        answer = await server.raw(head + b"1\r\nx\r\nzz\r\n")
        await eventually(lambda: caplog.records)
    assert parse_reply(answer).error["code"] == "invalid_http"
    assert [record.name for record in caplog.records if record.levelname == "ERROR"] == []


async def test_mutated_requests_crash_nothing(tmp_path: Path, caplog):
    """Bytes changed, lost and added at random: an answer or a closed connection, no traceback."""
    draw = random.Random(7)
    sent = request_bytes("POST", "/v1/chat/completions", chat_body(stream=True))
    async with running(tmp_path, http=FastGuard) as server:
        for _ in range(400):
            await send_and_leave(server, mutated(sent, draw))
        await eventually(lambda: server.snapshot().num_free_slots == 8)
        assert (await server.chat()).status == 200
    assert [record.getMessage() for record in caplog.records if record.levelname == "ERROR"] == []


def mutated(sent: bytes, draw: random.Random) -> bytes:
    data = bytearray(sent)
    for _ in range(draw.randint(1, 6)):
        start, length = draw.randrange(len(data)), draw.randint(1, 20)
        kind = draw.choice(("change", "lose", "add"))
        if kind == "change":
            data[start] = draw.randrange(256)
        elif kind == "lose":
            del data[start : start + length]
        else:
            data[start:start] = draw.randbytes(length)
    return bytes(data)


async def send_and_leave(server: Running, data: bytes) -> None:
    reader, writer = await server.open()
    writer.write(data)
    writer.write_eof()
    with contextlib.suppress(ConnectionError, TimeoutError):
        async with asyncio.timeout(2):
            await reader.read()
    writer.close()


async def test_refusal_reaches_a_client_that_sends_before_it_reads(tmp_path: Path):
    def send_all_then_read(port: int) -> bytes:
        with socket.create_connection(("127.0.0.1", port)) as sock:
            sock.sendall(b"GET / HTTP/1.1\r\nx: ")
            for _ in range(20):
                sock.sendall(b"a" * 10_000)
                time.sleep(0.01)
            return _read_all(sock)

    async with running(tmp_path, http=FastGuard) as server:
        answer = await asyncio.to_thread(send_all_then_read, server.port)
    assert parse_reply(answer).status == 431


async def test_reader_that_never_reads_is_cut_off(tmp_path: Path):
    async with running(tmp_path, http=FastGuard) as server:
        sock = _deaf_socket(server.port)
        body = json.dumps(chat_body(stream=True, max_tokens=200_000)).encode()
        sock.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        await eventually(lambda: server.snapshot().num_running == 1)
        await eventually(lambda: server.snapshot().num_running == 0, timeout_s=20)
        sock.close()


async def test_slow_reader_neither_slows_others_nor_grows_memory(tmp_path: Path):
    async with running(tmp_path) as server:
        sock = _deaf_socket(server.port)
        num_tokens = 15_000  # more than kernel buffers hold
        body = {"model": "m", "prompt": "", "stream": True, "max_tokens": num_tokens}
        sock.sendall(request_bytes("POST", "/v1/completions", body))
        await eventually(lambda: server.snapshot().num_running == 1)
        replies = await asyncio.gather(*(server.chat(max_tokens=50) for _ in range(8)))
        assert [reply.status for reply in replies] == [200] * 8
        await eventually(lambda: server.snapshot().num_running == 0, timeout_s=30)
        (connection,) = server.server.server_state.connections
        assert connection.transport.get_write_buffer_size() < 300_000
        answer = await asyncio.to_thread(_read_all, sock)
    reply = parse_reply(answer)
    *middle, last = reply.events()
    assert "".join(event["choices"][0]["text"] for event in middle) == recited(1, num_tokens)
    assert len(middle) < num_tokens, "what the reader missed came merged"
    assert last["choices"][0]["finish_reason"] == "length"


def _deaf_socket(port: int) -> socket.socket:
    """A client with small kernel buffers, so that not reading is felt soon."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.connect(("127.0.0.1", port))
    return sock


def _read_all(sock: socket.socket) -> bytes:
    sock.settimeout(20)
    parts = []
    while part := sock.recv(65536):
        parts.append(part)
    sock.close()
    return b"".join(parts)
