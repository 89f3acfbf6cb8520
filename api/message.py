"""MessageReader: the text of a chat answer, taken apart as it comes. Knows no JSON and no HTTP."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, auto

from api.chat import Ending
from engine.tokenizer import Tokenizer

THOUGHT_BEGIN = "<think>"
THOUGHT_END = "</think>"
# What an answer of a given form has in front of it: as regular expressions, each matched as short
# as possible. A history shows the answer as the model would have written it then.
LEADS = {
    Ending.MIDDLE: "",
    Ending.LABEL: " ",
    Ending.THOUGHT: rf"(.|\n)*{THOUGHT_END}\n",
    Ending.THOUGHT_TAG: rf">(.|\n)*{THOUGHT_END}\n",
    Ending.CLOSED_TAG: r">\n",
}


@dataclass(frozen=True, slots=True)
class Content:
    text: str


@dataclass(frozen=True, slots=True)
class Reasoning:
    text: str


Part = Content | Reasoning


@dataclass(frozen=True, slots=True)
class AnswerForm:
    """What an answer may hold, which its prompt decides."""

    ending: Ending = Ending.MIDDLE


class Stage(Enum):
    LEAD = auto()  # before the first word; a thought may begin
    THOUGHT = auto()
    AFTER_THOUGHT = auto()  # white space until the first word
    CONTENT = auto()


class MessageReader:
    """Give it the text in pieces of any size; what it returns does not depend on the pieces.

    White space around a thought and before the first word belongs to the form. A text whose
    prompt ends in the middle of one is content as it is.
    """

    def __init__(self, form: AnswerForm) -> None:
        self._ending = form.ending
        self._stage = Stage.CONTENT if form.ending is Ending.MIDDLE else Stage.LEAD
        self._held = ""
        self._has_reasoned = False

    def feed(self, text: str) -> list[Part]:
        """What became certain, in order."""
        self._held += text
        return self._read(is_end=False)

    def finish(self) -> list[Part]:
        """What was held back, for a text that ends here."""
        return self._read(is_end=True)

    def _read(self, is_end: bool) -> list[Part]:
        parts: list[Part] = []
        if self._stage is Stage.LEAD:
            self._read_lead(is_end)
        if self._stage is Stage.THOUGHT:
            self._read_thought(parts, is_end)
        if self._stage is Stage.AFTER_THOUGHT:
            self._skip_space()
        if self._stage is Stage.CONTENT and self._held:
            parts.append(Content(self._held))
            self._held = ""
        return parts

    def _read_lead(self, is_end: bool) -> None:
        """Find out whether the answer begins with a thought."""
        held = self._held
        if self._ending in (Ending.THOUGHT_TAG, Ending.CLOSED_TAG):
            if held:
                self._held = held.removeprefix(">")
                is_thought = self._ending is Ending.THOUGHT_TAG
                self._stage = Stage.THOUGHT if is_thought else Stage.AFTER_THOUGHT
        elif self._ending is Ending.THOUGHT:
            self._stage = Stage.THOUGHT
        else:
            self._held = held = held.lstrip()
            if held.startswith(THOUGHT_BEGIN):
                self._held = held.removeprefix(THOUGHT_BEGIN)
                self._stage = Stage.THOUGHT
            elif held and (is_end or not THOUGHT_BEGIN.startswith(held)):
                self._stage = Stage.CONTENT

    def _read_thought(self, parts: list[Part], is_end: bool) -> None:
        if not self._has_reasoned:
            self._held = self._held.lstrip()
        thought, tag, rest = self._held.partition(THOUGHT_END)
        if tag:
            self._held, self._stage = rest, Stage.AFTER_THOUGHT
            thought = thought.rstrip()
        elif is_end:
            self._held = ""
            thought = thought.rstrip()
        else:
            certain = len(thought) - _num_uncertain(thought, THOUGHT_END)
            thought, self._held = thought[:certain], thought[certain:]
        if thought:
            self._has_reasoned = True
            parts.append(Reasoning(thought))

    def _skip_space(self) -> None:
        self._held = self._held.lstrip()
        if self._held:
            self._stage = Stage.CONTENT


def read_whole(form: AnswerForm, text: str) -> list[Part]:
    """All parts of a text."""
    reader = MessageReader(form)
    return reader.feed(text) + reader.finish()


def num_reasoning_tokens(form: AnswerForm, tokenizer: Tokenizer, ids: Sequence[int]) -> int:
    """Of the tokens of an answer those that begin before the end of its thought, tags included."""
    if form.ending in (Ending.MIDDLE, Ending.CLOSED_TAG):
        return 0
    data = b"".join(map(tokenizer.token_bytes, ids))
    if form.ending is Ending.LABEL and not data.lstrip().startswith(THOUGHT_BEGIN.encode()):
        return 0
    end = data.find(THOUGHT_END.encode())
    num_left = len(data) if end < 0 else end + len(THOUGHT_END)
    for number, token_id in enumerate(ids):
        if num_left <= 0:
            return number
        num_left -= len(tokenizer.token_bytes(token_id))
    return len(ids)


def _num_uncertain(text: str, tag: str) -> int:
    """Characters at the end that may yet become `tag`, with the white space before them."""
    num_tag = next(
        size for size in range(min(len(tag) - 1, len(text)), -1, -1) if text.endswith(tag[:size])
    )
    certain = text[: len(text) - num_tag].rstrip()
    return len(text) - len(certain)
