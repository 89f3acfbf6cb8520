"""Ending one's own requests by their ids, and nobody else's."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from api.access import Caller, owner_of
from api.lifetime import Lifetime
from api.running import RunningRequests
from tests.api.harness import (
    Reply,
    Running,
    chat_body,
    eventually,
    parse_reply,
    request_bytes,
    running,
)
from tests.api.scripted import recited

LONG = chat_body(max_tokens=500)
NUM_PROMPT = len("User: hi\n\nAssistant:") + 1


async def begin(server: Running, name: str, **fields: object) -> asyncio.Task[Reply]:
    """A request that goes on until it is aborted, or for some seconds."""
    num_before = server.snapshot().num_running
    body = {**LONG, **fields}
    task = asyncio.create_task(server.post("/v1/chat/completions", body, x_request_id=name))
    await eventually(lambda: server.snapshot().num_running > num_before)
    return task


async def abort(server: Running, *ids: str, **headers: str) -> list[str]:
    reply = await server.post("/abort_requests", {"request_ids": list(ids)}, **headers)
    assert reply.status == 200, reply.body
    found: list[str] = reply.json()["aborted"]
    return found


def is_idle(server: Running) -> bool:
    snapshot = server.snapshot()
    return snapshot.num_running == 0 and snapshot.num_free_slots == snapshot.num_slots


async def test_a_whole_answer_ends_with_what_there_is(tmp_path: Path):
    async with running(tmp_path, delay_s=0.01) as server:
        asking = await begin(server, "mine")
        await asyncio.sleep(0.05)
        assert await abort(server, "other", "mine") == ["mine"]
        assert is_idle(server), "the slot is free when the answer to the abort is out"
        answer = (await asking).json()
        assert await abort(server, "mine") == [], "it has ended"
        assert len(server.service.running) == 0
    (choice,) = answer["choices"]
    num_tokens = answer["usage"]["completion_tokens"]
    assert choice["finish_reason"] == "abort"
    assert 0 < num_tokens < 500
    assert choice["message"]["content"] == recited(NUM_PROMPT, num_tokens).lstrip()


async def test_a_stream_ends_in_order_and_by_the_id_of_its_answer(tmp_path: Path):
    async with running(tmp_path, delay_s=0.01) as server:
        reader, writer = await server.open()
        body = {**LONG, "stream": True, "n": 3, "stream_options": {"include_usage": True}}
        writer.write(request_bytes("POST", "/v1/chat/completions", body))
        data = b""
        while data.count(b"data: ") < 8:
            data += await reader.read(4096)
        answer_id = data.partition(b'"id":"')[2].partition(b'"')[0].decode()
        assert await abort(server, answer_id) == [answer_id]
        events = parse_reply(data + await reader.read()).events()
        writer.close()
        assert is_idle(server)
    ends = [
        choice["finish_reason"]
        for event in events
        for choice in event["choices"]
        if choice["finish_reason"]
    ]
    assert ends == ["abort"] * 3
    assert events[-1]["usage"]["completion_tokens"] > 0


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/messages", {"max_tokens": 500, "messages": LONG["messages"]}),
        ("/v1/responses", {"max_output_tokens": 500, "input": "hi", "store": False}),
    ],
)
async def test_other_protocols_are_told_of_an_error(tmp_path: Path, path: str, body: dict):
    async with running(tmp_path, delay_s=0.01) as server:
        for stream in (False, True):
            asked = {"model": "m", "stream": stream, **body}
            asking = asyncio.create_task(server.post(path, asked, x_request_id="other"))
            await eventually(lambda: server.snapshot().num_running > 0)
            assert await abort(server, "other") == ["other"]
            reply = await asking
            assert reply.status == (200 if stream else 400)
            assert b"the request was aborted by its owner" in reply.body
        assert is_idle(server)


async def test_only_the_owner_of_a_request_can_end_it(tmp_path: Path):
    async with running(tmp_path, delay_s=0.01, api_key="k") as server:
        service, ended = server.service, []
        other = Lifetime("theirs", Caller(owner_of(b"other"), has_key=True))
        service.running.enter(other, lambda: ended.append("theirs"))
        assert await abort(server, "theirs", authorization="Bearer k") == []
        reply = await server.post("/abort_request", {"abort_all": True}, authorization="Bearer k")
        assert reply.json() == {"num_aborted": 0}
        assert (await server.post("/abort_requests", {"request_ids": ["theirs"]})).status == 401
    assert ended == []


async def test_all_at_once(tmp_path: Path):
    async with running(tmp_path, delay_s=0.01) as server:
        asking = [await begin(server, f"r{number}") for number in range(3)]
        reply = await server.post("/abort_request", {"abort_all": True})
        answers = [(await task).json() for task in asking]
    assert reply.json() == {"num_aborted": 3}
    assert [answer["choices"][0]["finish_reason"] for answer in answers] == ["abort"] * 3


async def test_requests_that_share_an_id_end_together(tmp_path: Path):
    async with running(tmp_path, delay_s=0.01) as server:
        asking = [
            await begin(server, "same"),
            await begin(server, "another", request_id="same"),
        ]
        reply = await server.post("/abort_request", {"rid": "same"})
        answers = [(await task).json() for task in asking]
    assert reply.json() == {"num_aborted": 1}
    assert [answer["choices"][0]["finish_reason"] for answer in answers] == ["abort"] * 2


async def test_waiting_ones_end_too_and_embeddings_with_an_error(tmp_path: Path):
    async with running(tmp_path) as server:
        server.runner.gate.clear()
        body = {"model": "m", "input": ["a"] * 30}
        asking = asyncio.create_task(server.post("/v1/embeddings", body, x_request_id="embed"))
        await eventually(lambda: len(server.service.running) == 1)
        assert await abort(server, "embed") == ["embed"]
        reply = await asking
        server.runner.gate.set()
        await eventually(lambda: is_idle(server))
    assert (reply.status, reply.error["code"]) == (400, "cancelled")


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/abort_requests", {}, "request_ids"),
        ("/abort_requests", {"request_ids": "x"}, "request_ids"),
        ("/abort_requests", {"ids": ["x"]}, "ids"),
        ("/abort_request", {}, "rid"),
        ("/abort_request", {"abort_all": False}, "rid"),
    ],
)
async def test_errors_name_the_field(tmp_path: Path, path: str, body: dict, param: str):
    async with running(tmp_path) as server:
        reply = await server.post(path, body)
    assert (reply.status, reply.error["param"]) == (400, param)


def test_what_has_ended_is_forgotten():
    requests, calls = RunningRequests(), []
    lifetime = Lifetime("id", Caller("me"))
    requests.enter(lifetime, lambda: calls.append(1), "answer")
    assert requests.cancel("me", ["answer", "id", "answer"]) == ["answer", "id"]
    assert calls == [1], "it is ended once"
    lifetime.end()
    assert requests.cancel("me", ["id"]) == []
    assert len(requests) == 0
