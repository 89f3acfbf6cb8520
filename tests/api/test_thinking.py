"""Thinking over HTTP: what a request may say about it, and how the thought comes back."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.api.harness import Reply, model_table, running
from tests.api.scripted import spelled

ANSWER = ">\nLet me think, then.\n</think>\nYes, it is so."
NUM_REASONING = ANSWER.index("\nYes")


async def ask(folder: Path, monkeypatch, answer: str = ANSWER, **fields: object) -> Reply:
    """A chat with a model that answers `answer`, whatever it is asked."""
    async with running(folder) as server:
        prompt = (await server.chat(max_tokens=1, **fields)).json()["usage"]["prompt_tokens"]
        monkeypatch.setattr("tests.api.scripted.SCRIPT", "." * prompt + answer)
        return await server.chat(max_tokens=len(answer), **fields)


async def test_thought_comes_apart_from_the_answer(tmp_path: Path, monkeypatch):
    reply = await ask(tmp_path, monkeypatch, reasoning_effort="medium")
    answer = reply.json()
    message = answer["choices"][0]["message"]
    assert message["content"] == "Yes, it is so."
    assert message["reasoning_content"] == message["reasoning"] == "Let me think, then."
    assert answer["usage"]["completion_tokens_details"] == {"reasoning_tokens": NUM_REASONING}


async def test_streamed_thought_is_the_whole_one(tmp_path: Path, monkeypatch):
    fields = {"chat_template_kwargs": {"enable_thinking": True}}
    whole = (await ask(tmp_path, monkeypatch, **fields)).json()
    async with running(tmp_path) as server:
        options = {"include_usage": True}
        reply = await server.chat(
            max_tokens=len(ANSWER), stream=True, stream_options=options, **fields
        )
    *chunks, usage = reply.events()
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    message = whole["choices"][0]["message"]
    for name in ("content", "reasoning_content", "reasoning"):
        assert "".join(delta.get(name) or "" for delta in deltas) == message[name]
    assert usage["usage"] == whole["usage"]


async def test_without_a_thought_there_is_no_field_for_it(tmp_path: Path):
    async with running(tmp_path) as server:
        message = (await server.chat()).json()["choices"][0]["message"]
    assert set(message) == {"role", "content", "refusal"}


@pytest.mark.parametrize(
    ("fields", "tail"),
    [
        ({}, "User: hi\n\nAssistant:"),
        ({"reasoning_effort": "none"}, "User: hi\n\nAssistant:"),
        ({"chat_template_kwargs": {"enable_thinking": False}}, "User: hi\n\nAssistant:"),
        ({"chat_template_kwargs": {}}, "User: hi\n\nAssistant:"),
        ({"reasoning_effort": "minimal"}, "User: hi\n\nAssistant: <think>\n</think"),
        ({"reasoning_effort": "low"}, "User: hi think a bit\n\nAssistant: <think"),
        ({"reasoning_effort": "medium"}, "User: hi think\n\nAssistant: <think"),
        (
            {"reasoning_effort": "high", "chat_template_kwargs": {"enable_thinking": True}},
            "User: hi think a lot\n\nAssistant: <think",
        ),
        ({"chat_template_kwargs": {"enable_thinking": True}}, "User: hi\n\nAssistant: <think"),
        ({"add_generation_prompt": False}, "User: hi"),
    ],
)
async def test_request_chooses_the_ending_of_the_prompt(tmp_path: Path, fields: dict, tail: str):
    async with running(tmp_path) as server:
        reply = await server.chat(**fields)
        assert reply.status == 200, reply
        assert spelled(server.engine.requests[-1].prompt_ids) == tail


async def test_last_answer_is_gone_on_with(tmp_path: Path):
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "Once upon"}]
    async with running(tmp_path) as server:
        reply = await server.chat(messages=messages, continue_final_message=True)
        sent = spelled(server.engine.requests[-1].prompt_ids)
    assert sent == "User: hi\n\nAssistant: Once upon"
    assert len(reply.json()["choices"][0]["message"]["content"]) == 5


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"reasoning_effort": "huge"}, "reasoning_effort"),
        ({"reasoning_effort": 3}, "reasoning_effort"),
        ({"chat_template_kwargs": {"enable_thinking": "yes"}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"other": 1}}, "chat_template_kwargs"),
        (
            {"reasoning_effort": "none", "chat_template_kwargs": {"enable_thinking": True}},
            "reasoning_effort",
        ),
        (
            {"reasoning_effort": "low", "chat_template_kwargs": {"enable_thinking": False}},
            "reasoning_effort",
        ),
        ({"continue_final_message": True}, "continue_final_message"),
        (
            {
                "continue_final_message": True,
                "add_generation_prompt": True,
                "messages": [{"role": "assistant", "content": "x"}],
            },
            "continue_final_message",
        ),
    ],
)
async def test_what_does_not_make_sense_is_refused(tmp_path: Path, fields: dict, param: str):
    async with running(tmp_path) as server:
        reply = await server.chat(**fields)
    assert (reply.status, reply.error["code"]) == (400, "invalid_value")
    assert reply.error["param"].startswith(param)


async def test_rwkv_rs_template_always_thinks(tmp_path: Path, monkeypatch):
    text = "Hm.\n</think>\nYes."
    monkeypatch.setattr("tests.api.scripted.SCRIPT", text)
    num_prompt = 1 + len("User: hi\n\nAssistant: <think>\n")
    async with running(tmp_path, model_table(template="rwkv-rs")) as server:
        monkeypatch.setattr("tests.api.scripted.SCRIPT", "." * num_prompt + text)
        message = (await server.chat(max_tokens=len(text))).json()["choices"][0]["message"]
        refused = await server.chat(reasoning_effort="none")
    assert (message["reasoning_content"], message["content"]) == ("Hm.", "Yes.")
    assert (refused.status, refused.error["param"]) == (400, "reasoning_effort")
