"""MessageReader: the text of a chat answer, taken apart as it comes. Knows no JSON and no HTTP."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, auto

import msgspec

from api.answer_parts import Content, Part, Reasoning, num_uncertain
from api.call_reader import CallReader
from api.chat import Ending
from api.tool_text import CALL_OPENING, MARKER_LINE
from engine.tokenizer import Tokenizer

THOUGHT_BEGIN = "<think>"
THOUGHT_END = "</think>"


@dataclass(frozen=True, slots=True)
class AnswerForm:
    """What an answer may hold, which its prompt decides."""

    ending: Ending = Ending.MIDDLE
    has_calls: bool = False
    has_text: bool = True  # beside calls

    def memo(self) -> str:
        """As a text, so that a resumed answer is read on as it began."""
        return msgspec.json.encode(self).decode()

    @classmethod
    def of_memo(cls, memo: str) -> AnswerForm:
        return msgspec.json.decode(memo, type=cls)


def thought_lead(ending: Ending) -> str:
    """The rest of a thought: a regular expression, to be matched as short as possible."""
    if ending in (Ending.MIDDLE, Ending.LABEL):
        return ""
    tag = "" if ending is Ending.THOUGHT else ">"
    return tag if ending is Ending.CLOSED_TAG else rf"{tag}(.|\n)*{THOUGHT_END}"


def answer_lead(ending: Ending, joint: str) -> str:
    """What an answer has in front of it where a grammar says what it is, likewise. `joint` is
    what a history has between label and answer."""
    if ending is Ending.MIDDLE:
        return ""
    return joint if ending is Ending.LABEL else rf"{thought_lead(ending)}\n"


class Stage(Enum):
    LEAD = auto()  # before the first word; a thought may begin
    THOUGHT = auto()
    AFTER_THOUGHT = auto()  # white space until the first word
    CONTENT = auto()
    CALLS = auto()


class MessageReader:
    """Give it the text in pieces of any size; what it returns does not depend on the pieces.

    White space around a thought, before the first word and before a call belongs to the form. A
    text whose prompt ends in the middle of one is content as it is.
    """

    def __init__(self, form: AnswerForm) -> None:
        self._form = form
        self._stage = Stage.CONTENT if form.ending is Ending.MIDDLE else Stage.LEAD
        self._held = ""
        self._has_reasoned = False
        self._is_line_start = True  # what is held begins a line
        self._calls = CallReader()

    @property
    def has_called(self) -> bool:
        """There were calls, and the last one is whole."""
        return self._stage is Stage.CALLS and self._calls.is_complete

    def feed(self, text: str) -> list[Part]:
        """What became certain, in order."""
        self._held += text
        return self._read(is_end=False)

    def finish(self) -> list[Part]:
        """What was held back, for a text that ends here."""
        parts = self._read(is_end=True)
        return parts + self._calls.finish() if self._stage is Stage.CALLS else parts

    def _read(self, is_end: bool) -> list[Part]:
        parts: list[Part] = []
        if self._stage is Stage.LEAD:
            self._read_lead(is_end)
        if self._stage is Stage.THOUGHT:
            self._read_thought(parts, is_end)
        if self._stage is Stage.AFTER_THOUGHT:
            self._skip_space()
            if self._held:
                self._stage = Stage.CONTENT
        if self._stage is Stage.CONTENT:
            self._read_content(parts, is_end)
        if self._stage is Stage.CALLS:
            parts += self._calls.feed(self._held)
            self._held = ""
        return parts

    def _read_lead(self, is_end: bool) -> None:
        """Find out whether the answer begins with a thought."""
        ending = self._form.ending
        if ending in (Ending.THOUGHT_TAG, Ending.CLOSED_TAG):
            if self._held:
                self._held = self._held.removeprefix(">")
                is_thought = ending is Ending.THOUGHT_TAG
                self._stage = Stage.THOUGHT if is_thought else Stage.AFTER_THOUGHT
        elif ending is Ending.THOUGHT:
            self._stage = Stage.THOUGHT
        else:
            self._skip_space()
            if self._held.startswith(THOUGHT_BEGIN):
                self._held = self._held.removeprefix(THOUGHT_BEGIN)
                self._stage = Stage.THOUGHT
            elif self._held and (is_end or not THOUGHT_BEGIN.startswith(self._held)):
                self._stage = Stage.CONTENT

    def _read_thought(self, parts: list[Part], is_end: bool) -> None:
        if not self._has_reasoned:
            self._held = self._held.lstrip()
        thought, tag, rest = self._held.partition(THOUGHT_END)
        if tag or is_end:
            thought = thought.rstrip()
            self._held = rest
        else:
            certain = thought[: len(thought) - num_uncertain(thought, THOUGHT_END)].rstrip()
            thought, self._held = certain, thought[len(certain) :]
        if tag:
            self._stage, self._is_line_start = Stage.AFTER_THOUGHT, False
        if thought:
            self._has_reasoned = True
            parts.append(Reasoning(thought))

    def _read_content(self, parts: list[Part], is_end: bool) -> None:
        text = self._held
        if not self._form.has_calls:
            certain = len(text)
        elif (begin := self._call_begin(text)) is not None:
            self._stage, self._held = Stage.CALLS, text[begin + len(CALL_OPENING) :]
            if before := text[:begin].rstrip():
                parts.append(Content(before))
            return
        elif is_end:
            text = self._without_cut_call(text)
            certain = len(text)
        else:
            certain = len(text[: len(text) - num_uncertain(text, CALL_OPENING)].rstrip())
        if certain and self._form.has_text:
            parts.append(Content(text[:certain]))
            self._is_line_start = False
        self._held = text[certain:]

    def _without_cut_call(self, text: str) -> str:
        """A text that ends in the opening of a call, without that; the grammar lets nothing else
        follow the line that begins it."""
        begin = len(text) - num_uncertain(text, CALL_OPENING)
        is_call = text.startswith(MARKER_LINE, begin) and self._is_at_line_start(text, begin)
        return text[:begin].rstrip() if is_call else text

    def _call_begin(self, text: str) -> int | None:
        """Where a call opens a line."""
        begin = text.find(CALL_OPENING)
        while begin >= 0:
            if self._is_at_line_start(text, begin):
                return begin
            begin = text.find(CALL_OPENING, begin + 1)
        return None

    def _is_at_line_start(self, text: str, place: int) -> bool:
        return text[place - 1] == "\n" if place else self._is_line_start

    def _skip_space(self) -> None:
        rest = self._held.lstrip()
        if space := self._held[: len(self._held) - len(rest)]:
            self._is_line_start = space.endswith("\n")
        self._held = rest


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
