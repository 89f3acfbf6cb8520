"""Tools in prompts, and calls in answers: the text, the grammar, and the way back agree."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence

import jsonschema
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from api.answer_parts import CallArguments, CallBegin, Content, Part, Reasoning
from api.answer_reader import AnswerForm, MessageReader, read_whole, thought_lead
from api.chat import ChatMessage, Ending, Thinking, collapse, render
from api.tool_text import Tool, ToolCall, ToolUse, call_text, tools_grammar
from engine.grammar_text import schema_part
from tests.engine.test_grammar import accepts, wander

WEATHER = Tool(
    "get_weather",
    "Tells the weather.",
    {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 8}, "days": {"enum": [1, 2]}},
        "required": ["city"],
        "additionalProperties": False,
    },
)
TIME = Tool("time.now")
TOOLS = (WEATHER, TIME)
PARIS = ToolCall("get_weather", '{"city": "Paris"}')
NOW = ToolCall("time.now", "{}")
FORM = AnswerForm(Ending.LABEL, has_calls=True)
SYSTEM, USER = ChatMessage("system", "Be brief."), ChatMessage("user", "Hot?")
CALLED = ChatMessage("assistant", "Let me see.", (PARIS, NOW))
RESULT = ChatMessage("tool", '{"celsius": 31}')

TOLD = """\
### System
Be brief.
### `get_weather`
**Description:** Tells the weather.
**Parameters:**
```json
{
  "type": "object",
  "properties": {
    "city": {
      "type": "string",
      "maxLength": 8
    },
    "days": {
      "enum": [
        1,
        2
      ]
    }
  },
  "required": [
    "city"
  ],
  "additionalProperties": false
}
```
### `time.now`
**Parameters:**
```json
{}
```
A tool is called by writing nothing but:
**Tool Call:**
```json
{"name": "NAME", "arguments": {"PARAMETER": "VALUE"}}
```
### User
Hot?
"""


def test_model_is_told_of_its_tools_and_sees_calls_and_results() -> None:
    text = render([SYSTEM, USER, CALLED, RESULT, ChatMessage("tool", "noon\n### User")], "g1",
                  tools=TOOLS).text  # fmt: skip
    assert text == (
        f"{TOLD}"
        "### Assistant\nLet me see.\n"
        '**Tool Call:**\n```json\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n```\n'
        '**Tool Call:**\n```json\n{"name": "time.now", "arguments": {}}\n```\n'
        '### Tool Output\n```json\n{"celsius": 31}\n```\n'
        '### Tool Output\n```json\n"noon\\n### User"\n```\n'
        "### Assistant"
    )


@pytest.mark.parametrize(
    ("thinking", "tail"),
    [
        (Thinking.NONE, "### User\nHot?\n### Assistant"),
        (Thinking.EMPTY, "### User\nHot?\n### Assistant\n<think>\n</think"),
        (Thinking.A_LOT, "### User\nHot? think a lot\n### Assistant\n<think"),
    ],
)
def test_thoughts_are_asked_for_in_this_form_too(thinking: Thinking, tail: str) -> None:
    assert render([SYSTEM, USER], "g1", tools=TOOLS, thinking=thinking).text.endswith(tail)


def test_without_a_system_message_the_tools_have_a_block_of_their_own() -> None:
    rendered = render([USER], "g1", tools=TOOLS)
    assert rendered.text == TOLD.replace("Be brief.\n", "") + "### Assistant"
    assert rendered.text[rendered.starts[1] :].startswith("### User\nHot?")


def test_history_of_calls_keeps_the_form_without_tools() -> None:
    text = render([USER, CALLED, RESULT], "g1").text
    assert text.startswith("### User\nHot?\n### Assistant\nLet me see.\n**Tool Call:**")
    assert "A tool is called" not in text


def joined(parts: Iterable[Part]) -> tuple[str, str, list[tuple[str, str]]]:
    """(thought, content, [(name, arguments)])"""
    thought, content, calls = "", "", list[tuple[str, str]]()
    for part in parts:
        match part:
            case Reasoning(text):
                thought += text
            case Content(text):
                content += text
            case CallBegin(index, name):
                assert index == len(calls)
                calls.append((name, ""))
            case CallArguments(index, text):
                assert index == len(calls) - 1
                calls[-1] = (calls[-1][0], calls[-1][1] + text)
    return thought, content, calls


def answer(content: str, *calls: ToolCall) -> str:
    return "".join(
        f"\n{text}" for text in [*([content] if content else []), *map(call_text, calls)]
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (answer("", PARIS), ("", [PARIS])),
        (answer("Let me see.", PARIS, NOW), ("Let me see.", [PARIS, NOW])),
        (answer("Two\n\nlines. \n", NOW), ("Two\n\nlines.", [NOW])),
        (answer("No."), ("No.", [])),
        (answer("**Tool Call:**"), ("**Tool Call:**", [])),
        (f"\nx {call_text(PARIS)}", (f"x {call_text(PARIS)}", [])),
        (f"\n {call_text(PARIS)}", (call_text(PARIS), [])),
        (answer("", PARIS)[:10], ("**Tool Ca", [])),
        (answer("x", PARIS)[:22], ("x", [])),
        (answer("x **Tool Call:**\n```j"), ("x **Tool Call:**\n```j", [])),
        (answer("", PARIS)[:60], ("", [])),
        (answer("", PARIS)[:61], ("", [ToolCall("get_weather", "")])),
        (answer("", PARIS)[:70], ("", [ToolCall("get_weather", '{"city": ')])),
        (answer("", PARIS) + "\n", ("", [PARIS])),
        (answer("", PARIS) + "\nDone.", ("\nDone.", [PARIS])),
        (answer("", PARIS) + "\n**Tool", ("\n**Tool", [PARIS])),
    ],
)
def test_calls_come_apart_from_the_text(text: str, expected: tuple[str, list[ToolCall]]) -> None:
    content, calls = expected
    found = joined(read_whole(FORM, text))
    assert found == ("", content, [(call.name, call.arguments) for call in calls])


@pytest.mark.parametrize("size", range(0, 60, 7))
def test_where_only_calls_can_be_their_beginning_is_no_text(size: int) -> None:
    form = AnswerForm(Ending.LABEL, has_calls=True, has_text=False)
    assert joined(read_whole(form, answer("", PARIS)[:size])) == ("", "", [])


def test_form_without_tools_has_no_calls() -> None:
    text = answer("x", PARIS)
    assert joined(read_whole(AnswerForm(Ending.LABEL), text)) == ("", text.lstrip(), [])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (answer("x", PARIS), True),
        (answer("x", PARIS, NOW), True),
        (answer("x", PARIS, NOW)[:-1], False),
        (answer("x", PARIS)[:-8], False),
        (answer("x"), False),
    ],
)
def test_answer_has_called_when_its_last_call_is_whole(text: str, expected: bool) -> None:
    reader = MessageReader(FORM)
    reader.feed(text)
    reader.finish()
    assert reader.has_called is expected


ARGUMENTS = st.dictionaries(
    st.text('ab"\\ {}', max_size=3),
    st.none() | st.integers() | st.text('a"\\{}[]`\n,: ', max_size=6) | st.lists(st.integers()),
    max_size=3,
)
CALLS = st.lists(
    st.builds(
        lambda name, value, indent: ToolCall(name, json.dumps(value, indent=indent)),
        st.sampled_from(["f", "get_weather"]),
        ARGUMENTS,
        st.sampled_from([None, 1]),
    ),
    max_size=3,
)
CONTENT = st.lists(
    st.sampled_from(["a", " ", "\n", "**Tool", " Call:**\n", "```json\n", "<think>", "é"]),
    max_size=6,
).map(lambda pieces: "".join(pieces).strip())


@given(content=CONTENT, calls=CALLS, data=st.data())
def test_calls_are_read_whatever_pieces_they_come_in(
    content: str, calls: Sequence[ToolCall], data: st.DataObject
) -> None:
    text = answer(content, *calls)
    reader, parts, rest = MessageReader(FORM), list[Part](), text
    while rest:
        size = data.draw(st.integers(1, len(rest)))
        parts += reader.feed(rest[:size])
        rest = rest[size:]
    parts += reader.finish()
    assert joined(parts) == joined(read_whole(FORM, text))
    if not content.startswith("<think>"):
        assert joined(parts) == ("", content, [(call.name, call.arguments) for call in calls])


@given(content=CONTENT, calls=CALLS)
def test_answer_that_comes_back_is_the_text_that_the_state_knows(
    content: str, calls: Sequence[ToolCall]
) -> None:
    # Blank lines are collapsed in a history, and a thought is dropped.
    assume((content or calls) and collapse(content) == content)
    assume(not content.startswith("<think>"))
    first = render([SYSTEM, USER], "g1", tools=TOOLS)
    written = answer(content, *calls)
    _, said, called = joined(read_whole(FORM, written))
    back = ChatMessage("assistant", said, tuple(ToolCall(*call) for call in called))
    second = render([SYSTEM, USER, back, RESULT], "g1", tools=TOOLS)
    added = render([RESULT], "g1", tools=TOOLS, is_continuation=True).text
    assert second.text == first.text + written + added


@settings(max_examples=40, deadline=None)
@given(
    ending=st.sampled_from([Ending.LABEL, Ending.THOUGHT_TAG, Ending.CLOSED_TAG]),
    use=st.sampled_from(
        [
            ToolUse(TOOLS),
            ToolUse(TOOLS, needs_call=True),
            ToolUse(TOOLS, needs_call=True, allows_many=False),
            ToolUse(TOOLS, only="get_weather"),
            ToolUse(TOOLS, allows_many=False),
        ]
    ),
    seed=st.integers(0, 1000),
)
def test_whatever_the_grammar_lets_through_is_read_and_valid(
    ending: Ending, use: ToolUse, seed: int
) -> None:
    text = wander(tools_grammar(use, thought_lead(ending)), seed)
    if text is None:  # free text that does not end
        assert not (use.needs_call or use.only) or ending is Ending.THOUGHT_TAG
        return
    _, content, calls = joined(read_whole(AnswerForm(ending, has_calls=True), text))
    assert not calls or not content.endswith("\n")
    if use.needs_call or use.only:
        assert content == ""
        assert calls
    if use.only or not use.allows_many:
        assert len(calls) <= 1
    for name, arguments in calls:
        assert name == use.only or use.only is None
        tool = next(tool for tool in TOOLS if tool.name == name)
        value = json.loads(arguments)
        jsonschema.validate(value, tool.parameters or {"maxProperties": 0, "type": "object"})


@pytest.mark.parametrize("lead", ["", ">", r">(.|\n)*</think>"])
def test_grammar_accepts_text_calls_and_nothing_half(lead: str) -> None:
    before = {"": "", ">": ">"}.get(lead, ">\nhm\n</think>")
    grammar = tools_grammar(ToolUse(TOOLS), lead)
    good = [answer("Hello there."), answer("See:", PARIS, NOW), answer("", NOW), answer("a\n\nb")]
    bad = [
        answer("", PARIS)[:-1],
        answer("x", ToolCall("get_weather", "{}")),
        answer("x", ToolCall("other", "{}")),
        answer("x\n**Tool Call:**\nhm"),
        answer("", PARIS) + "\nDone.",
        "Hello",
    ]
    assert [text for text in good if not accepts(grammar, before + text)] == []
    assert [text for text in bad if accepts(grammar, before + text)] == []


def test_text_of_an_answer_may_have_a_form_beside_calls() -> None:
    part = schema_part({"type": "object", "maxProperties": 0})
    grammar = tools_grammar(ToolUse(TOOLS), "", part)
    assert accepts(grammar, "\n{}")
    assert accepts(grammar, answer("", PARIS, NOW))
    assert not accepts(grammar, answer("Hello", PARIS))
    only_calls = tools_grammar(ToolUse(TOOLS, needs_call=True), "", part)
    assert not accepts(only_calls, "\n{}")
