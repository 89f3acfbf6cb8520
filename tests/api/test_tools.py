"""Tools over HTTP, with a model that recites the answers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from api.tool_text import Tool, ToolCall, ToolUse, call_text, tools_grammar
from tests.api.harness import Reply, model_table, running
from tests.api.scripted import spelled

PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": PARAMETERS}}
NOW = {"type": "function", "function": {"name": "now", "description": "The time."}}
TOOLS = (Tool("weather", "", PARAMETERS), Tool("now", "The time."))
PARIS = ToolCall("weather", '{"city": "Paris"}')
ROME = ToolCall("weather", '{"city": "Rome \\u007b"}')
ANSWER = f"\nLet me see.\n{call_text(PARIS)}\n{call_text(ROME)}\0"


async def ask(folder: Path, monkeypatch, answer: str = ANSWER, **fields: object) -> list[Reply]:
    """A chat with a model that answers `answer`, whole and streamed; NUL stands for token 0."""
    fields = {"tools": [WEATHER, NOW], **fields}
    async with running(folder) as server:
        prompt = (await server.chat(**fields | {"max_tokens": 1})).json()["usage"]["prompt_tokens"]
        monkeypatch.setattr("tests.api.scripted.SCRIPT", "." * prompt + answer)
        length = {"max_tokens": len(answer)} | fields
        return [await server.chat(**length), await server.chat(stream=True, **length)]


def calls_of(message: dict) -> list[ToolCall]:
    for call in message["tool_calls"]:
        assert call["id"].startswith("call_")
        assert call["type"] == "function"
    functions = [call["function"] for call in message["tool_calls"]]
    return [ToolCall(function["name"], function["arguments"]) for function in functions]


def streamed_message(reply: Reply) -> tuple[dict, str]:
    """The message that a client puts together from the chunks, and the finish reason."""
    message: dict = {"content": "", "tool_calls": []}
    *chunks, last = reply.events()
    for chunk in chunks:
        delta = chunk["choices"][0]["delta"]
        message["content"] += delta.get("content") or ""
        for part in delta.get("tool_calls", []):
            if part["index"] == len(message["tool_calls"]):
                message["tool_calls"].append({key: part[key] for key in ("id", "type", "function")})
            else:
                call = message["tool_calls"][part["index"]]
                call["function"]["arguments"] += part["function"]["arguments"]
    return message, last["choices"][0]["finish_reason"]


async def test_calls_are_whole_or_streamed_the_same(tmp_path: Path, monkeypatch):
    whole, streamed = await ask(tmp_path, monkeypatch)
    (choice,) = whole.json()["choices"]
    assert choice["message"]["content"] == "Let me see."
    assert calls_of(choice["message"]) == [PARIS, ROME]
    assert choice["finish_reason"] == "tool_calls"
    message, reason = streamed_message(streamed)
    assert message["content"] == "Let me see."
    assert calls_of(message) == [PARIS, ROME]
    assert reason == "tool_calls"
    ids = [call["id"] for call in choice["message"]["tool_calls"] + message["tool_calls"]]
    assert len(set(ids)) == 4


async def test_arguments_come_as_they_are_drawn(tmp_path: Path, monkeypatch):
    fields = {"tools": [WEATHER], "stream": True}
    async with running(tmp_path, delay_s=0.001) as server:
        prompt = (await server.chat(max_tokens=1, tools=[WEATHER])).json()["usage"]
        script = "." * prompt["prompt_tokens"] + f"\n{call_text(PARIS)}\0"
        monkeypatch.setattr("tests.api.scripted.SCRIPT", script)
        reply = await server.chat(max_tokens=200, **fields)
    deltas = [chunk["choices"][0]["delta"] for chunk in reply.events()]
    calls = [delta["tool_calls"][0]["function"] for delta in deltas if "tool_calls" in delta]
    assert calls[0] == {"name": "weather", "arguments": ""}
    assert len(calls) > 5
    assert "".join(call["arguments"] for call in calls) == PARIS.arguments


async def test_calls_alone_have_null_content(tmp_path: Path, monkeypatch):
    whole, _ = await ask(tmp_path, monkeypatch, f"\n{call_text(PARIS)}\0")
    assert whole.json()["choices"][0]["message"]["content"] is None


async def test_answer_without_calls_is_text(tmp_path: Path, monkeypatch):
    whole, streamed = await ask(tmp_path, monkeypatch, "\nIt is hot.\0")
    (choice,) = whole.json()["choices"]
    assert choice["message"]["content"] == "It is hot."
    assert "tool_calls" not in choice["message"]
    assert choice["finish_reason"] == "stop"
    assert streamed_message(streamed)[1] == "stop"


@pytest.mark.parametrize("size", [20, 60, 70, len(ANSWER) - 20])
async def test_cut_call_ends_cleanly_with_what_there_was(tmp_path: Path, monkeypatch, size: int):
    whole, streamed = await ask(tmp_path, monkeypatch, ANSWER, max_tokens=size)
    (choice,) = whole.json()["choices"]
    assert choice["finish_reason"] == "length"
    found = calls_of(choice["message"] | {"tool_calls": choice["message"].get("tool_calls", [])})
    for call, full in zip(found, [PARIS, ROME], strict=False):
        assert call.name == full.name
        assert full.arguments.startswith(call.arguments)
    message, reason = streamed_message(streamed)
    assert (calls_of(message), reason) == (found, "length")


@pytest.mark.parametrize(
    ("fields", "use"),
    [
        ({}, ToolUse(TOOLS)),
        ({"tool_choice": "auto"}, ToolUse(TOOLS)),
        ({"tool_choice": "required"}, ToolUse(TOOLS, needs_call=True)),
        ({"parallel_tool_calls": False}, ToolUse(TOOLS, allows_many=False)),
        (
            {"tool_choice": {"type": "function", "function": {"name": "now"}}},
            ToolUse(TOOLS, only="now"),
        ),
    ],
)
async def test_engine_is_given_the_grammar_and_the_tools(
    tmp_path: Path, fields: dict, use: ToolUse
):
    async with running(tmp_path) as server:
        assert (await server.chat(tools=[WEATHER, NOW], **fields)).status == 200
        (sent,) = server.engine.requests
    assert sent.sampling.grammar == tools_grammar(use, "")
    assert bool(sent.sampling.stop) is not use.must_call
    prompt = spelled(sent.prompt_ids)
    assert prompt.startswith("### System\n### `weather`\n")
    assert prompt.endswith("### User\nhi\n### Assistant")


@pytest.mark.parametrize("fields", [{"tools": [WEATHER], "tool_choice": "none"}, {"tools": []}])
async def test_no_tools_leave_no_trace(tmp_path: Path, fields: dict):
    async with running(tmp_path) as server:
        await server.chat(**fields)
        (sent,) = server.engine.requests
    assert sent.sampling.grammar is None
    assert spelled(sent.prompt_ids) == "User: hi\n\nAssistant:"


async def test_result_comes_back_into_the_conversation(tmp_path: Path, monkeypatch):
    whole, _ = await ask(tmp_path, monkeypatch)
    said = whole.json()["choices"][0]["message"]
    first = said["tool_calls"][0]["id"]
    messages = [
        {"role": "user", "content": "hi"},
        said,
        {"role": "tool", "tool_call_id": first, "content": '{"celsius": 31}'},
    ]
    async with running(tmp_path) as server:
        reply = await server.chat(messages=messages, tools=[WEATHER, NOW])
        sent = spelled(server.engine.requests[-1].prompt_ids)
    assert reply.status == 200, reply
    result = '\n### Tool Output\n```json\n{"celsius": 31}\n```\n### Assistant'
    assert sent.endswith("### User\nhi\n### Assistant" + ANSWER.rstrip("\0") + result)


FUNCTION = WEATHER["function"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [{"type": "function"}]}, "tools[0].type"),
        ({"tools": [WEATHER, WEATHER]}, "tools[1].function.name"),
        (
            {"tools": [{"type": "function", "function": {"name": "a b"}}]},
            "tools[0].function.name",
        ),
        (
            {"tools": [NOW, {"type": "function", "function": {"name": "x", "parameters": 3}}]},
            "tools[1].function.parameters",
        ),
        (
            {
                "tools": [
                    NOW,
                    {
                        "type": "function",
                        "function": {"name": "x", "parameters": {"type": "array"}},
                    },
                ]
            },
            "tools[1].function.parameters",
        ),
        (
            {
                "tools": [
                    NOW,
                    {
                        "type": "function",
                        "function": FUNCTION | {"parameters": {"not": {}}, "strict": True},
                    },
                ]
            },
            "tools[1].function.parameters",
        ),
        ({"tools": [NOW] * 200}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [NOW], "tool_choice": "any"}, "tool_choice"),
        (
            {"tools": [NOW], "tool_choice": {"type": "function", "function": {"name": "x"}}},
            "tool_choice",
        ),
        ({"tools": [NOW], "tool_choice": {"type": "allowed_tools"}}, "tool_choice"),
        (
            {
                "tools": [NOW],
                "continue_final_message": True,
                "messages": [{"role": "assistant", "content": "x"}],
            },
            "tools",
        ),
        ({"tools": [NOW], "add_generation_prompt": False}, "tools"),
        ({"functions": [FUNCTION]}, "functions"),
    ],
)
async def test_what_cannot_be_done_is_refused_by_place(tmp_path: Path, fields: dict, param: str):
    async with running(tmp_path) as server:
        reply = await server.chat(**fields)
        assert server.engine.requests == []
    assert (reply.status, reply.error["param"]) == (400, param), reply


async def test_schema_that_says_more_than_can_be_enforced_passes_without_strict(tmp_path: Path):
    parameters = PARAMETERS | {"not": {"required": ["x"]}}
    tool = {"type": "function", "function": FUNCTION | {"parameters": parameters}}
    async with running(tmp_path) as server:
        reply = await server.chat(tools=[tool])
        prompt = spelled(server.engine.requests[-1].prompt_ids)
    assert reply.status == 200
    assert json.dumps(parameters, indent=2) in prompt


async def test_rwkv_rs_template_has_no_form_for_tools(tmp_path: Path):
    call = {"id": "1", "type": "function", "function": {"name": "now", "arguments": "{}"}}
    said = {"role": "assistant", "content": None, "tool_calls": [call]}
    async with running(tmp_path, model_table(template="rwkv-rs")) as server:
        tools = await server.chat(tools=[NOW])
        history = await server.chat(messages=[{"role": "user", "content": "hi"}, said])
        state = await server.post("/v1/states", {"messages": [said]})
    assert (tools.status, tools.error["param"]) == (400, "tools")
    assert (history.status, history.error["param"]) == (400, "messages[1].tool_calls")
    assert (state.status, state.error["param"]) == (400, "messages[0].tool_calls")
