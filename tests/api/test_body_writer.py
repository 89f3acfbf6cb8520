"""Pieces that go past the application, through real sockets: fewer wake-ups, the same bytes."""

from __future__ import annotations

import asyncio
import json
import socket
from pathlib import Path

import pytest
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

from api.body_writer import BodyWriter
from tests.api.harness import Running, chat_body, eventually, parse_reply, request_bytes, running
from tests.api.scripted import recited

NUM_TOKENS = 60


@pytest.fixture
def num_sends(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How often anybody has sent through ASGI."""
    counted, send = [0], RequestResponseCycle.send

    async def counting(cycle: RequestResponseCycle, message: object) -> None:
        counted[0] += 1
        await send(cycle, message)

    monkeypatch.setattr(RequestResponseCycle, "send", counting)
    return counted


async def complete(server: Running, **fields: object):
    body = {"model": "m", "prompt": "hi", "max_tokens": NUM_TOKENS, "stream": True, **fields}
    return await server.post("/v1/completions", body)


async def test_tokens_wake_no_task(tmp_path: Path, num_sends: list[int]):
    """Head, last piece and end are sent; what is between them is written."""
    async with running(tmp_path, delay_s=0.001) as server:
        reply = await complete(server)
        assert num_sends[0] <= 5
        texts = [event["choices"][0]["text"] for event in reply.events()]
        assert "".join(texts) == recited(3, NUM_TOKENS)
        assert len(texts) > NUM_TOKENS // 2, "several pieces"


async def test_body_is_the_same_without_the_writer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_sends: list[int]
):
    async with running(tmp_path, delay_s=0.001) as server:
        written = await complete(server, n=2, seed=3)
        monkeypatch.setattr(BodyWriter, "write", lambda *_: False)
        num_sends[0] = 0
        sent = await complete(server, n=2, seed=3)
        assert num_sends[0] > NUM_TOKENS // 2

    def texts(reply):
        choices = [choice for event in reply.events() for choice in event["choices"]]
        return ["".join(c["text"] for c in choices if c["index"] == i) for i in range(2)]

    assert texts(written) == texts(sent)


async def test_slow_reader_costs_no_memory_and_gets_everything(tmp_path: Path):
    """While its connection takes nothing the text waits in the engine's mailbox, as text."""
    num_tokens = 2000
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        async with running(tmp_path, delay_s=0.0001) as server:
            sock.setblocking(False)
            await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", server.port))
            await eventually(lambda: server.server.server_state.connections)
            (connection,) = server.server.server_state.connections
            raw = connection.transport.get_extra_info("socket")
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
            reader, writer = await asyncio.open_connection(sock=sock, limit=1024)
            body = chat_body(stream=True, max_tokens=num_tokens, temperature=0, logprobs=True)
            writer.write(request_bytes("POST", "/v1/chat/completions", body))
            await eventually(lambda: connection.flow.write_paused)
            await eventually(lambda: server.snapshot().num_running == 0, timeout_s=60)
            _, high_water = connection.transport.get_write_buffer_limits()
            assert connection.transport.get_write_buffer_size() < 4 * high_water
            reply = parse_reply(await reader.read())
            writer.close()
    choices = [choice for event in reply.events() for choice in event["choices"]]
    contents = [choice["logprobs"]["content"] for choice in choices if choice["logprobs"]]
    assert sum(map(len, contents)) == num_tokens


async def test_reader_that_leaves_ends_what_is_written(tmp_path: Path):
    async with running(tmp_path, delay_s=0.001) as server:
        reader, writer = await server.open()
        writer.write(
            request_bytes(
                "POST", "/v1/chat/completions", chat_body(stream=True, max_tokens=100_000)
            )
        )
        await reader.readuntil(b'"content":"o')
        writer.transport.abort()
        await eventually(lambda: server.snapshot().num_running == 0)
        reply = await complete(server)
        assert json.loads(reply.body.split(b"data: ")[1])["object"] == "text_completion"
