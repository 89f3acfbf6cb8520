"""A client that goes away frees its slot at once; a server that goes down says so."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import struct
from pathlib import Path

import pytest

from api.lifetime import CLIENT_GONE
from api.server import drain, handle_signals
from tests.api.harness import Running, chat_body, eventually, model_table, request_bytes, running

WITHIN_S = 0.1  # what a client's leaving may cost


@pytest.mark.parametrize("is_stream", [True, False])
@pytest.mark.parametrize("how", ["close", "reset", "half-close"])
async def test_client_gone_frees_the_slot(tmp_path: Path, is_stream: bool, how: str):
    async with running(tmp_path, delay_s=0.01) as server:
        body = chat_body(stream=is_stream, max_tokens=100_000)
        reader, writer = await server.open()
        writer.write(request_bytes("POST", "/v1/chat/completions", body))
        if is_stream:
            await reader.readuntil(b'"content":"F')
        await eventually(lambda: server.snapshot().num_running == 1)
        leave(writer, how)
        left_s = await eventually(lambda: server.snapshot().num_free_slots == 8)
        writer.close()
        assert left_s < WITHIN_S
        assert (await server.chat()).status == 200


@pytest.mark.parametrize("is_stream", [True, False])
async def test_client_gone_in_silence_frees_the_slot(tmp_path: Path, is_stream: bool):
    """Before the first token, and while the device is stuck."""
    async with running(tmp_path) as server:
        server.runner.gate.clear()
        _, writer = await server.open()
        writer.write(request_bytes("POST", "/v1/chat/completions", chat_body(stream=is_stream)))
        await eventually(lambda: server.snapshot().num_running == 1)
        writer.close()
        assert await eventually(lambda: server.snapshot().num_free_slots == 8) < WITHIN_S


async def test_waiting_client_gone_leaves_the_queue(tmp_path: Path):
    async with running(tmp_path, model_table(max_batch_size=1)) as server:
        server.runner.gate.clear()
        first = asyncio.create_task(server.chat())
        await eventually(lambda: server.snapshot().num_running == 1)
        _, writer = await server.open()
        writer.write(request_bytes("POST", "/v1/chat/completions", chat_body()))
        await eventually(lambda: server.snapshot().num_waiting == 1)
        writer.close()
        assert await eventually(lambda: server.snapshot().num_waiting == 0) < WITHIN_S
        server.runner.gate.set()
        assert (await first).status == 200


async def test_client_blocked_in_reading_and_gone_frees_the_slot(tmp_path: Path):
    """The handler is suspended in a write then, not in waiting for a token."""
    async with running(tmp_path) as server:
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.connect(("127.0.0.1", server.port))
        body = {"model": "m", "prompt": "", "stream": True, "max_tokens": 1_000_000}
        sock.sendall(request_bytes("POST", "/v1/completions", body))
        await eventually(lambda: is_write_blocked(server), timeout_s=30)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        sock.close()
        assert await eventually(lambda: server.snapshot().num_free_slots == 8) < WITHIN_S


async def test_client_gone_while_its_prompt_is_encoded_never_reaches_the_engine(
    tmp_path: Path, monkeypatch
):
    entered, ended = asyncio.Event(), asyncio.Event()

    async def encode_for_ever(*_: object) -> tuple[int, ...]:
        entered.set()
        try:
            await asyncio.sleep(60)
        finally:
            ended.set()
        return (0,)

    monkeypatch.setattr("api.placement.encode", encode_for_ever)
    async with running(tmp_path) as server:
        _, writer = await server.open()
        writer.write(request_bytes("POST", "/v1/chat/completions", chat_body()))
        await entered.wait()
        writer.close()
        async with asyncio.timeout(WITHIN_S):
            await ended.wait()


async def test_client_gone_during_upload_is_forgotten(tmp_path: Path, caplog):
    caplog.set_level("INFO", "api.access")
    async with running(tmp_path) as server:
        _, writer = await server.open()
        writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: t\r\nContent-Length: 9\r\n\r\n{")
        await asyncio.sleep(0.05)
        writer.close()
        await eventually(lambda: caplog.records)
        assert (await server.chat()).status == 200
    assert f" {CLIENT_GONE} " in caplog.records[0].getMessage()


class TestDrain:
    async def test_running_requests_finish_and_new_ones_are_refused(self, tmp_path: Path):
        async with running(tmp_path, delay_s=0.01) as server:
            whole = asyncio.create_task(server.chat(max_tokens=30))
            stream = asyncio.create_task(server.chat(max_tokens=30, stream=True))
            await eventually(lambda: server.snapshot().num_running == 2)
            draining = begin_drain(server)
            refused = await server.chat()
            reload = await server.post("/admin/models/reload", {})
            live, ready = await server.get("/health/live"), await server.get("/health/ready")
            health = await server.get("/health")
            await draining
            assert (await whole).json()["choices"][0]["finish_reason"] == "length"
            assert (await stream).events()[-1]["choices"][0]["finish_reason"] == "length"
        assert (refused.status, refused.error["code"]) == (503, "draining")
        assert refused.headers["retry-after"] == "1"
        assert reload.status == 503
        assert (live.status, ready.status) == (200, 503)
        assert health.json()["status"] == "draining"

    async def test_too_long_requests_are_told_and_ended(self, tmp_path: Path):
        async with running(tmp_path, delay_s=0.01, drain_timeout_s=0.1) as server:
            whole = asyncio.create_task(server.chat(max_tokens=100_000))
            stream = asyncio.create_task(server.chat(max_tokens=100_000, stream=True))
            await eventually(lambda: server.snapshot().num_running == 2)
            await begin_drain(server)
            assert ((await whole).status, (await whole).error["code"]) == (503, "draining")
            assert (await stream).events()[-1]["error"]["code"] == "draining"

    async def test_signal_begins_the_drain(self, tmp_path: Path):
        async with running(tmp_path, delay_s=0.01) as server:
            with handle_signals(server.service, server.server):
                answer = asyncio.create_task(server.chat(max_tokens=20))
                await eventually(lambda: server.snapshot().num_running == 1)
                os.kill(os.getpid(), signal.SIGTERM)
                await eventually(lambda: server.service.is_draining)
                await eventually(lambda: server.server.should_exit)
                assert (await answer).status == 200


def begin_drain(server: Running) -> asyncio.Task[None]:
    server.service.is_draining = True
    return asyncio.create_task(drain(server.service, server.server))


def is_write_blocked(server: Running) -> bool:
    return any(
        connection.flow.write_paused for connection in server.server.server_state.connections
    )


def leave(writer: asyncio.StreamWriter, how: str) -> None:
    if how == "half-close":
        writer.write_eof()
        return
    if how == "reset":
        sock = writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.close()
