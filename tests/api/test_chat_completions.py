"""POST /v1/chat/completions and /v1/completions, whole and streamed."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tests.api.harness import chat_body, eventually, model_table, request_bytes, running
from tests.api.scripted import recited

NUM_CHAT_TOKENS = len("User: hi\n\nAssistant:") + 1  # one byte is one token; one begins it


async def test_chat_answers_the_whole_text_with_usage(tmp_path: Path):
    async with running(tmp_path) as server:
        reply = await server.chat(max_tokens=7)
    assert reply.status == 200
    answer = reply.json()
    assert answer["object"] == "chat.completion"
    assert answer["id"].startswith("chatcmpl-")
    assert answer["model"] == "m"
    assert answer["system_fingerprint"] == "script-1"
    (choice,) = answer["choices"]
    assert choice["message"]["role"] == "assistant"
    assert choice["message"]["content"] == recited(NUM_CHAT_TOKENS, 7).lstrip()
    assert choice["finish_reason"] == "length"
    assert answer["usage"] == {
        "prompt_tokens": NUM_CHAT_TOKENS,
        "completion_tokens": 7,
        "total_tokens": NUM_CHAT_TOKENS + 7,
        "prompt_tokens_details": {"cached_tokens": 0},
        "completion_tokens_details": {"reasoning_tokens": 0},
    }


async def test_streamed_chat_says_the_same_as_the_whole_one(tmp_path: Path):
    async with running(tmp_path) as server:
        whole = (await server.chat(max_tokens=30)).json()
        options = {"include_usage": True}
        reply = await server.chat(max_tokens=30, stream=True, stream_options=options)
    assert reply.headers["content-type"] == "text/event-stream"
    assert reply.headers["cache-control"] == "no-cache"
    first, *middle, last, usage = reply.events()
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    text = "".join(event["choices"][0]["delta"]["content"] for event in middle)
    assert text == whole["choices"][0]["message"]["content"]
    assert last["choices"][0]["delta"] == {}
    assert last["choices"][0]["finish_reason"] == "length"
    assert usage["choices"] == []
    assert usage["usage"] == whole["usage"]
    for event in (first, *middle, last):
        assert event["object"] == "chat.completion.chunk"
        assert event["id"] == first["id"]
        assert event["usage"] is None


async def test_stream_without_include_usage_has_no_usage(tmp_path: Path):
    async with running(tmp_path) as server:
        events = (await server.chat(stream=True)).events()
    assert all("usage" not in event for event in events)


async def test_completion_continues_text_and_token_ids_alike(tmp_path: Path):
    async with running(tmp_path) as server:
        text = await server.post("/v1/completions", {"model": "m", "prompt": "ab", "max_tokens": 6})
        ids = [0, 1 + ord("a"), 1 + ord("b")]
        by_ids = await server.post(
            "/v1/completions", {"model": "m", "prompt": ids, "max_tokens": 6}
        )
    assert text.json()["choices"][0]["text"] == recited(3, 6)
    assert by_ids.json()["choices"] == text.json()["choices"]
    assert text.json()["object"] == "text_completion"
    assert text.json()["choices"][0]["generated_tokens"] == 6
    assert "matched_stop_suffix" not in text.json()["choices"][0]


async def test_completion_names_the_stop_string_that_ended_it(tmp_path: Path):
    stops = ["never there", " the", "ocean"]
    body = {"model": "m", "prompt": "", "max_tokens": 60, "stop": stops}
    async with running(tmp_path) as server:
        whole = await server.post("/v1/completions", body)
        streamed = await server.post("/v1/completions", body | {"stream": True})
    (choice,) = whole.json()["choices"]
    assert choice["text"] == recited(1, 60).partition(" the")[0]
    assert choice["finish_reason"] == "stop"
    assert choice["matched_stop_suffix"] == " the"
    assert choice["matched_stop_suffix_index"] == 1
    *middle, last = streamed.events()
    assert "".join(event["choices"][0]["text"] for event in middle) == choice["text"]
    assert last["choices"][0] == choice | {"text": ""}
    assert {event["object"] for event in streamed.events()} == {"text_completion"}


async def test_default_stop_of_chat_can_be_switched_off(tmp_path: Path, monkeypatch):
    monkeypatch.setattr("tests.api.scripted.SCRIPT", "one two\n\nUser: three four ")
    async with running(tmp_path) as server:
        by_default = await server.chat(max_tokens=24)
        without = await server.chat(max_tokens=24, stop=[])
    assert by_default.json()["choices"][0]["finish_reason"] == "stop"
    assert "\n" not in by_default.json()["choices"][0]["message"]["content"]
    assert without.json()["choices"][0]["finish_reason"] == "length"
    assert "User:" in without.json()["choices"][0]["message"]["content"]


async def test_template_of_the_model_shapes_the_prompt(tmp_path: Path):
    tables = model_table("g", template="g1"), model_table("r", template="rwkv-rs")
    async with running(tmp_path, *tables) as server:
        g1 = await server.chat(model="g")
        rust = await server.chat(model="r")
    assert g1.json()["usage"]["prompt_tokens"] == NUM_CHAT_TOKENS
    num_rust_tokens = 1 + len("User: hi\n\nAssistant: <think>\n")
    assert rust.json()["usage"]["prompt_tokens"] == num_rust_tokens


async def test_silence_is_filled_with_comments_before_and_between_tokens(tmp_path: Path):
    async with running(tmp_path, sse_keep_alive_ms=20) as server:
        server.runner.gate.clear()
        reader, writer = await server.open()
        body = chat_body(stream=True)
        writer.write(request_bytes("POST", "/v1/chat/completions", body))
        async with asyncio.timeout(5):
            await reader.readuntil(b": keep-alive\n\n")
            await reader.readuntil(b": keep-alive\n\n")
            server.runner.gate.set()
            rest = await reader.readuntil(b"[DONE]")
        writer.close()
    assert b'"finish_reason":"length"' in rest


async def test_every_answer_has_its_own_id_and_seed(tmp_path: Path):
    async with running(tmp_path) as server:
        replies = await asyncio.gather(*(server.chat() for _ in range(20)))
    assert len({reply.json()["id"] for reply in replies}) == 20


async def test_many_at_once_all_get_the_right_text(tmp_path: Path):
    """More than slots: some wait their turn."""
    async with running(tmp_path, delay_s=0.001) as server:
        bodies = [
            {
                "model": "m",
                "prompt": "x" * (number % 7),
                "max_tokens": 20,
                "stream": number % 2 == 0,
            }
            for number in range(40)
        ]
        replies = await asyncio.gather(*(server.post("/v1/completions", body) for body in bodies))
        await eventually(lambda: server.snapshot().num_free_slots == 8)
    for body, reply in zip(bodies, replies, strict=True):
        if body["stream"]:
            text = "".join(event["choices"][0]["text"] for event in reply.events())
        else:
            text = reply.json()["choices"][0]["text"]
        assert text == recited(1 + len(body["prompt"]), 20)


async def test_full_queue_is_429_with_retry_after(tmp_path: Path):
    table = model_table(max_batch_size=1, max_waiting=1)
    async with running(tmp_path, table) as server:
        server.runner.gate.clear()
        accepted = [asyncio.create_task(server.chat()) for _ in range(2)]
        await eventually(lambda: server.snapshot().num_waiting == 1)
        refused = await server.chat(stream=True)
        server.runner.gate.set()
        assert [(await task).status for task in accepted] == [200, 200]
    assert refused.status == 429
    assert int(refused.headers["retry-after"]) >= 1
    assert refused.error["type"] == "rate_limit_error"
    assert refused.error["code"] == "queue_full"


async def test_too_long_prompt_is_400_naming_the_field(tmp_path: Path):
    async with running(tmp_path, model_table(max_context_len=20)) as server:
        chat = await server.chat(messages=[{"role": "user", "content": "x" * 50}])
        completion = await server.post("/v1/completions", {"model": "m", "prompt": "x" * 50})
    assert (chat.status, chat.error["code"]) == (400, "context_length_exceeded")
    assert chat.error["param"] == "messages"
    assert completion.error["param"] == "prompt"


async def test_token_id_outside_the_vocabulary_is_400(tmp_path: Path):
    async with running(tmp_path) as server:
        reply = await server.post("/v1/completions", {"model": "m", "prompt": [1, 99999]})
    assert (reply.status, reply.error["param"]) == (400, "prompt")
    assert "99999" in reply.error["message"]


async def test_failing_step_is_500_or_an_error_event(tmp_path: Path):
    async with running(tmp_path) as server:
        server.runner.fail_next = "numbers went wrong"
        whole = await server.chat()
        server.runner.fail_next = "numbers went wrong"
        streamed = await server.chat(stream=True)
        after = await server.chat()
    assert (whole.status, whole.error["type"]) == (500, "server_error")
    assert streamed.status == 200
    assert streamed.events()[-1]["error"]["code"] == "engine_error"
    assert after.status == 200


@pytest.mark.parametrize("is_stream", [False, True])
async def test_dead_device_fails_the_running_and_refuses_the_next(tmp_path: Path, is_stream: bool):
    async with running(tmp_path) as server:
        server.runner.die_next = "device lost"
        await server.chat(stream=is_stream)
        refused = await server.chat()
        live, ready = await server.get("/health/live"), await server.get("/health/ready")
        metrics = (await server.get("/metrics")).body.decode()
    assert (refused.status, refused.error["code"]) == (503, "engine_dead")
    assert (live.status, ready.status) == (503, 503)
    assert 'rwkv_replica_up{model_name="m"} 0.0' in metrics
