"""Generations that a graceful stop suspends, and `resume`."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from api.errors import ApiError
from api.schemas import parse_chat, parse_completion
from api.tool_text import ToolCall, call_text
from tests.api.harness import Reply, Running, chat_body, eventually, model_table, running
from tests.api.reloading import upsert
from tests.api.scripted import recited

BODY = {"model": "m", "prompt": "ab", "max_tokens": 60, "resumable": True}
TABLE = {"state_dir": "states"}


async def stop_and_start(server: Running, asked: asyncio.Task[Reply]) -> Reply:
    """The answer to a request that was running when its replica stopped."""
    await eventually(lambda: server.snapshot().num_running == 1)
    await asyncio.sleep(0.03)
    await server.engine.drain(5, suspends=True)
    reply = await asked
    assert (await upsert(server, {"model_name": "m", "max_batch_size": 3})).status == 200
    return reply


@pytest.mark.parametrize("is_stream", [False, True])
async def test_text_goes_on_where_it_was_suspended(tmp_path: Path, is_stream: bool):
    async with running(tmp_path, model_table(**TABLE), delay_s=0.005) as server:
        body = BODY | {"stream": is_stream}
        asked = asyncio.create_task(server.post("/v1/completions", body))
        reply = await stop_and_start(server, asked)
        first, last = parts(reply, is_stream)
        assert reply.status == 200
        assert last["choices"][0]["finish_reason"] == "suspended"
        again = {"model": "m", "resume": last["resume"]["id"], "stream": is_stream}
        rest, end = parts(await server.post("/v1/completions", again), is_stream)
        used_up = await server.post("/v1/completions", again)
    assert 0 < len(first) < 60
    assert first + rest == recited(3, 60)
    assert end["choices"][0]["finish_reason"] == "length"
    assert "resume" not in end
    assert (used_up.status, used_up.error["code"]) == (404, "state_not_found")
    assert used_up.error["param"] == "resume"


def parts(reply: Reply, is_stream: bool) -> tuple[str, dict]:
    """The text, and the object with the end of the answer."""
    if not is_stream:
        return reply.json()["choices"][0]["text"], reply.json()
    events = reply.events()
    return "".join(event["choices"][0]["text"] for event in events), events[-1]


@pytest.mark.parametrize("is_stream", [False, True])
async def test_logprobs_go_on_where_they_were_suspended(tmp_path: Path, is_stream: bool):
    async with running(tmp_path, model_table(**TABLE), delay_s=0.005) as server:
        body = BODY | {"logprobs": 2, "seed": 3, "stream": is_stream, "stop": "nothing"}
        asked = asyncio.create_task(server.post("/v1/completions", body))
        first = await stop_and_start(server, asked)
        _, last = parts(first, is_stream)
        again = {"model": "m", "resume": last["resume"]["id"], "stream": is_stream}
        rest = await server.post("/v1/completions", again)
    answers = [*first.events(), *rest.events()] if is_stream else [first.json(), rest.json()]
    told = [answer["choices"][0]["logprobs"] for answer in answers]
    tokens = [token for one in told if one is not None for token in one["tokens"]]
    assert "".join(tokens) == recited(3, 60)
    assert all(len(top) == 2 for one in told if one is not None for top in one["top_logprobs"])


async def test_chat_is_suspended_too_and_keeps_its_white_space(tmp_path: Path):
    async with running(tmp_path, model_table(**TABLE), delay_s=0.005) as server:
        asked = asyncio.create_task(server.chat(max_tokens=60, resumable=True))
        first = (await stop_and_start(server, asked)).json()
        again = {"model": "m", "resume": first["resume"]["id"]}
        rest = (await server.post("/v1/chat/completions", again)).json()
        whole = (await server.chat(max_tokens=60)).json()
    texts = [answer["choices"][0]["message"]["content"] for answer in (first, rest, whole)]
    assert texts[0] + texts[1] == texts[2]


async def test_resumed_answer_names_its_stop_without_a_place(tmp_path: Path):
    """Its request, with the list of stop strings, is no longer there."""
    async with running(tmp_path, model_table(**TABLE), delay_s=0.005) as server:
        body = BODY | {"prompt": "", "stop": ["cornflowers"], "max_tokens": 100}
        asked = asyncio.create_task(server.post("/v1/completions", body))
        first = (await stop_and_start(server, asked)).json()
        again = {"model": "m", "resume": first["resume"]["id"]}
        (choice,) = (await server.post("/v1/completions", again)).json()["choices"]
    assert choice["matched_stop_suffix"] == "cornflowers"
    assert "matched_stop_suffix_index" not in choice


async def test_state_that_was_asked_for_comes_with_the_real_end(tmp_path: Path):
    async with running(tmp_path, model_table(**TABLE), delay_s=0.005) as server:
        body = BODY | {"return_state": True}
        asked = asyncio.create_task(server.post("/v1/completions", body))
        first = (await stop_and_start(server, asked)).json()
        again = {"model": "m", "resume": first["resume"]["id"]}
        end = (await server.post("/v1/completions", again)).json()
    assert "state" not in first
    assert end["state"]["num_tokens"] == 3 + 60


async def test_others_are_ended_as_ever(tmp_path: Path):
    async with running(tmp_path, model_table(**TABLE), delay_s=0.005) as server:
        asked = asyncio.create_task(server.chat(max_tokens=100_000))
        await eventually(lambda: server.snapshot().num_running == 1)
        await server.engine.drain(0.05)
        reply = await asked
    assert (reply.status, reply.error["code"]) == (503, "aborted")


async def test_suspended_answer_is_not_finished(tmp_path: Path):
    """So no state can be made of it."""
    async with running(tmp_path, model_table(**TABLE), delay_s=0.005) as server:
        asked = asyncio.create_task(server.chat(max_tokens=60, resumable=True))
        first = (await stop_and_start(server, asked)).json()
        reply = await server.post("/v1/states", {"response": first["id"]})
    assert (reply.status, reply.error["code"]) == (404, "response_not_found")


async def test_without_a_disk_nothing_can_be_promised(tmp_path: Path):
    async with running(tmp_path) as server:
        reply = await server.chat(resumable=True)
        assert (await server.chat(resumable=False)).status == 200
    assert (reply.status, reply.error["param"]) == (400, "resumable")
    assert "state_dir" in reply.error["message"]


@pytest.mark.parametrize(
    "field",
    [
        {"messages": [{"role": "user", "content": "hi"}]},
        {"temperature": 0},
        {"max_tokens": 5},
        {"stop": ["x"]},
        {"n": 1},
        {"state": "s"},
        {"return_state": False},
        {"resumable": True},
        {"cache_salt": "s"},
    ],
)
def test_what_was_settled_is_refused_by_name(field: dict[str, object]):
    with pytest.raises(ApiError) as caught:
        parse_chat(json.dumps({"model": "m", "resume": "r", **field}).encode())
    assert caught.value.status == 400
    assert [caught.value.param] == [*field]


@pytest.mark.parametrize(
    "fields",
    [
        {"stream": True, "stream_options": {"include_usage": True}},
        {"messages": []},
        {"max_tokens": None},
        {"user": "me"},
    ],
)
def test_what_changes_nothing_passes(fields: dict[str, object]):
    assert parse_chat(json.dumps({"resume": "r", **fields}).encode()).chat_messages() == []


def test_completion_needs_no_prompt_to_resume():
    assert parse_completion(b'{"resume": "r", "prompt": ""}').prompts() == [""]
    with pytest.raises(ApiError) as caught:
        parse_completion(b'{"resume": "r", "prompt": "x"}')
    assert caught.value.param == "prompt"


def test_only_one_answer_is_resumable():
    with pytest.raises(ApiError) as caught:
        parse_chat(json.dumps(chat_body(n=2, resumable=True)).encode())
    assert caught.value.param == "resumable"


@pytest.mark.parametrize("is_stream", [False, True])
async def test_thought_and_call_go_on_as_what_they_are(
    tmp_path: Path, is_stream: bool, monkeypatch: pytest.MonkeyPatch
):
    """Suspended in the thought, and again in the arguments of the call."""
    call = call_text(ToolCall("now", '{"zone": "%s"}' % ("z" * 60)))
    answer = f">\n{'Hm. ' * 30}</think>\n{call}\0"
    tool = {"type": "function", "function": {"name": "now", "parameters": {"type": "object"}}}
    body = {
        "tools": [tool], "reasoning_effort": "high", "max_tokens": len(answer), "stream": is_stream,
    }  # fmt: skip
    async with running(tmp_path, model_table(**TABLE)) as server:
        num_prompt = (await server.chat(**body | {"stream": False})).json()["usage"]
        script = "." * num_prompt["prompt_tokens"] + answer
        monkeypatch.setattr("tests.api.scripted.SCRIPT", script)
        server.runner.delay_s = 0.002
        pieces = []
        asked = asyncio.create_task(server.chat(**body, resumable=True))
        for num_drawn in (30, 170):
            await eventually(lambda least=num_drawn: most_drawn(server) > least)
            await server.engine.drain(5, suspends=True)
            pieces.append(message_of(await asked, is_stream))
            size = {"model_name": "m", "max_batch_size": 2 + len(pieces)}
            assert (await upsert(server, size)).status == 200
            server.runner.delay_s = 0.002
            again = {"model": "m", "resume": pieces[-1]["resume"], "stream": is_stream}
            asked = asyncio.create_task(server.post("/v1/chat/completions", again))
        pieces.append(message_of(await asked, is_stream))
    assert [piece["reason"] for piece in pieces] == ["suspended", "suspended", "tool_calls"]
    assert "".join(piece["reasoning"] for piece in pieces) == ("Hm. " * 30).strip()
    assert all(piece["reasoning"] for piece in pieces[:2])
    assert all(piece["arguments"] for piece in pieces[1:])
    assert "".join(piece["content"] for piece in pieces) == ""
    assert "".join(piece["names"] for piece in pieces) == "now"
    assert "".join(piece["arguments"] for piece in pieces) == '{"zone": "%s"}' % ("z" * 60)


def most_drawn(server: Running) -> int:
    """Tokens of the answer that is furthest, since the engine was made."""
    return max((len(one.seq.output_ids) for one in server.engine._responses), default=0)


def message_of(reply: Reply, is_stream: bool) -> dict:
    """What came of a message, with how it ended."""
    assert reply.status == 200, reply
    answers = reply.events() if is_stream else [reply.json()]
    choices = [answer["choices"][0] for answer in answers]
    deltas = [choice["delta" if is_stream else "message"] for choice in choices]
    calls = [call["function"] for delta in deltas for call in delta.get("tool_calls", [])]
    return {
        "reasoning": "".join(delta.get("reasoning_content") or "" for delta in deltas),
        "content": "".join(delta.get("content") or "" for delta in deltas),
        "names": "".join(call.get("name") or "" for call in calls),
        "arguments": "".join(call["arguments"] for call in calls),
        "reason": choices[-1]["finish_reason"],
        "resume": answers[-1].get("resume", {}).get("id"),
    }
