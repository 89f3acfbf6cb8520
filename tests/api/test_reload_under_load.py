"""Rebuilds while requests run, wait and arrive: every one gets its whole, right answer."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import api.placement
from tests.api.harness import Reply, Running, eventually, model_table, running
from tests.api.reloading import (
    by_rename,
    upsert,
)
from tests.api.scripted import recited


async def test_no_request_fails(tmp_path: Path):
    table = model_table(max_batch_size=2)
    async with running(tmp_path, table, delay_s=0.002) as server, load(server) as replies:
        for size in (3, 4, 2):
            await asyncio.sleep(0.15)
            reply = await upsert(server, {"model_name": "m", "max_batch_size": size})
            assert reply.status == 200
        await asyncio.sleep(0.15)
    assert len(replies) > 20
    assert len(server.builder.runners) == 4
    for num_prompt_tokens, reply in replies:
        assert reply.status == 200, reply.body
        choices = [event["choices"][0] for event in reply.events()]
        text = "".join(choice["text"] for choice in choices)
        assert text == recited(num_prompt_tokens, 25)
        assert choices[-1]["finish_reason"] == "length"


async def test_the_replaced_finishes_what_it_runs_and_passes_on_what_waits(tmp_path: Path):
    async with running(tmp_path, model_table(max_batch_size=1)) as server:
        old = server.runner
        old.gate.clear()
        first = asyncio.create_task(server.chat())
        await eventually(lambda: server.snapshot().num_running == 1)
        second = asyncio.create_task(server.chat())
        await eventually(lambda: server.snapshot().num_waiting == 1)
        await upsert(server, {"model_name": "m", "max_batch_size": 2})
        assert (await second).json()["system_fingerprint"] == "script-1"
        running_ones = server.service.registry.snapshots()["m"]
        assert [snapshot.num_running for snapshot in running_ones] == [0, 1]
        assert not old.is_closed
        old.gate.set()
        assert (await first).status == 200
        await eventually(lambda: old.is_closed)
        await eventually(lambda: len(server.service.registry.snapshots()["m"]) == 1)


async def test_model_replaced_while_a_prompt_is_encoded(tmp_path: Path, monkeypatch):
    """The request goes to the new replica, with ids of the new vocabulary."""
    encode = api.placement.encode

    async def encode_slowly(*arguments):
        monkeypatch.setattr("api.placement.encode", encode)
        ids = await encode(*arguments)
        vocab = server.source.config_dir / "vocab.txt"
        text = await asyncio.to_thread(vocab.read_text)
        await asyncio.to_thread(by_rename, vocab, text + "257 'hi' 2\n")
        assert (await upsert(server)).status == 200
        return ids

    monkeypatch.setattr("api.placement.encode", encode_slowly)
    async with running(tmp_path) as server:
        reply = await server.post("/v1/completions", {"model": "m", "prompt": "hi"})
    assert reply.status == 200
    assert reply.json()["system_fingerprint"] == "script-2"
    assert reply.json()["usage"]["prompt_tokens"] == 2  # 0 and "hi"


async def test_other_vocabulary_gets_no_old_token_ids(tmp_path: Path):
    async with running(tmp_path, model_table(max_batch_size=1)) as server:
        old = server.runner
        old.gate.clear()
        answers = [asyncio.create_task(server.chat()) for _ in range(2)]
        await eventually(lambda: server.snapshot().num_waiting == 1)
        vocab = server.source.config_dir / "vocab.txt"
        by_rename(vocab, vocab.read_text() + "257 'hello' 5\n")
        assert (await upsert(server)).json()["rebuilt_model_names"] == ["m"]
        await asyncio.sleep(0.05)
        assert not any(answer.done() for answer in answers)
        old.gate.set()
        assert [(await answer).status for answer in answers] == [200, 200]


@asynccontextmanager
async def load(server: Running, num_clients: int = 6) -> AsyncIterator[list[tuple[int, Reply]]]:
    """Clients that ask one thing after the other; (number of prompt tokens, reply) of each."""
    replies: list[tuple[int, Reply]] = []
    is_over = False

    async def ask(number: int) -> None:
        body = {"model": "m", "prompt": "x" * number, "max_tokens": 25, "stream": True}
        while not is_over:
            replies.append((number + 1, await server.post("/v1/completions", body)))

    clients = [asyncio.create_task(ask(number)) for number in range(num_clients)]
    try:
        yield replies
    finally:
        is_over = True
        await asyncio.gather(*clients)
