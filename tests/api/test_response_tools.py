"""Tools, thoughts and forms in /v1/responses, judged by OpenAI's own types and accumulator."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from openai import omit
from openai.lib.streaming.responses._responses import ResponseStreamState
from openai.types.responses import Response, ResponseFunctionToolCall, ResponseReasoningItem

from api.tool_text import (
    CALL_OPENING,
    Tool,
    ToolCall,
    ToolUse,
    call_text,
    tools_grammar,
)
from tests.api.harness import Reply, Running, eventually, model_table, running
from tests.api.scripted import spelled
from tests.api.test_responses import EVENT, PATH, ask, body_of, events_of, refusal, well

PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER = {"type": "function", "name": "weather", "parameters": PARAMETERS}
NOW = {"type": "function", "name": "now", "description": "The time.", "strict": False}
TOOLS = (Tool("weather", "", PARAMETERS), Tool("now", "The time."))
PARIS = ToolCall("weather", '{"city": "Paris"}')
ROME = ToolCall("weather", '{"city": "Rome"}')
CALLS = f"\nLet me see.\n{call_text(PARIS)}\n{call_text(ROME)}"
THOUGHT = ">\nHm, Paris.\n</think>\n"


async def answered(server: Running, monkeypatch, answer: str, **fields: object) -> Reply:
    """A response of a model that answers `answer`, which ends by itself."""
    first = well(await ask(server, **fields | {"stream": False, "max_output_tokens": 1}))
    assert first.usage is not None
    script = "." * first.usage.input_tokens + answer + "\0"
    monkeypatch.setattr("tests.api.scripted.SCRIPT", script)
    return await ask(server, **{"max_output_tokens": len(script)} | fields)


def calls_of(response: Response) -> list[ToolCall]:
    found = [item for item in response.output if isinstance(item, ResponseFunctionToolCall)]
    for item in found:
        assert (item.id or "").startswith("fc_")
        assert item.call_id.startswith("call_")
    assert len({item.call_id for item in found}) == len(found)
    return [ToolCall(item.name, item.arguments) for item in found]


def thought_of(response: Response) -> str:
    (item,) = (item for item in response.output if isinstance(item, ResponseReasoningItem))
    assert item.summary == []
    assert item.content is not None
    (part,) = item.content
    return part.text


def accumulated(events: list[dict]) -> list[dict]:
    """The output that the client puts together from the events, and holds against the last one."""
    *before, done, last = (EVENT.validate_python(event) for event in events)
    state: ResponseStreamState = ResponseStreamState(input_tools=[], text_format=omit)
    for event in before:
        state.handle_event(event)
    snapshot = state.accumulate_event(done)
    state.handle_event(last)
    return [item.to_dict() for item in snapshot.output]


class TestCalls:
    async def test_whole_and_streamed_are_the_same(self, tmp_path: Path, monkeypatch):
        fields = {"tools": [WEATHER, NOW]}
        async with running(tmp_path) as server:
            whole = well(await answered(server, monkeypatch, CALLS, **fields))
            reply = await answered(server, monkeypatch, CALLS, stream=True, **fields)
            events = events_of(reply)
            stored = await server.get(f"{PATH}/{events[-1]['response']['id']}")
        assert whole.status == "completed"
        assert [item.type for item in whole.output] == ["message", "function_call", "function_call"]
        assert [item.status for item in whole.output] == ["completed"] * 3
        assert whole.output_text == "Let me see."
        assert calls_of(whole) == [PARIS, ROME]
        streamed = well(stored)
        assert calls_of(streamed) == calls_of(whole)
        assert streamed.output_text == whole.output_text
        assert stored.json() == events[-1]["response"]
        assert events[-1]["type"] == "response.completed"

    async def test_client_puts_the_items_together(self, tmp_path: Path, monkeypatch):
        async with running(tmp_path) as server:
            reply = await answered(server, monkeypatch, CALLS, stream=True, tools=[WEATHER, NOW])
        events = events_of(reply)
        text, *calls = accumulated(events)
        assert text["content"][0]["text"] == "Let me see."
        assert [(call["name"], call["arguments"]) for call in calls] == [
            (PARIS.name, PARIS.arguments),
            (ROME.name, ROME.arguments),
        ]
        names = [event["type"].removeprefix("response.") for event in events]
        assert [name for name in names if not name.endswith("delta")] == [
            "created",
            "in_progress",
            "output_item.added",
            "content_part.added",
            "output_text.done",
            "content_part.done",
            "output_item.done",
            *["output_item.added", "function_call_arguments.done", "output_item.done"] * 2,
            "completed",
        ]
        done = [event["item"] for event in events if event["type"].endswith("item.done")]
        assert done == events[-1]["response"]["output"]
        assert [event["output_index"] for event in events if "item" in event] == [0, 0, 1, 1, 2, 2]

    async def test_arguments_come_as_they_are_drawn(self, tmp_path: Path, monkeypatch):
        async with running(tmp_path, delay_s=0.001) as server:
            answer = f"\n{call_text(PARIS)}"
            reply = await answered(server, monkeypatch, answer, stream=True, tools=[WEATHER])
        deltas = [e["delta"] for e in events_of(reply) if e["type"].endswith("arguments.delta")]
        assert len(deltas) > 5
        assert "".join(deltas) == PARIS.arguments

    @pytest.mark.parametrize("num_left", [len(CALL_OPENING) // 2, 5, 10, 20])
    @pytest.mark.parametrize("is_stream", [False, True])
    async def test_cut_call_is_incomplete_and_ends_cleanly(
        self, tmp_path: Path, monkeypatch, num_left: int, is_stream: bool
    ):
        length = len(CALLS) - num_left
        fields = {"tools": [WEATHER], "max_output_tokens": length, "stream": is_stream}
        async with running(tmp_path) as server:
            reply = await answered(server, monkeypatch, CALLS, **fields)
        response = Response.model_validate(
            events_of(reply)[-1]["response"] if is_stream else reply.json()
        )
        assert response.status == "incomplete"
        assert response.incomplete_details is not None
        assert response.incomplete_details.reason == "max_output_tokens"
        found = calls_of(response)
        assert found[0] == PARIS
        assert ROME.arguments.startswith(found[1].arguments)
        statuses = [item.status for item in response.output]
        assert statuses == ["completed", "completed", "incomplete"]

    @pytest.mark.parametrize(
        ("fields", "use"),
        [
            ({}, ToolUse(TOOLS)),
            ({"tool_choice": "required"}, ToolUse(TOOLS, needs_call=True)),
            ({"parallel_tool_calls": False}, ToolUse(TOOLS, allows_many=False)),
            ({"tool_choice": {"type": "function", "name": "now"}}, ToolUse(TOOLS, only="now")),
        ],
    )
    async def test_choice_is_the_grammar(self, tmp_path: Path, fields: dict, use: ToolUse):
        async with running(tmp_path) as server:
            response = well(await ask(server, tools=[WEATHER, NOW], **fields))
            (sent,) = server.engine.requests
        assert sent.sampling.grammar == tools_grammar(use, "")
        assert bool(sent.sampling.stop) is not use.must_call
        assert spelled(sent.prompt_ids).startswith("### System\n### `weather`\n")
        echo = json.loads(response.model_dump_json(exclude_unset=True))
        assert [tool["name"] for tool in echo["tools"]] == ["weather", "now"]
        assert echo["tool_choice"] == fields.get("tool_choice", "auto")
        assert echo["parallel_tool_calls"] is fields.get("parallel_tool_calls", True)

    async def test_choice_none_leaves_no_trace(self, tmp_path: Path):
        async with running(tmp_path) as server:
            well(await ask(server, tools=[WEATHER], tool_choice="none"))
            (sent,) = server.engine.requests
        assert sent.sampling.grammar is None
        assert spelled(sent.prompt_ids) == "User: hi\n\nAssistant:"


class TestThought:
    @pytest.mark.parametrize("is_stream", [False, True])
    async def test_is_an_item_of_its_own(self, tmp_path: Path, monkeypatch, is_stream: bool):
        fields = {"reasoning": {"effort": "low"}, "stream": is_stream}
        async with running(tmp_path) as server:
            reply = await answered(server, monkeypatch, f"{THOUGHT}Yes.", **fields)
            text = spelled(server.engine.requests[-1].prompt_ids)
        assert text == "User: hi think a bit\n\nAssistant: <think"
        response = Response.model_validate(
            events_of(reply)[-1]["response"] if is_stream else reply.json()
        )
        assert [item.type for item in response.output] == ["reasoning", "message"]
        assert (thought_of(response), response.output_text) == ("Hm, Paris.", "Yes.")
        assert response.usage is not None
        num_tokens = response.usage.output_tokens_details.reasoning_tokens
        assert num_tokens == THOUGHT.index("</think>") + len("</think>")
        assert response.reasoning is not None
        assert response.reasoning.effort == "low"
        if is_stream:
            deltas = [e for e in events_of(reply) if e["type"] == "response.reasoning_text.delta"]
            assert "".join(event["delta"] for event in deltas) == "Hm, Paris."

    async def test_cut_one_is_incomplete(self, tmp_path: Path, monkeypatch):
        fields = {"reasoning": {"effort": "high"}, "max_output_tokens": 6}
        async with running(tmp_path) as server:
            response = well(await answered(server, monkeypatch, f"{THOUGHT}Yes.", **fields))
        (item,) = response.output
        assert (response.status, item.status) == ("incomplete", "incomplete")
        assert thought_of(response) == "Hm,"

    async def test_of_a_template_that_always_thinks(self, tmp_path: Path, monkeypatch):
        answer = "Hm.\n</think>\nYes."
        async with running(tmp_path, model_table(template="rwkv-rs")) as server:
            response = well(await answered(server, monkeypatch, answer))
            refused = await ask(server, reasoning={"effort": "none"})
        assert (thought_of(response), response.output_text) == ("Hm.", "Yes.")
        assert (refused.status, refused.error["param"]) == (400, "reasoning.effort")

    async def test_comes_before_calls(self, tmp_path: Path, monkeypatch):
        fields = {"reasoning": {"effort": "low"}, "tools": [WEATHER], "tool_choice": "required"}
        async with running(tmp_path) as server:
            answer = THOUGHT + call_text(PARIS)
            response = well(await answered(server, monkeypatch, answer, **fields))
        assert [item.type for item in response.output] == ["reasoning", "function_call"]
        assert calls_of(response) == [PARIS]


class TestFormat:
    @pytest.mark.parametrize(
        ("form", "chat_form"),
        [
            ({"type": "json_object"}, {"type": "json_object"}),
            (
                {"type": "json_schema", "name": "n", "schema": PARAMETERS, "strict": True},
                {"type": "json_schema", "json_schema": {"name": "n", "schema": PARAMETERS}},
            ),
            ({"type": "text"}, {"type": "text"}),
        ],
    )
    async def test_is_that_of_a_chat(self, tmp_path: Path, form: dict, chat_form: dict):
        async with running(tmp_path) as server:
            response = well(await ask(server, text={"format": form}))
            await server.chat(response_format=chat_form)
            ours, chats = (request.sampling for request in server.engine.requests)
        assert (ours.grammar, ours.stop) == (chats.grammar, chats.stop)
        assert response.text is not None
        assert response.text.format is not None
        assert response.text.format.to_dict() == form

    async def test_without_a_call_the_answer_has_it(self, tmp_path: Path):
        fields = {"tools": [NOW], "text": {"format": {"type": "json_object"}}}
        async with running(tmp_path) as server:
            well(await ask(server, **fields))
            (sent,) = server.engine.requests
        assert "structure" in (sent.sampling.grammar or "")


async def test_background_gives_the_same_items(tmp_path: Path, monkeypatch):
    async with running(tmp_path) as server:
        whole = well(await answered(server, monkeypatch, CALLS, tools=[WEATHER]))
        body = body_of(tools=[WEATHER], background=True, max_output_tokens=500)
        begun = well(await server.post(PATH, body))
        await eventually(lambda: server.service.background.get("", begun.id) is None)
        ended = well(await server.get(f"{PATH}/{begun.id}"))
    assert calls_of(ended) == calls_of(whole)
    assert ended.output_text == whole.output_text


CALL_ITEM = {"type": "function_call", "call_id": "1", "name": "now", "arguments": "{}"}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [{"type": "function"}]}, "tools[0].name"),
        ({"tools": [NOW, NOW]}, "tools[1].name"),
        ({"tools": [NOW | {"parameters": {"type": "array"}}]}, "tools[0].parameters"),
        ({"tools": [NOW] * 200}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [NOW], "tool_choice": "any"}, "tool_choice"),
        ({"tools": [NOW], "tool_choice": {"type": "function", "name": "x"}}, "tool_choice"),
        ({"tools": [NOW], "tool_choice": {"type": "allowed_tools"}}, "tool_choice"),
        ({"reasoning": {"effort": "xhigh"}}, "reasoning.effort"),
        ({"input": [CALL_ITEM | {"name": None}]}, "input[0].name"),
        ({"input": [CALL_ITEM | {"arguments": "["}]}, "input[0].arguments"),
        ({"input": [CALL_ITEM | {"call_id": None}]}, "input[0].call_id"),
        ({"input": [{"type": "function_call_output", "call_id": "1"}]}, "input[0].output"),
        ({"input": [{"type": "function_call_output", "output": "1"}]}, "input[0].call_id"),
    ],
)
def test_refused_by_place(fields: dict, param: str):
    assert refusal(**fields).param == param


async def test_schemas_that_cannot_be_followed_are_refused_by_place(tmp_path: Path):
    schema = {"type": "object", "not": {}}
    tool = NOW | {"parameters": schema, "strict": True}
    forms = [
        {"type": "json_schema", "name": "n", "schema": schema},
        {"type": "json_schema", "name": "n"},
        {"type": "xml"},
    ]
    async with running(tmp_path) as server:
        found = [await ask(server, tools=[WEATHER, tool])]
        found += [await ask(server, text={"format": form}) for form in forms]
        assert server.engine.requests == []
    assert {reply.status for reply in found} == {400}
    params = [reply.error["param"] for reply in found]
    assert params == ["tools[1].parameters", *["text.format"] * 3]


async def test_rwkv_rs_template_has_no_form_for_tools(tmp_path: Path):
    async with running(tmp_path, model_table(template="rwkv-rs")) as server:
        tools = await ask(server, tools=[NOW])
        history = await ask(server, input=[CALL_ITEM])
    assert (tools.status, tools.error["param"]) == (400, "tools")
    assert (history.status, history.error["param"]) == (400, "input")
