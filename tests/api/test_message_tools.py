"""Tools, thoughts and forms in /v1/messages, judged by Anthropic's own types and accumulator."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from anthropic.lib.streaming._messages import accumulate_event
from anthropic.types import Message, ThinkingBlock, ToolUseBlock

from api.errors import ApiError
from api.message_body import parse_messages
from api.tool_text import Tool, ToolCall, ToolUse, call_text, tools_grammar
from tests.api.harness import Reply, Running, model_table, running
from tests.api.scripted import spelled
from tests.api.test_messages import (
    EVENT,
    PATH,
    USER,
    ask,
    body_of,
    error_of,
    events_of,
    prompt_of,
    well,
)

SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER = {"name": "weather", "input_schema": SCHEMA}
NOW = {"name": "now", "description": "The time.", "input_schema": {"type": "object"}}
TOOLS = (Tool("weather", "", SCHEMA), Tool("now", "The time.", {"type": "object"}))
PARIS = ToolCall("weather", '{"city": "Paris"}')
ROME = ToolCall("weather", '{"city": "Röme {"}')
CALLS = f"\nLet me see.\n{call_text(PARIS)}\n{call_text(ROME)}"
THOUGHT = ">\nHm, Paris.\n</think>\n"
THINK = {"thinking": {"type": "enabled", "budget_tokens": 1024}}


async def answered(server: Running, monkeypatch, answer: str, **fields: object) -> Reply:
    """A message of a model that answers `answer`, which ends by itself."""
    usage = well(await ask(server, **fields | {"stream": False, "max_tokens": 1})).usage
    num_tokens = usage.input_tokens + (usage.cache_read_input_tokens or 0)
    script = "." * num_tokens + answer + "\0"
    assert script.isascii() or max(map(ord, script)) < 256
    monkeypatch.setattr("tests.api.scripted.SCRIPT", script)
    return await ask(server, **{"max_tokens": len(script)} | fields)


def accumulated(reply: Reply) -> Message:
    """What the client makes of the events."""
    snapshot, buffers = None, {}
    for event in events_of(reply):
        if event["type"] != "ping":
            snapshot = accumulate_event(
                event=EVENT.validate_python(event), current_snapshot=snapshot, json_bufs=buffers
            )
    assert snapshot is not None
    return snapshot


def calls_of(message: Message) -> list[tuple[str, dict[str, object]]]:
    found = [block for block in message.content if isinstance(block, ToolUseBlock)]
    assert all(block.id.startswith("toolu_") for block in found)
    assert len({block.id for block in found}) == len(found)
    return [(block.name, block.input) for block in found]


def thought_of(message: Message) -> str:
    (block,) = (block for block in message.content if isinstance(block, ThinkingBlock))
    assert block.signature == ""
    return block.thinking


def texts_of(message: Message) -> list[str]:
    return [block.text for block in message.content if block.type == "text"]


class TestCalls:
    @pytest.mark.parametrize("is_stream", [False, True])
    async def test_are_blocks(self, tmp_path: Path, monkeypatch, is_stream: bool):
        fields = {"tools": [WEATHER, NOW], "stream": is_stream}
        answer = CALLS.replace("ö", "\\u00f6")
        async with running(tmp_path) as server:
            reply = await answered(server, monkeypatch, answer, **fields)
        message = accumulated(reply) if is_stream else well(reply)
        assert [block.type for block in message.content] == ["text", "tool_use", "tool_use"]
        assert texts_of(message) == ["Let me see."]
        assert calls_of(message) == [
            ("weather", {"city": "Paris"}),
            ("weather", {"city": "Röme {"}),
        ]
        assert (message.stop_reason, message.stop_sequence) == ("tool_use", None)

    async def test_arguments_come_as_they_are_drawn(self, tmp_path: Path, monkeypatch):
        async with running(tmp_path, delay_s=0.001) as server:
            fields = {"tools": [WEATHER], "stream": True}
            events = events_of(
                await answered(server, monkeypatch, f"\n{call_text(PARIS)}", **fields)
            )
        starts = [event for event in events if event["type"] == "content_block_start"]
        assert [start["content_block"]["input"] for start in starts] == [{}]
        deltas = [event["delta"] for event in events if event["type"] == "content_block_delta"]
        assert len(deltas) > 5
        assert "".join(delta["partial_json"] for delta in deltas) == PARIS.arguments
        places = [event["index"] for event in events if "index" in event]
        assert places == [0] * (len(deltas) + 2)

    async def test_block_begins_empty_though_its_text_comes_at_once(
        self, tmp_path: Path, monkeypatch
    ):
        async with running(tmp_path) as server:
            fields = {"tools": [WEATHER], "stream": True}
            reply = await answered(server, monkeypatch, f"\nSo.\n{call_text(PARIS)}", **fields)
        assert texts_of(accumulated(reply)) == ["So."]

    async def test_cut_call_ends_cleanly(self, tmp_path: Path, monkeypatch):
        answer = f"\n{call_text(PARIS)}"
        length = answer.index("Par") + 3
        fields = {"tools": [WEATHER], "max_tokens": length}
        async with running(tmp_path) as server:
            whole = well(await answered(server, monkeypatch, answer, **fields))
            reply = await answered(server, monkeypatch, answer, stream=True, **fields)
        assert whole.stop_reason == accumulated(reply).stop_reason == "max_tokens"
        assert calls_of(whole) == [("weather", {})]
        deltas = [e["delta"] for e in events_of(reply) if e["type"] == "content_block_delta"]
        assert "".join(delta["partial_json"] for delta in deltas) == '{"city": "Par'

    async def test_cut_behind_its_arguments_it_has_them(self, tmp_path: Path, monkeypatch):
        number = ToolCall("weather", '{"city": 12345678901234567890.5}')
        answer = f"\n{call_text(number)}"
        fields = {"tools": [WEATHER], "max_tokens": answer.index(".5") + 3}
        async with running(tmp_path) as server:
            reply = await answered(server, monkeypatch, answer, **fields)
        assert well(reply).stop_reason == "max_tokens"
        assert number.arguments.encode() in reply.body

    @pytest.mark.parametrize(
        ("choice", "use"),
        [
            (None, ToolUse(TOOLS)),
            (
                {"type": "auto", "disable_parallel_tool_use": True},
                ToolUse(TOOLS, allows_many=False),
            ),
            ({"type": "any"}, ToolUse(TOOLS, needs_call=True)),
            (
                {"type": "any", "disable_parallel_tool_use": True},
                ToolUse(TOOLS, needs_call=True, allows_many=False),
            ),
            ({"type": "tool", "name": "now"}, ToolUse(TOOLS, only="now")),
        ],
    )
    async def test_choice_is_the_grammar(self, tmp_path: Path, choice: dict | None, use: ToolUse):
        fields = {"tools": [WEATHER, NOW | {"type": "custom"}], "stop_sequences": ["x"]}
        async with running(tmp_path) as server:
            well(await ask(server, tool_choice=choice, **fields))
            (sent,) = server.engine.requests
        assert sent.sampling.grammar == tools_grammar(use, "")
        assert sent.sampling.stop[0] == "x"
        assert (len(sent.sampling.stop) > 1) is not use.must_call
        assert spelled(sent.prompt_ids).startswith("### System\n### `weather`\n")

    async def test_choice_none_leaves_no_trace(self, tmp_path: Path):
        async with running(tmp_path) as server:
            well(await ask(server, tools=[WEATHER], tool_choice={"type": "none"}))
            (sent,) = server.engine.requests
        assert sent.sampling.grammar is None
        assert spelled(sent.prompt_ids) == "User: hi\n\nAssistant:"

    async def test_count_counts_tools(self, tmp_path: Path):
        body = {"model": "m", "messages": [USER], "tools": [WEATHER], **THINK}
        async with running(tmp_path) as server:
            count = (await server.post(f"{PATH}/count_tokens", body)).json()["input_tokens"]
            usage = well(await ask(server, tools=[WEATHER], **THINK)).usage
        assert count == usage.input_tokens > 100


def use_block(number: int, call: ToolCall) -> dict:
    given = {"name": call.name, "input": json.loads(call.arguments)}
    return {"type": "tool_use", "id": f"toolu_{number}", **given}


def result(number: int, **fields: object) -> dict:
    return {"type": "tool_result", "tool_use_id": f"toolu_{number}", **fields}


def text(words: str) -> dict:
    return {"type": "text", "text": words}


class TestResults:
    async def test_answer_comes_back_to_the_letter(self, tmp_path: Path, monkeypatch):
        async with running(tmp_path) as server:
            fields = {"tools": [WEATHER], **THINK}
            answer = THOUGHT + CALLS[1:].replace("ö", "o")
            message = well(await answered(server, monkeypatch, answer, **fields))
            assert thought_of(message) == "Hm, Paris."
            said = {"role": "assistant", "content": message.to_dict()["content"]}
            found = {"role": "user", "content": [result(1, content="31"), result(2), text("Well?")]}
            sent = await prompt_of(server, messages=[USER, said, found], tools=[WEATHER])
        shown = CALLS.replace("ö", "o")
        assert sent.endswith(
            f"### User\nhi\n### Assistant{shown}\n### Tool Output\n```json\n31\n```\n"
            '### Tool Output\n```json\n""\n```\n### User\nWell?\n### Assistant'
        )

    async def test_content_may_be_blocks_and_an_error(self, tmp_path: Path):
        parts = [result(1, content=[text("a"), text("b")]), result(2, content="no", is_error=True)]
        said = [use_block(1, PARIS), use_block(2, ROME)]
        turns = [
            USER,
            {"role": "assistant", "content": said},
            {"role": "user", "content": parts},
        ]
        async with running(tmp_path) as server:
            sent = await prompt_of(server, messages=turns)
        assert sent.endswith(
            '### Tool Output\n```json\n"a\\nb"\n```\n'
            '### Tool Output\n```json\n"Error: no"\n```\n### Assistant'
        )
        assert call_text(ROME) in sent

    async def test_text_behind_a_call_is_a_message_of_its_own(self, tmp_path: Path):
        said = [text("a"), use_block(1, PARIS), text("b"), text("c")]
        turns = [USER, {"role": "assistant", "content": said}, USER]
        async with running(tmp_path) as server:
            sent = await prompt_of(server, messages=turns)
        assert f"### Assistant\na\n{call_text(PARIS)}\n### Assistant\nb\nc\n### User" in sent

    async def test_thoughts_of_the_past_are_not_shown(self, tmp_path: Path):
        thoughts = [
            {"type": "thinking", "thinking": "Hm.", "signature": "s"},
            {"type": "redacted_thinking", "data": "x"},
            text("Yes."),
        ]
        turns = [USER, {"role": "assistant", "content": thoughts}, USER]
        async with running(tmp_path) as server:
            sent = await prompt_of(server, messages=turns)
        assert sent == "User: hi\n\nAssistant: Yes.\n\nUser: hi\n\nAssistant:"


class TestThought:
    @pytest.mark.parametrize("is_stream", [False, True])
    async def test_is_a_block_of_its_own(self, tmp_path: Path, monkeypatch, is_stream: bool):
        fields = {"stream": is_stream, **THINK}
        async with running(tmp_path) as server:
            reply = await answered(server, monkeypatch, f"{THOUGHT}Yes.", **fields)
        message = accumulated(reply) if is_stream else well(reply)
        assert [block.type for block in message.content] == ["thinking", "text"]
        assert (thought_of(message), texts_of(message)) == ("Hm, Paris.", ["Yes."])
        assert message.stop_reason == "end_turn"
        details = message.usage.output_tokens_details
        assert details is not None
        assert details.thinking_tokens == THOUGHT.index("</think>") + len("</think>")

    async def test_cut_one_is_all_there_is(self, tmp_path: Path, monkeypatch):
        async with running(tmp_path) as server:
            message = well(await answered(server, monkeypatch, THOUGHT, max_tokens=6, **THINK))
        assert (thought_of(message), message.stop_reason) == ("Hm,", "max_tokens")

    @pytest.mark.parametrize(
        ("fields", "tail"),
        [
            ({"thinking": {"type": "disabled"}}, "User: hi\n\nAssistant:"),
            (THINK, "User: hi think\n\nAssistant: <think"),
            ({"thinking": {"type": "adaptive"}}, "User: hi think\n\nAssistant: <think"),
            ({"output_config": {"effort": "low"}}, "User: hi think a bit\n\nAssistant: <think"),
            (
                {"thinking": {"type": "adaptive"}, "output_config": {"effort": "max"}},
                "User: hi think a lot\n\nAssistant: <think",
            ),
            (
                {"thinking": {"type": "disabled"}, "output_config": {"effort": "max"}},
                "User: hi\n\nAssistant:",
            ),
        ],
    )
    async def test_request_chooses_the_ending(self, tmp_path: Path, fields: dict, tail: str):
        async with running(tmp_path) as server:
            assert await prompt_of(server, **fields) == tail

    async def test_of_a_template_that_always_thinks(self, tmp_path: Path, monkeypatch):
        async with running(tmp_path, model_table(template="rwkv-rs")) as server:
            message = well(await answered(server, monkeypatch, "Hm.\n</think>\nYes."))
            refused = await ask(server, thinking={"type": "disabled"})
            calls = await ask(server, tools=[NOW])
        assert (thought_of(message), texts_of(message)) == ("Hm.", ["Yes."])
        assert "'thinking.type'" in error_of(refused)[2]
        assert "'tools'" in error_of(calls)[2]


class TestFormat:
    @pytest.mark.parametrize(
        "fields",
        [
            {"output_config": {"format": {"type": "json_schema", "schema": SCHEMA}}},
            {"output_format": {"type": "json_schema", "schema": SCHEMA}},
        ],
    )
    async def test_is_that_of_a_chat(self, tmp_path: Path, fields: dict):
        chat_form = {"type": "json_schema", "json_schema": {"schema": SCHEMA}}
        async with running(tmp_path) as server:
            well(await ask(server, **fields))
            await server.chat(response_format=chat_form)
            ours, chats = (request.sampling for request in server.engine.requests)
        assert (ours.grammar, ours.stop) == (chats.grammar, chats.stop)
        assert ours.grammar is not None

    async def test_goes_with_the_beginning_of_an_answer(self, tmp_path: Path):
        turns = [USER, {"role": "assistant", "content": "{"}]
        async with running(tmp_path) as server:
            form = {"type": "json_schema", "schema": SCHEMA}
            assert (await prompt_of(server, messages=turns, output_format=form))[-1] == "{"


BEGUN = [USER, {"role": "assistant", "content": "So"}]
FORM = {"type": "json_schema", "schema": SCHEMA}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [{"type": "bash_20250124", "name": "bash"}]}, "tools[0].type"),
        ({"tools": [{"name": "x"}]}, "tools[0].input_schema"),
        ({"tools": [NOW | {"name": "a b"}]}, "tools[0].name"),
        ({"tools": [NOW, NOW]}, "tools[1].name"),
        ({"tools": [NOW | {"input_schema": {"type": "array"}}]}, "tools[0].input_schema"),
        ({"tools": [NOW] * 200}, "tools"),
        ({"tool_choice": {"type": "any"}}, "tool_choice"),
        ({"tools": [NOW], "tool_choice": {"type": "function"}}, "tool_choice.type"),
        ({"tools": [NOW], "tool_choice": {"type": "tool"}}, "tool_choice"),
        ({"tools": [NOW], "tool_choice": {"type": "any", "name": "now"}}, "tool_choice"),
        ({"tools": [NOW], "tool_choice": {"type": "tool", "name": "x"}}, "tool_choice"),
        ({"thinking": {"type": "always"}}, "thinking.type"),
        ({"thinking": {"type": "enabled", "budget_tokens": 0}}, "thinking.budget_tokens"),
        ({"thinking": {"type": "enabled", "display": "omitted"}}, "thinking.display"),
        ({"output_config": {"effort": "none"}}, "output_config.effort"),
        ({"messages": BEGUN, "tools": [NOW]}, "tools"),
        ({"messages": BEGUN, **THINK}, "thinking.type"),
        ({"messages": BEGUN, "output_config": {"effort": "low"}}, "output_config.effort"),
        (
            {"messages": [USER, {"role": "assistant", "content": [use_block(1, PARIS)]}]},
            "messages",
        ),
        (
            {"messages": [{"role": "user", "content": [use_block(1, PARIS)]}]},
            "messages[0].content[0]",
        ),
        (
            {"messages": [{"role": "assistant", "content": [result(1)]}]},
            "messages[0].content[0]",
        ),
        (
            {"messages": [{"role": "user", "content": [result(1, content=[{"type": "image"}])]}]},
            "messages[0].content[0].content[0]",
        ),
        (
            {"messages": [USER, {"role": "assistant", "content": [{"type": "tool_use"}]}]},
            "messages[1].content[0].name",
        ),
    ],
)
def test_refused_by_place(fields: dict, param: str):
    with pytest.raises(ApiError) as caught:
        parse_messages(json.dumps(body_of(**fields)).encode()).chat_messages()
    assert (caught.value.status, caught.value.param) == (400, param)


@pytest.mark.parametrize(
    ("fields", "place"),
    [
        ({"output_format": {"type": "text"}}, "output_format"),
        ({"output_format": FORM, "output_config": {"format": FORM}}, "output_format"),
        ({"output_config": {"format": {"type": "json_schema"}}}, "output_config.format.schema"),
        ({"output_config": {"format": FORM | {"schema": {"not": {}}}}}, "output_config.format"),
        (
            {"tools": [WEATHER, NOW | {"input_schema": {"not": {}}, "strict": True}]},
            "tools[1].input_schema",
        ),
    ],
)
async def test_what_cannot_be_followed_is_refused_by_place(
    tmp_path: Path, fields: dict, place: str
):
    async with running(tmp_path) as server:
        status, kind, message = error_of(await ask(server, **fields))
        assert server.engine.requests == []
    assert (status, kind) == (400, "invalid_request_error")
    assert f"'{place}" in message
