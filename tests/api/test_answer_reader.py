"""Answers taken apart: what is a thought and what is content."""

from __future__ import annotations

import re
from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from api.answer_parts import Content, Part, Reasoning
from api.answer_reader import AnswerForm, MessageReader, num_reasoning_tokens, read_whole
from api.chat import Ending
from engine.tokenizer import Tokenizer

BYTES = Tokenizer({byte + 1: bytes([byte]) for byte in range(256)})


def joined(parts: Iterable[Part]) -> tuple[str, str]:
    """(thought, content)"""
    parts = list(parts)
    return (
        "".join(part.text for part in parts if isinstance(part, Reasoning)),
        "".join(part.text for part in parts if isinstance(part, Content)),
    )


@pytest.mark.parametrize(
    ("ending", "text", "expected"),
    [
        (Ending.LABEL, " Hello.", ("", "Hello.")),
        (Ending.LABEL, " <think>\nHm.\n</think>\nYes. ", ("Hm.", "Yes. ")),
        (Ending.LABEL, " <thin", ("", "<thin")),
        (Ending.LABEL, "", ("", "")),
        (Ending.LABEL, "so <think>x</think>", ("", "so <think>x</think>")),
        (Ending.THOUGHT_TAG, ">\nHm.\n</think>\n\nYes.", ("Hm.", "Yes.")),
        (Ending.THOUGHT_TAG, "\nHm.</think>Yes.", ("Hm.", "Yes.")),
        (Ending.THOUGHT_TAG, ">\nHm, and", ("Hm, and", "")),
        (Ending.THOUGHT_TAG, ">\nHm </thin", ("Hm </thin", "")),
        (Ending.THOUGHT_TAG, "></think> a </think> b", ("", "a </think> b")),
        (Ending.THOUGHT_TAG, "", ("", "")),
        (Ending.THOUGHT, "> is greater\n</think>\nYes.", ("> is greater", "Yes.")),
        (Ending.CLOSED_TAG, ">\nYes.", ("", "Yes.")),
        (Ending.CLOSED_TAG, "\n\nYes.", ("", "Yes.")),
        (Ending.MIDDLE, " <think>x</think> y", ("", " <think>x</think> y")),
    ],
)
def test_thought_and_content_are_told_apart(ending: Ending, text: str, expected: tuple[str, str]):
    assert joined(read_whole(AnswerForm(ending), text)) == expected


PIECES = st.lists(
    st.sampled_from(["<", "think", ">", "</think>", "</", "</thi", "nk>", " ", "\n", "a", "b"]),
    max_size=14,
)


@given(ending=st.sampled_from(list(Ending)), pieces=PIECES)
def test_what_is_read_does_not_depend_on_the_pieces(ending: Ending, pieces: list[str]):
    reader = MessageReader(AnswerForm(ending))
    streamed = [part for piece in pieces for part in reader.feed(piece)] + reader.finish()
    assert joined(streamed) == joined(read_whole(AnswerForm(ending), "".join(pieces)))
    kinds = [type(part) for part in streamed]
    assert kinds == sorted(kinds, key=[Reasoning, Content].index), "a thought behind the answer"
    assert all(part.text for part in streamed)


# What a whole text looks like: a thought, then the answer.
FORMS = {
    Ending.MIDDLE: r"(?P<thought>)(?P<content>.*)",
    Ending.LABEL: r"\s*(?:<think>\s*(?P<thought>.*?)\s*(?:</think>\s*|$))?(?P<content>.*)",
    Ending.THOUGHT: r"\s*(?P<thought>.*?)\s*(?:</think>\s*|$)(?P<content>.*)",
    Ending.THOUGHT_TAG: r">?\s*(?P<thought>.*?)\s*(?:</think>\s*|$)(?P<content>.*)",
    Ending.CLOSED_TAG: r"(?P<thought>)>?\s*(?P<content>.*)",
}


@given(ending=st.sampled_from(list(Ending)), pieces=PIECES)
def test_reader_agrees_with_the_form_as_a_regular_expression(ending: Ending, pieces: list[str]):
    text = "".join(pieces)
    form = re.fullmatch(FORMS[ending].replace("$", r"\Z"), text, re.DOTALL)
    assert form is not None
    expected = (form["thought"] or "", form["content"])
    assert joined(read_whole(AnswerForm(ending), text)) == expected


@pytest.mark.parametrize(
    ("ending", "text", "expected"),
    [
        (Ending.LABEL, " Hello.", 0),
        (Ending.LABEL, " <think>ab</think>c", len(" <think>ab</think>")),
        (Ending.THOUGHT_TAG, ">ab</think>cd", len(">ab</think>")),
        (Ending.THOUGHT_TAG, ">ab", 3),
        (Ending.CLOSED_TAG, ">\nab", 0),
        (Ending.MIDDLE, "<think>a</think>", 0),
    ],
)
def test_reasoning_tokens_are_those_up_to_the_end_of_the_thought(
    ending: Ending, text: str, expected: int
):
    ids = [*BYTES.encode(text), 0]
    cut = len(ids) if expected == len(ids) - 1 else expected
    assert num_reasoning_tokens(AnswerForm(ending), BYTES, ids) in (expected, cut)


def test_token_across_the_end_of_a_thought_counts_as_reasoning():
    tokenizer = Tokenizer(
        {byte + 1: bytes([byte]) for byte in range(256)} | {257: b"</think>\n", 258: b">\n"}
    )
    ids = tokenizer.encode(">\nab</think>\ncd")
    assert len(ids) == 6
    assert num_reasoning_tokens(AnswerForm(Ending.THOUGHT_TAG), tokenizer, ids) == 4
