"""Messages to prompts, byte for byte."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from api.chat import ROLE_OF_NAME, ChatMessage, Ending, Template, Thinking, collapse, render

SYSTEM = ChatMessage("system", "Be brief.")
USER = ChatMessage("user", "Hello!")
ASSISTANT = ChatMessage("assistant", "Hi.")
TOOL = ChatMessage("tool", "42")


def test_g1_separates_turns_by_a_blank_line_and_ends_without_a_space():
    text = render([SYSTEM, USER, ASSISTANT, USER], "g1").text
    assert text == (
        "System: Be brief.\n\nUser: Hello!\n\nAssistant: Hi.\n\nUser: Hello!\n\nAssistant:"
    )


def test_rwkv_rs_ends_in_an_opened_thought():
    text = render([SYSTEM, USER, ASSISTANT, TOOL], "rwkv-rs").text
    assert text == (
        "System: Be brief.\n\nUser: Hello!\n\nAssistant: Hi.\n\nUser: 42\n\nAssistant: <think>\n"
    )


def test_rwkv_rs_changes_nothing_in_the_text():
    raw = " a\r\n\r\n\n b \n"
    assert (
        render([ChatMessage("user", raw)], "rwkv-rs").text == f"User: {raw}\n\nAssistant: <think>\n"
    )
    assert render([ChatMessage("user", "")], "rwkv-rs").text == "User: \n\nAssistant: <think>\n"


def test_g1_collapses_blank_lines_and_keeps_indentation():
    code = "\r\ndef f():\r\n\r\n    return 1\n \t\n\n\n    # end  \n\n"
    assert collapse(code) == "def f():\n    return 1\n    # end"
    assert render([ChatMessage("user", code)], "g1").text == (
        "User: def f():\n    return 1\n    # end\n\nAssistant:"
    )


def test_g1_leaves_no_space_behind_the_label_of_an_empty_message():
    assert render([ChatMessage("user", " \n")], "g1").text == "User:\n\nAssistant:"


@given(st.lists(st.text(alphabet="ab \t\n\r\u00a0\u2003", max_size=30), min_size=1, max_size=4))
def test_g1_has_blank_lines_between_turns_only(texts: list[str]):
    prompt = render([ChatMessage("user", text) for text in texts], "g1").text
    blocks = prompt.split("\n\n")
    assert len(blocks) == len(texts) + 1
    assert blocks[-1] == "Assistant:"
    for block, text in zip(blocks, texts, strict=False):
        assert not re.search(r"\n\s*\n|\r", block)
        assert block == block.strip()
        assert re.sub(r"\s+", "", block) == re.sub(r"\s+", "", f"User: {text}")


@given(st.text(alphabet="ab \t\n\r", max_size=40))
def test_collapse_is_idempotent(text: str):
    assert collapse(collapse(text)) == collapse(text)


TEXTS = st.text(alphabet="ab \t\n\r\u00a0", max_size=12)
ROLES = sorted({*ROLE_OF_NAME.values()} - {"tool"})
MESSAGES = st.builds(ChatMessage, st.sampled_from(ROLES), TEXTS)


@pytest.mark.parametrize("template", ["g1", "rwkv-rs"])
@given(
    history=st.lists(MESSAGES, min_size=1, max_size=4),
    answer=TEXTS,
    more=st.lists(MESSAGES, min_size=1, max_size=3),
)
def test_state_and_new_messages_give_the_text_of_the_whole_conversation(
    template: Template, history: list[ChatMessage], answer: str, more: list[ChatMessage]
):
    answer = collapse(answer) if template == "g1" else answer
    # What the model wrote after the opening, and the message that a client makes of it.
    written = f" {answer}" if template == "g1" and answer else answer
    message = ChatMessage("assistant", answer if template == "g1" else f"<think>\n{answer}")
    text_of_state = render(history, template).text + written
    added = render(more, template, is_continuation=True).text
    assert text_of_state + added == render([*history, message, *more], template).text


@pytest.mark.parametrize("template", ["g1", "rwkv-rs"])
@given(
    history=st.lists(MESSAGES, min_size=1, max_size=4),
    more=st.lists(MESSAGES, min_size=1, max_size=3),
)
def test_state_that_ends_with_a_message_goes_on_with_the_next_one(
    template: Template, history: list[ChatMessage], more: list[ChatMessage]
):
    text_of_state = render(history, template, asks_answer=False).text
    added = render(more, template, is_continuation=True).text
    assert text_of_state + added == render([*history, *more], template).text


def test_nothing_is_added_where_an_answer_goes_on():
    assert render([], "g1", is_continuation=True, asks_answer=False).text == ""
    assert render([], "g1", is_continuation=True).text == "\n\nAssistant:"


@pytest.mark.parametrize("template", ["g1", "rwkv-rs"])
@given(messages=st.lists(MESSAGES, min_size=1, max_size=4), is_continuation=st.booleans())
def test_starts_are_where_messages_begin(
    template: Template, messages: list[ChatMessage], is_continuation: bool
):
    rendered = render(messages, template, is_continuation=is_continuation)
    ends = [*(start - 2 for start in rendered.starts[1:]), None]
    for start, end, message in zip(rendered.starts, ends, messages, strict=True):
        alone = render([message], template, asks_answer=False).text
        assert rendered.text[start:].startswith(alone)
        assert end is None or rendered.text[start:end] == alone


@pytest.mark.parametrize(
    ("thinking", "tail"),
    [
        (Thinking.NONE, "User: Hello!\n\nAssistant:"),
        (Thinking.EMPTY, "User: Hello!\n\nAssistant: <think>\n</think"),
        (Thinking.PLAIN, "User: Hello!\n\nAssistant: <think"),
        (Thinking.A_BIT, "User: Hello! think a bit\n\nAssistant: <think"),
        (Thinking.NORMAL, "User: Hello! think\n\nAssistant: <think"),
        (Thinking.A_LOT, "User: Hello! think a lot\n\nAssistant: <think"),
    ],
)
def test_g1_asks_for_thoughts_as_the_model_cards_do(thinking: Thinking, tail: str):
    assert render([SYSTEM, USER], "g1", thinking=thinking).text == f"System: Be brief.\n\n{tail}"
    assert render([SYSTEM, USER], "rwkv-rs", thinking=thinking) == render([SYSTEM, USER], "rwkv-rs")


def test_g1_drops_past_thoughts_from_the_history():
    past = ChatMessage("assistant", "<think>\nHm.\n\nYes.\n</think>\nHi.")
    assert render([USER, past, USER], "g1") == render([USER, ASSISTANT, USER], "g1")
    assert render([USER, past], "g1", asks_answer=False).text.endswith("Assistant: Hi.")


@given(
    history=st.lists(MESSAGES, min_size=1, max_size=4),
    answer=TEXTS,
    more=st.lists(MESSAGES, min_size=1, max_size=3),
    thinking=st.sampled_from([one for one in Thinking if one is not Thinking.NONE]),
)
def test_second_turn_begins_with_what_the_first_one_names_as_shared(
    history: list[ChatMessage], answer: str, more: list[ChatMessage], thinking: Thinking
):
    """So that a snapshot left there is found again, though the thought is dropped."""
    first = render(history, "g1", thinking=thinking)
    shared = first.text[: first.starts[-1]]
    assert len(first.starts) == len(history) + 1
    assert shared == render(history, "g1", asks_answer=False).text
    message = ChatMessage("assistant", f"<think>\nhm\n</think>\n{answer}")
    second = render([*history, message, *more], "g1", thinking=thinking)
    assert second.text.startswith(shared)


@pytest.mark.parametrize(
    ("answer", "tail", "ending"),
    [
        ("Once upon", "Assistant: Once upon", Ending.MIDDLE),
        ("", "Assistant:", Ending.LABEL),
        ("<think>\nI am", "Assistant: <think>\nI am", Ending.THOUGHT),
        ("<think>\nhm\n</think>\nSo", "Assistant: <think>\nhm\n</think>\nSo", Ending.MIDDLE),
    ],
)
def test_answer_that_is_gone_on_with_ends_the_prompt(answer: str, tail: str, ending: Ending):
    messages = [USER, ChatMessage("assistant", answer)]
    rendered = render(messages, "g1", continues_last=True, thinking=Thinking.NORMAL)
    assert rendered.text == f"User: Hello!\n\n{tail}"
    assert rendered.ending is ending
