"""What the tests of rwkv-rs's bugs need: engines with one seat, guests, clients that are slow."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from api.server import opened
from api.source import ConfigSource
from engine.client import RequestStream
from engine.core import EngineCore
from engine.grammar_text import regex
from engine.types import EngineRequest, OutputDelta, SamplingParams
from tests.api.harness import Reply, Running, eventually
from tests.engine import real_engines
from tests.engine.real_engines import real_table, text_ids

MODEL = "embedded-float64"  # exact: equal work gives equal bits
PROMPT = text_ids(MODEL, 40)
FREE = SamplingParams(seed=11, max_tokens=12, stop_token_ids=(), has_logprobs=True)
AB = replace(FREE, grammar=regex("[ab]{1,200}"), stop_token_ids=(0,), max_tokens=200)


def is_held_up(server: Running) -> bool:
    connections = list(server.server.server_state.connections)
    return any(connection.flow.write_paused for connection in connections)  # type: ignore[union-attr]


def read_slowly(sock: socket.socket) -> bytes:
    """Until the last event; the chunks' sizes are lines of their own."""
    sock.settimeout(30)
    data = b""
    while b"data: [DONE]" not in data[-200:]:
        part = sock.recv(1 << 16)
        assert part, "closed before the end"
        data += part
    head, _, body = data.partition(b"\r\n\r\n")
    assert b" 200 " in head.split(b"\r\n")[0]
    whole = b""
    while body:
        size, _, rest = body.partition(b"\r\n")
        whole, body = whole + rest[: int(size, 16)], rest[int(size, 16) + 2 :]
        if b"data: [DONE]" in whole[-50:]:
            break
    return whole


@asynccontextmanager
async def started_again(source: ConfigSource, builder: Any) -> AsyncIterator[Running]:
    """Another server from the same file."""
    async with opened(source.load(), source, builder) as (service, server):
        listening = asyncio.Event()
        task = asyncio.create_task(server.run_until_stopped(listening.set))
        await listening.wait()
        try:
            yield Running(service, server, builder, source)
        finally:
            server.should_exit = True
            await task


def num_inside(server: Running) -> int:
    snapshot = server.snapshot()
    number: int = snapshot.num_running + snapshot.num_waiting
    return number


def finish_reason(reply: Reply) -> str:
    assert reply.status == 200, reply
    reason: str = reply.json()["choices"][0]["finish_reason"]
    return reason


@asynccontextmanager
async def only_seat(folder: Path, **keys: object) -> AsyncIterator[EngineCore]:
    """An engine in which everybody gets the same seat and the same slot, and nothing is cached."""
    one: dict[str, object] = {"max_batch_size": 1, "num_state_slots": 1, "host_state_mib": 0}
    table = real_table(MODEL, folder, enable_prefix_cache=False, **(one | keys))
    async with real_engines.opened(table) as core:
        yield core


def ids_of(core: EngineCore, *pieces: bytes) -> list[int]:
    found = [core.tokenizer.token_id(piece) for piece in pieces]
    return [token_id for token_id in found if token_id is not None]


def assert_same(answer: OutputDelta, expected: OutputDelta) -> None:
    """To the bit: there is nothing else in the batch."""
    assert answer.error is None
    assert answer.token_ids == expected.token_ids
    assert answer.logprobs == expected.logprobs


def guests(core: EngineCore) -> dict[str, SamplingParams]:
    """Requests that leave as much behind as they can."""
    common = ids_of(core, b" ", b"e", b"a", b"the", b" the", b".", b"\n")
    return {
        "penalties": replace(FREE, presence_penalty=9.0, repetition_penalty=3.0),
        "bias": replace(FREE, logit_bias=tuple((token_id, 50.0) for token_id in common)),
        "allowed": replace(FREE, allowed_token_ids=tuple(common)),
        "banned": replace(FREE, bad_words=("a", "e", "th"), banned_token_ids=tuple(common)),
        "min_tokens": replace(FREE, min_tokens=12, stop_token_ids=(0, *common)),
        "grammar": replace(AB, has_logprobs=False),
        "greedy": replace(FREE, temperature=0.0, seed=0),
        "limits": replace(FREE, top_k=2, top_p=0.3, min_p=0.2, temperature=5.0),
        "stop": replace(FREE, stop=("e", "a", " ")),
    }


async def finishes(core: EngineCore, asked: EngineRequest) -> None:
    await core.submit(asked).collect()


async def is_aborted(core: EngineCore, asked: EngineRequest) -> None:
    stream: RequestStream = core.submit(asked)
    await anext(stream)
    stream.close()


async def never_answers(core: EngineCore, asked: EngineRequest) -> None:
    """It leaves while its prompt is computed."""
    stream = core.submit(asked)
    await eventually(lambda: core.snapshot().num_running == 1)
    stream.close()
