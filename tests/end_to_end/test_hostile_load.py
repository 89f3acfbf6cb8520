"""More requests than can be served, and a storm of requests that leave at random."""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress

import pytest

from tests.api.harness import Reply, parse_reply, request_bytes
from tests.end_to_end.hostile import PROTOCOLS, Protocol, is_idle, report, unharmed
from tests.end_to_end.site import Server, Site, eventually

ANSWER_TIMEOUT_S = 300.0
MAX_WAITING = 64
MAX_AT_ONCE = 48  # so that the queue is never full
NUM_REFERENCES = 4


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    model = {"max_waiting": MAX_WAITING}
    with Site(tmp_path_factory.mktemp("load"), model=model).serving() as running:
        yield running


async def ask(server: Server, sent: bytes) -> Reply:
    """One request on a connection of its own. Raises TimeoutError rather than wait for ever."""
    reader, writer = await asyncio.open_connection("127.0.0.1", server.process.port)
    try:
        writer.write(sent)
        async with asyncio.timeout(ANSWER_TIMEOUT_S):
            return parse_reply(await reader.read())
    finally:
        writer.close()


@pytest.mark.parametrize("count", [1000, pytest.param(10_000, marks=pytest.mark.slow)])
async def test_more_requests_than_wait_are_429_and_nobody_is_stuck(server: Server, count: int):
    """All at once, each on a connection of its own."""
    body = PROTOCOLS["chat"].body("Hello! How are you?", 8)
    sent = request_bytes("POST", PROTOCOLS["chat"].path, body)
    with unharmed(server):
        before_mib = server.process.rss_mib()
        replies = await asyncio.gather(*(ask(server, sent) for _ in range(count)))
        statuses = Counter(reply.status for reply in replies)
        assert statuses.keys() <= {200, 429}, statuses
        assert statuses[200] >= MAX_WAITING, "as many as may wait are served"
        refused = [reply for reply in replies if reply.status == 429]
        for reply in refused:
            assert reply.error["code"] == "queue_full"
            assert int(reply.headers["retry-after"]) >= 1
        texts = {PROTOCOLS["chat"].text(reply) for reply in replies if reply.status == 200}
        assert len(texts) == 1, "the same request has the same answer in any crowd"
        grown_mib = server.process.rss_mib() - before_mib
        assert grown_mib < 30 + count / 50, f"{grown_mib:.0f} MiB for {count} connections"


async def test_full_queue_is_429_and_the_next_one_is_served_when_there_is_room(server: Server):
    """Those who fill it run without end, so that it is full for certain."""
    endless = PROTOCOLS["completions"].endless(stream=True)
    asked = request_bytes("POST", "/v1/completions", PROTOCOLS["completions"].body("Once", 2))
    with unharmed(server):
        num_places = report(server)["max_batch_size"] + MAX_WAITING
        crowd = []
        for _ in range(num_places):
            _, writer = await asyncio.open_connection("127.0.0.1", server.process.port)
            writer.write(endless)
            crowd.append(writer)
        await asyncio.to_thread(eventually, lambda: report(server)["waiting"] == MAX_WAITING)
        for _ in range(50):
            reply = await ask(server, asked)
            assert (reply.status, reply.error["code"]) == (429, "queue_full")
            assert int(reply.headers["retry-after"]) >= 1
        assert server.ask("GET", "/health/ready").status == 200
        for writer in crowd:
            writer.close()
        await asyncio.to_thread(eventually, lambda: is_idle(server))
        assert (await ask(server, asked)).status == 200


def storm_body(protocol: Protocol, seed: int, **fields: object) -> dict[str, object]:
    prompt = f"Once upon a time there were {seed} cats."
    return protocol.body(prompt, 12, **{"temperature": 1, "seed": seed, **fields})


async def misbehave(server: Server, name: str, draw: random.Random) -> str:
    """One request that ends somehow; says how it was meant to."""
    protocol = PROTOCOLS[name]
    kind = draw.choice(("leave", "leave at once", "half", "abort", "timeout", "garbage"))
    is_stream = draw.random() < 0.5
    fields: dict[str, object] = {"stream": is_stream}
    if kind == "timeout":
        fields["timeout_ms"] = draw.randint(1, 60)
    request_id = f"storm-{draw.randrange(10**12)}"
    body = storm_body(protocol, draw.randrange(100), **fields)
    body[protocol.max_tokens_field] = draw.choice((1, 40, 100_000))
    if kind == "timeout":
        body[protocol.max_tokens_field] = 40
    sent = request_bytes("POST", protocol.path, body, {"x-request-id": request_id})
    if kind == "garbage":
        sent = sent[: draw.randrange(len(sent))] + draw.randbytes(20)
    reader, writer = await asyncio.open_connection("127.0.0.1", server.process.port)
    try:
        writer.write(sent)
        if kind == "leave at once":
            return kind
        await asyncio.sleep(draw.random() * 0.3)
        if kind == "half":
            writer.write_eof()
        if kind == "abort":
            ids = {"request_ids": [request_id]}
            reply = await ask(server, request_bytes("POST", "/abort_requests", ids))
            assert reply.status == 200
            if not reply.json()["aborted"]:
                return kind  # it has ended, or not begun
        if kind in ("half", "abort", "timeout"):
            async with asyncio.timeout(ANSWER_TIMEOUT_S):
                await reader.read()
    finally:
        if draw.random() < 0.5:
            writer.transport.abort()
        else:
            writer.close()
    return kind


@pytest.mark.parametrize("count", [240, pytest.param(4000, marks=pytest.mark.slow)])
async def test_storm_of_leaving_clients_harms_no_answer_and_leaks_nothing(
    server: Server, count: int
):
    """Every fourth request is honest: it is answered as it was when it was alone."""
    draw = random.Random(count)
    names = list(PROTOCOLS)
    wanted = {
        (name, seed): await honest(server, name, seed)
        for name in names
        for seed in range(NUM_REFERENCES)
    }
    at_once = asyncio.Semaphore(MAX_AT_ONCE)
    kinds: Counter[str] = Counter()

    async def one(number: int) -> None:
        name = draw.choice(names)
        own = random.Random(draw.random())
        async with at_once:
            if number % 4:
                with suppress(ConnectionError):
                    kinds[await misbehave(server, name, own)] += 1
            else:
                seed = own.randrange(NUM_REFERENCES)
                assert await honest(server, name, seed) == wanted[name, seed], (name, seed)
                kinds["honest"] += 1

    with unharmed(server):
        await asyncio.gather(*(one(number) for number in range(count)))
        assert kinds["honest"] == -(-count // 4)
        assert len(kinds) == 7, kinds


async def honest(server: Server, name: str, seed: int) -> str:
    """The text of a whole answer."""
    protocol = PROTOCOLS[name]
    sent = request_bytes("POST", protocol.path, storm_body(protocol, seed))
    reply = await ask(server, sent)
    assert reply.status == 200, json.dumps(reply.json())
    return protocol.text(reply)
