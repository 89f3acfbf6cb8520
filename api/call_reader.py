"""CallReader: the text of tool calls, taken apart as it comes. Knows nothing around them."""

from __future__ import annotations

from enum import Enum, auto

from api.answer_parts import CallArguments, CallBegin, Content, Part
from api.tool_text import BEFORE_ARGUMENTS, CALL_CLOSING, CALL_OPENING

NEXT_CALL = f"\n{CALL_OPENING}"


class Stage(Enum):
    NAME = auto()
    ARGUMENTS = auto()
    CLOSING = auto()
    BETWEEN = auto()  # another call may follow
    BEHIND = auto()  # something else followed: text


class CallReader:
    """Begins behind the first call's opening, in the form of `tool_text.call_text`.

    Arguments are given out as they come; a text that ends in the middle leaves what there was.
    """

    def __init__(self) -> None:
        self._stage = Stage.NAME
        self._held = ""
        self._index = 0
        self._end = JsonEnd()

    @property
    def is_complete(self) -> bool:
        """The last call that began is whole."""
        return self._stage in (Stage.BETWEEN, Stage.BEHIND)

    def feed(self, text: str) -> list[Part]:
        self._held += text
        parts: list[Part] = []
        while self._step(parts):
            pass
        return parts

    def finish(self) -> list[Part]:
        """What was held back, for a text that ends here: text that was no call after all."""
        if self._stage is not Stage.BETWEEN or not self._held.strip():
            return []
        return [Content(self._held)]

    def _step(self, parts: list[Part]) -> bool:
        """Go on to the next stage, if the text does."""
        match self._stage:
            case Stage.NAME:
                return self._read_name(parts)
            case Stage.ARGUMENTS:
                return self._read_arguments(parts)
            case Stage.CLOSING:
                return self._skip(CALL_CLOSING, Stage.BETWEEN)
            case Stage.BETWEEN:
                return self._read_between()
            case Stage.BEHIND:
                if self._held:
                    parts.append(Content(self._held))
                self._held = ""
                return False

    def _read_name(self, parts: list[Part]) -> bool:
        name, found, rest = self._held.partition(BEFORE_ARGUMENTS)
        if not found:
            return False
        parts.append(CallBegin(self._index, name))
        self._held, self._stage, self._end = rest, Stage.ARGUMENTS, JsonEnd()
        return True

    def _read_arguments(self, parts: list[Part]) -> bool:
        size = self._end.feed(self._held)
        if size:
            parts.append(CallArguments(self._index, self._held[:size]))
        self._held = self._held[size:]
        if self._end.is_reached:
            self._stage = Stage.CLOSING
        return self._end.is_reached

    def _read_between(self) -> bool:
        if self._held.startswith(NEXT_CALL):
            self._index += 1
            return self._skip(NEXT_CALL, Stage.NAME)
        if NEXT_CALL.startswith(self._held):
            return False
        self._stage = Stage.BEHIND
        return True

    def _skip(self, text: str, stage: Stage) -> bool:
        if len(self._held) < len(text):
            return False
        self._held, self._stage = self._held.removeprefix(text), stage
        return True


class JsonEnd:
    """Finds where a JSON object ends."""

    def __init__(self) -> None:
        self.is_reached = False
        self._depth = 0
        self._is_in_string = False
        self._is_escaped = False

    def feed(self, text: str) -> int:
        """How many of the characters belong to the object."""
        for number, char in enumerate(text, 1):
            if self._is_escaped:
                self._is_escaped = False
            elif char == "\\":
                self._is_escaped = self._is_in_string
            elif char == '"':
                self._is_in_string = not self._is_in_string
            elif not self._is_in_string:
                self._depth += (char in "{[") - (char in "}]")
                if self._depth == 0:
                    self.is_reached = True
                    return number
        return len(text)
