"""Messages to prompts, byte for byte."""

from __future__ import annotations

import re

from hypothesis import given
from hypothesis import strategies as st

from api.chat import ChatMessage, collapse, render

SYSTEM = ChatMessage("system", "Be brief.")
USER = ChatMessage("user", "Hello!")
ASSISTANT = ChatMessage("assistant", "Hi.")
TOOL = ChatMessage("tool", "42")


def test_g1_separates_turns_by_a_blank_line_and_ends_without_a_space():
    text = render([SYSTEM, USER, ASSISTANT, TOOL], "g1")
    assert text == "System: Be brief.\n\nUser: Hello!\n\nAssistant: Hi.\n\nUser: 42\n\nAssistant:"


def test_rwkv_rs_ends_in_an_opened_thought():
    text = render([SYSTEM, USER, ASSISTANT, TOOL], "rwkv-rs")
    assert text == (
        "System: Be brief.\n\nUser: Hello!\n\nAssistant: Hi.\n\nUser: 42\n\nAssistant: <think>\n"
    )


def test_rwkv_rs_changes_nothing_in_the_text():
    raw = " a\r\n\r\n\n b \n"
    assert render([ChatMessage("user", raw)], "rwkv-rs") == f"User: {raw}\n\nAssistant: <think>\n"
    assert render([ChatMessage("user", "")], "rwkv-rs") == "User: \n\nAssistant: <think>\n"


def test_g1_collapses_blank_lines_and_keeps_indentation():
    code = "\r\ndef f():\r\n\r\n    return 1\n \t\n\n\n    # end  \n\n"
    assert collapse(code) == "def f():\n    return 1\n    # end"
    assert render([ChatMessage("user", code)], "g1") == (
        "User: def f():\n    return 1\n    # end\n\nAssistant:"
    )


def test_g1_leaves_no_space_behind_the_label_of_an_empty_message():
    assert render([ChatMessage("user", " \n")], "g1") == "User:\n\nAssistant:"


@given(st.lists(st.text(alphabet="ab \t\n\r\u00a0\u2003", max_size=30), min_size=1, max_size=4))
def test_g1_has_blank_lines_between_turns_only(texts: list[str]):
    prompt = render([ChatMessage("user", text) for text in texts], "g1")
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
