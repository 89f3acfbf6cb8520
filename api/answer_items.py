"""AnswerItems: an answer as the items that it consists of, one after the other, as it comes.

For protocols whose answers are lists of thoughts, texts and calls. Knows no JSON and no HTTP.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum
from typing import Literal

from api.answer_parts import CallArguments, CallBegin, Content, Part, Reasoning
from api.answer_reader import AnswerForm, MessageReader
from engine.types import FinishReason, OutputDelta

NO_ARGUMENTS = "{}"


class ItemKind(Enum):
    THOUGHT = "thought"
    TEXT = "text"
    CALL = "call"


@dataclass(slots=True)
class AnswerItem:
    """`index` is its place in the answer; `key` tells it from all other items there are."""

    index: int
    kind: ItemKind
    name: str = ""  # of a call
    pieces: list[str] = field(default_factory=list)
    is_cut: bool = False
    key: str = field(default_factory=lambda: uuid.uuid4().hex)

    @property
    def text(self) -> str:
        """A thought, a text, or the arguments of a call."""
        return "".join(self.pieces)

    def arguments(self) -> str:
        """Those of a call, always JSON: {} where they were cut before they were complete."""
        if self.is_cut:
            try:
                json.loads(self.text)
            except (ValueError, RecursionError):
                return NO_ARGUMENTS
        return self.text or NO_ARGUMENTS


@dataclass(frozen=True, slots=True)
class ItemStep:
    """What happens to an item: it begins or ends, or a piece of text comes."""

    kind: Literal["begin", "piece", "end"]
    item: AnswerItem
    text: str = ""


class AnswerItems:
    """Give it the deltas of an answer, then its end. There is one item at least."""

    def __init__(self, form: AnswerForm) -> None:
        self._reader = MessageReader(form)
        self.items: list[AnswerItem] = []

    @property
    def has_called(self) -> bool:
        """There were calls, and the last one is whole."""
        return self._reader.has_called

    def feed(self, text: str) -> list[ItemStep]:
        return self._steps(self._reader.feed(text))

    def finish(self, end: OutputDelta) -> list[ItemStep]:
        """What was held back, and the end of the last item."""
        steps = self._steps(self._reader.finish())
        if not self.items:
            steps.append(self._begin(ItemKind.TEXT))
        last = self.items[-1]
        is_cut_call = last.kind is ItemKind.CALL and not self.has_called
        last.is_cut = is_cut_call or end.finish_reason is FinishReason.LENGTH
        return [*steps, ItemStep("end", last)]

    def read_whole(self, answer: OutputDelta) -> list[AnswerItem]:
        """The items of an answer that has come at once."""
        self.feed(answer.text)
        self.finish(answer)
        return self.items

    def _steps(self, parts: Iterable[Part]) -> list[ItemStep]:
        steps = []
        for part in parts:
            match part:
                case CallBegin(_, name):
                    steps += [*self._end_last(), self._begin(ItemKind.CALL, name)]
                case Reasoning(text):
                    steps += self._piece(ItemKind.THOUGHT, text)
                case Content(text):
                    steps += self._piece(ItemKind.TEXT, text)
                case CallArguments(_, text):
                    steps += self._piece(ItemKind.CALL, text)
        return steps

    def _piece(self, kind: ItemKind, text: str) -> list[ItemStep]:
        steps = []
        if not self.items or self.items[-1].kind is not kind:
            steps = [*self._end_last(), self._begin(kind)]
        item = self.items[-1]
        item.pieces.append(text)
        return [*steps, ItemStep("piece", item, text)]

    def _begin(self, kind: ItemKind, name: str = "") -> ItemStep:
        item = AnswerItem(len(self.items), kind, name)
        self.items.append(item)
        return ItemStep("begin", item)

    def _end_last(self) -> list[ItemStep]:
        return [ItemStep("end", self.items[-1])] if self.items else []
