"""Several prompts in one request, and what a request says about itself: ids, deadline, tokens."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tests.api.harness import eventually, model_table, running
from tests.api.scripted import SCRIPT, recited

PROMPTS = ["ab", [5, 6, 7, 8], "abcdef"]
LENGTHS = [3, 4, 7]  # in tokens
BATCH = {"model": "m", "prompt": PROMPTS, "max_tokens": 6, "seed": 7}


def said(length: int, seed: int) -> str:
    return recited((length + seed) % len(SCRIPT), 6)


@pytest.mark.parametrize("is_stream", [False, True])
async def test_choices_come_prompt_by_prompt(tmp_path: Path, is_stream: bool):
    async with running(tmp_path) as server:
        server.runner.reads_seed = True
        reply = await server.post("/v1/completions", BATCH | {"n": 2, "stream": is_stream})
        sent = server.engine.requests
    texts = dict.fromkeys(range(6), "")
    for answer in reply.events() if is_stream else [reply.json()]:
        for choice in answer["choices"]:
            texts[choice["index"]] += choice["text"]
    expected = [said(length, seed) for length in LENGTHS for seed in (7, 8)]
    assert list(texts.values()) == expected
    assert [len(one.prompt_ids) for one in sent] == [3, 3, 4, 4, 7, 7]
    assert [one.sampling.seed for one in sent] == [7, 8] * 3
    assert len({one.request_id for one in sent}) == 6


async def test_usage_counts_each_prompt_once(tmp_path: Path):
    async with running(tmp_path) as server:
        answer = (await server.post("/v1/completions", BATCH | {"n": 2})).json()
    assert answer["usage"] == {
        "prompt_tokens": sum(LENGTHS),
        "completion_tokens": 36,
        "total_tokens": sum(LENGTHS) + 36,
        "prompt_tokens_details": {"cached_tokens": 0},
    }


async def test_best_are_chosen_of_each_prompt(tmp_path: Path):
    async with running(tmp_path, model_table(max_batch_size=16)) as server:
        server.runner.reads_seed = True
        answer = (await server.post("/v1/completions", BATCH | {"best_of": 4, "n": 2})).json()
    # Of the seeds 7 to 10 the last has the highest log probability, then the first.
    expected = [said(length, seed) for length in LENGTHS for seed in (10, 7)]
    assert [choice["text"] for choice in answer["choices"]] == expected
    assert answer["usage"]["completion_tokens"] == 72


async def test_prompt_is_answered_as_if_it_were_alone(tmp_path: Path):
    async with running(tmp_path) as server:
        server.runner.reads_seed = True
        together = (await server.post("/v1/completions", BATCH)).json()
        for index, prompt in enumerate(PROMPTS):
            alone = (await server.post("/v1/completions", BATCH | {"prompt": prompt})).json()
            assert alone["choices"][0]["text"] == together["choices"][index]["text"]


async def test_echo_repeats_each_prompt_to_its_choices(tmp_path: Path):
    async with running(tmp_path) as server:
        body = BATCH | {"echo": True, "n": 2, "max_tokens": 0, "logprobs": 0, "prompt": ["ab", "c"]}
        answer = (await server.post("/v1/completions", body)).json()
    assert [choice["text"] for choice in answer["choices"]] == ["ab", "ab", "c", "c"]
    tokens = [choice["logprobs"]["tokens"] for choice in answer["choices"]]
    assert tokens == [["", "a", "b"]] * 2 + [["", "c"]] * 2


async def test_more_answers_than_can_wait_are_refused_before_they_are_encoded(tmp_path: Path):
    table = model_table(max_batch_size=2, max_waiting=3)
    async with running(tmp_path, table) as server:
        reply = await server.post("/v1/completions", BATCH | {"prompt": ["x"] * 6})
        copies = await server.post("/v1/completions", BATCH | {"prompt": "x", "n": 6})
        assert server.engine.requests == []
        fine = await server.post("/v1/completions", BATCH | {"prompt": ["x"] * 5})
    assert (reply.status, reply.error["param"]) == (400, "prompt")
    assert (copies.status, copies.error["param"]) == (400, "n")
    assert fine.status == 200


async def test_one_bad_prompt_refuses_all(tmp_path: Path):
    async with running(tmp_path) as server:
        reply = await server.post("/v1/completions", BATCH | {"prompt": ["fine", [3], [999]]})
        assert await eventually(lambda: server.snapshot().num_running == 0) < 1
        assert server.snapshot().num_waiting == 0
    assert (reply.status, reply.error["param"]) == (400, "prompt")


async def test_states_can_be_made_of_each_choice(tmp_path: Path):
    async with running(tmp_path) as server:
        answer = (await server.post("/v1/completions", BATCH)).json()
        counts = []
        for choice in range(3):
            body = {"response": answer["id"], "choice": choice}
            state = (await server.post("/v1/states", body)).json()
            counts.append(state["num_tokens"])
    assert counts == [length + 6 for length in LENGTHS]


async def test_token_ids_are_returned_beside_the_text(tmp_path: Path):
    body = {"model": "m", "prompt": "ab", "max_tokens": 4, "return_token_ids": True}
    ids = [1 + ord(char) for char in recited(3, 4)]
    async with running(tmp_path, delay_s=0.002) as server:
        (choice,) = (await server.post("/v1/completions", body)).json()["choices"]
        events = (await server.post("/v1/completions", body | {"stream": True})).events()
        chat = (await server.chat(return_token_ids=True)).json()
        sent = server.engine.requests[-1]
        pieces = (await server.chat(return_token_ids=True, stream=True)).events()
    assert (choice["prompt_token_ids"], choice["token_ids"]) == ([0, 98, 99], ids)
    assert events[0]["choices"][0]["prompt_token_ids"] == [0, 98, 99]
    assert not any("prompt_token_ids" in event["choices"][0] for event in events[1:])
    assert streamed_ids(events) == ids
    assert chat["prompt_token_ids"] == pieces[0]["prompt_token_ids"] == list(sent.prompt_ids)
    assert streamed_ids(pieces) == chat["choices"][0]["token_ids"]
    assert len(chat["choices"][0]["token_ids"]) == 5


def streamed_ids(events: list[dict]) -> list[int]:
    return [token for event in events for token in event["choices"][0].get("token_ids", [])]


async def test_token_ids_hold_what_ended_the_answer(tmp_path: Path):
    body = {"model": "m", "prompt": "ab", "return_token_ids": True, "stop": recited(3, 4)[2:]}
    async with running(tmp_path) as server:
        (choice,) = (await server.post("/v1/completions", body)).json()["choices"]
    assert choice["text"] == recited(3, 2)
    assert len(choice["token_ids"]) == choice["generated_tokens"] == 4


async def test_id_of_the_answer_ends_in_the_request_id(tmp_path: Path):
    body = {"model": "m", "prompt": "ab", "max_tokens": 2, "request_id": "job-7:a"}
    async with running(tmp_path) as server:
        first = await server.post("/v1/completions", body, x_request_id="header")
        again = (await server.post("/v1/completions", body)).json()
        chat = (await server.chat(request_id="c")).json()
        state = await server.post("/v1/states", {"response": "cmpl-job-7:a"})
    assert first.json()["id"] == again["id"] == "cmpl-job-7:a"
    assert first.headers["x-request-id"] == "header"
    assert chat["id"] == "chatcmpl-c"
    assert state.status == 200


async def test_id_of_a_running_request_is_taken(tmp_path: Path):
    body = {"model": "m", "prompt": "ab", "max_tokens": 100_000, "request_id": "x"}
    async with running(tmp_path, delay_s=0.01) as server:
        first = asyncio.create_task(server.post("/v1/completions", body))
        await eventually(lambda: server.snapshot().num_running == 1)
        second = await server.post("/v1/completions", body)
        first.cancel()
    assert (second.status, second.error["param"]) == (400, "request_id")


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
async def test_deadline_of_a_request_ends_it(tmp_path: Path, path: str):
    asked = {"prompt": "ab"} if path == "/v1/completions" else {"messages": [{"role": "user"}]}
    body = {"model": "m", "max_tokens": 100_000, "timeout_ms": 60, **asked}
    async with running(tmp_path, delay_s=0.005) as server:
        whole = await server.post(path, body)
        stream = await server.post(path, body | {"stream": True})
        assert server.snapshot().num_running == 0
        enough = await server.post(path, body | {"max_tokens": 1, "timeout_ms": 60_000.0})
        metrics = (await server.get("/metrics")).body.decode()
    assert whole.status == 504
    assert (whole.error["code"], whole.error["param"]) == ("timeout", "timeout_ms")
    assert whole.headers["x-should-retry"] == "false"
    *events, end = stream.events()
    assert end["error"]["code"] == "timeout"
    assert events, "what was said before is lost"
    assert enough.status == 200
    assert 'rwkv_requests_total{finish_reason="timeout",model_name="m"} 2.0' in metrics


async def test_user_and_metadata_change_nothing(tmp_path: Path):
    body = {"model": "m", "prompt": "ab", "max_tokens": 4, "seed": 1}
    async with running(tmp_path) as server:
        plain = (await server.post("/v1/completions", body)).json()
        named = (await server.post("/v1/completions", body | {"user": "u", "metadata": {}})).json()
        first, second = server.engine.requests
    assert plain["choices"] == named["choices"]
    assert first.sampling == second.sampling


async def test_rules_of_sampling_reach_the_engine_and_its_refusal_names_the_field(tmp_path: Path):
    body = {"model": "m", "prompt": "ab", "max_tokens": 4}
    async with running(tmp_path) as server:
        for field, value in (
            ("stop_token_ids", [300]),
            ("allowed_token_ids", [300]),
            ("logit_bias", {"300": 1}),
        ):
            reply = await server.post("/v1/completions", body | {field: value})
            assert (reply.status, reply.error["param"]) == (400, field)
        good = {"logit_bias": {"5": 1}, "bad_words": ["x"], "min_p": 0.1, "min_tokens": 2}
        assert (await server.post("/v1/completions", body | good)).status == 200
        sampling = server.engine.requests[-1].sampling
    assert (sampling.logit_bias, sampling.bad_words) == (((5, 1.0),), ("x",))
    assert (sampling.min_p, sampling.min_tokens) == (0.1, 2)
