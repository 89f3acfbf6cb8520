"""`n` and `best_of`: several answers to one prompt, whole and streamed."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from api.errors import ApiError
from api.schemas import parse_chat, parse_completion
from tests.api.harness import (
    chat_body,
    eventually,
    model_table,
    request_bytes,
    running,
)
from tests.api.scripted import SCRIPT, recited

COMPLETION = {"model": "m", "prompt": "ab", "max_tokens": 6, "seed": 7}
NUM_PROMPT_TOKENS = 3


def said(seed: int, num_tokens: int = 6) -> str:
    """The answer to COMPLETION while the runner reads seeds."""
    return recited((NUM_PROMPT_TOKENS + seed) % len(SCRIPT), num_tokens)


def texts_of(events: list[dict]) -> list[str]:
    """Of each choice of a stream, in order of index."""
    texts: dict[int, str] = {}
    for event in events:
        for choice in event["choices"]:
            piece = choice["text"] if "text" in choice else choice["delta"].get("content", "")
            texts[choice["index"]] = texts.get(choice["index"], "") + piece
    return [texts[index] for index in sorted(texts)]


async def test_choices_differ_by_seed_only(tmp_path: Path):
    async with running(tmp_path) as server:
        server.runner.reads_seed = True
        answer = (await server.post("/v1/completions", COMPLETION | {"n": 3})).json()
        sent = server.engine.requests
    assert [choice["text"] for choice in answer["choices"]] == [said(7), said(8), said(9)]
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    assert [request.request_id for request in sent] == [f"{answer['id']}-{i}" for i in range(3)]
    assert [request.sampling.seed for request in sent] == [7, 8, 9]
    assert len({request.prompt_ids for request in sent}) == 1


async def test_usage_counts_the_prompt_once_and_all_answers(tmp_path: Path):
    async with running(tmp_path) as server:
        answer = (await server.post("/v1/completions", COMPLETION | {"n": 3})).json()
    assert answer["usage"] == {
        "prompt_tokens": NUM_PROMPT_TOKENS,
        "completion_tokens": 18,
        "total_tokens": NUM_PROMPT_TOKENS + 18,
        "prompt_tokens_details": {"cached_tokens": 0},
    }


async def test_seeds_wrap_around(tmp_path: Path):
    async with running(tmp_path) as server:
        await server.post("/v1/completions", COMPLETION | {"n": 2, "seed": 2**64 - 1})
        assert [request.sampling.seed for request in server.engine.requests] == [2**64 - 1, 0]


async def test_one_choice_keeps_the_id_of_its_answer(tmp_path: Path):
    async with running(tmp_path) as server:
        answer = (await server.chat(n=1)).json()
        assert server.engine.requests[0].request_id == answer["id"]


async def test_streams_of_choices_are_interleaved(tmp_path: Path):
    body = COMPLETION | {"n": 3, "stream": True, "stream_options": {"include_usage": True}}
    async with running(tmp_path, delay_s=0.005) as server:
        server.runner.reads_seed = True
        reply = await server.post("/v1/completions", body)
    assert texts_of(reply.events()) == [said(7), said(8), said(9)]
    *events, usage = reply.events()
    indexes = [event["choices"][0]["index"] for event in events]
    assert indexes != sorted(indexes), "one after the other"
    ends = [event for event in events if event["choices"][0]["finish_reason"]]
    assert sorted(event["choices"][0]["index"] for event in ends) == [0, 1, 2]
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] == 18


async def test_streamed_chat_opens_and_ends_each_choice(tmp_path: Path):
    async with running(tmp_path) as server:
        whole = (await server.chat(n=2)).json()
        events = (await server.chat(n=2, stream=True)).events()
    assert [event["choices"][0]["index"] for event in events[:2]] == [0, 1]
    assert all(event["choices"][0]["delta"]["role"] == "assistant" for event in events[:2])
    reasons = [event["choices"][0]["finish_reason"] for event in events]
    assert reasons.count("length") == 2
    whole_texts = [choice["message"]["content"] for choice in whole["choices"]]
    assert whole_texts == texts_of(events)


@pytest.mark.parametrize("is_stream", [False, True])
async def test_client_gone_ends_all_choices(tmp_path: Path, is_stream: bool):
    async with running(tmp_path, delay_s=0.01) as server:
        _, writer = await server.open()
        body = chat_body(n=5, max_tokens=100_000, stream=is_stream)
        writer.write(request_bytes("POST", "/v1/chat/completions", body))
        await eventually(lambda: server.snapshot().num_running == 5)
        writer.close()
        assert await eventually(lambda: server.snapshot().num_free_slots == 8) < 0.1
        assert server.snapshot().num_waiting == 0


@pytest.mark.parametrize("is_stream", [False, True])
async def test_failure_of_a_choice_fails_the_request(tmp_path: Path, is_stream: bool):
    """The second one is in a step that fails; the first one has begun before."""
    async with running(tmp_path, model_table(max_batch_size=1)) as server:
        server.runner.gate.clear()
        asked = asyncio.create_task(server.chat(n=2, stream=is_stream, max_tokens=100_000))
        await eventually(lambda: server.snapshot().num_waiting == 1)
        server.runner.fail_next = "numbers went wrong"
        server.runner.gate.set()
        reply = await asked
        await eventually(lambda: server.snapshot().num_free_slots == 1)
        assert server.snapshot().num_waiting == 0
    if is_stream:
        assert reply.events()[-1]["error"]["code"] == "engine_error"
    else:
        assert (reply.status, reply.error["code"]) == (500, "engine_error")


async def test_all_are_queued_or_none(tmp_path: Path):
    table = model_table(max_batch_size=1, max_waiting=3)
    async with running(tmp_path, table) as server:
        server.runner.gate.clear()
        first = asyncio.create_task(server.chat())
        await eventually(lambda: server.snapshot().num_running == 1)
        refused = await server.chat(n=4)
        assert (refused.status, refused.error["code"]) == (429, "queue_full")
        assert server.snapshot().num_waiting == 0
        server.runner.gate.set()
        assert (await first).status == 200


async def test_more_than_could_ever_be_queued_is_no_matter_of_trying_again(tmp_path: Path):
    async with running(tmp_path, model_table(max_batch_size=1, max_waiting=3)) as server:
        reply = await server.chat(n=5)
        assert (reply.status, reply.error["param"]) == (400, "n")
        assert "at most" in reply.error["message"]
        assert (await server.chat(n=4)).status == 200


class TestBestOf:
    async def test_best_come_first(self, tmp_path: Path):
        """Log probabilities of the script fall with seed % 5."""
        async with running(tmp_path) as server:
            server.runner.reads_seed = True
            body = COMPLETION | {"n": 2, "best_of": 4}  # seeds 7, 8, 9, 10
            answer = (await server.post("/v1/completions", body)).json()
            assert all(request.sampling.has_logprobs for request in server.engine.requests)
        assert [choice["text"] for choice in answer["choices"]] == [said(10), said(7)]
        assert [choice["index"] for choice in answer["choices"]] == [0, 1]
        assert answer["usage"]["completion_tokens"] == 24

    async def test_as_many_as_are_returned_need_no_comparing(self, tmp_path: Path):
        async with running(tmp_path) as server:
            body = COMPLETION | {"n": 2, "best_of": 2, "stream": True}
            reply = await server.post("/v1/completions", body)
            assert len(texts_of(reply.events())) == 2
            assert not any(request.sampling.has_logprobs for request in server.engine.requests)

    @pytest.mark.parametrize(
        ("fields", "param"),
        [
            ({"best_of": 2, "stream": True}, "best_of"),
            ({"best_of": 2, "n": 3}, "best_of"),
            ({"best_of": 129}, "best_of"),
            ({"best_of": 0}, "best_of"),
            ({"best_of": 2, "return_state": True}, "return_state"),
        ],
    )
    def test_wrong_ones_are_refused_by_name(self, fields: dict[str, object], param: str):
        with pytest.raises(ApiError) as caught:
            parse_completion(json.dumps(COMPLETION | fields).encode())
        assert (caught.value.status, caught.value.param) == (400, param)

    def test_chat_has_none(self):
        with pytest.raises(ApiError) as caught:
            parse_chat(json.dumps(chat_body(best_of=2)).encode())
        assert caught.value.code == "unsupported_parameter"


@pytest.mark.parametrize("n", [0, 129, -1, 1.5, True, "2"])
def test_n_out_of_range_is_refused_by_name(n: object):
    with pytest.raises(ApiError) as caught:
        parse_chat(json.dumps(chat_body(n=n)).encode())
    assert (caught.value.status, caught.value.param) == (400, "n")


async def test_slow_reader_of_many_choices_gets_each_whole(tmp_path: Path):
    body = COMPLETION | {"n": 3, "stream": True, "max_tokens": 2000}
    async with running(tmp_path) as server:
        reader, writer = await server.open()
        writer.write(request_bytes("POST", "/v1/completions", body))
        await reader.readuntil(b"data: ")
        await eventually(lambda: server.snapshot().num_running == 0)
        data = b"data: " + await reader.read(-1)
        writer.close()
    payloads = [line[6:] for line in data.split(b"\n") if line.startswith(b"data: {")]
    texts = texts_of([json.loads(payload) for payload in payloads])
    assert texts == [recited(NUM_PROMPT_TOKENS, 2000)] * 3
