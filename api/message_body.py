"""MessagesBody: the fields of Anthropic's POST /v1/messages, checked. Knows no engine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from api.chat import ChatMessage, Thinking
from api.errors import invalid
from api.message_fields import MessageFields
from api.message_turns import Content, TurnBody, chat_messages
from api.sampling import MAX_NUM_STOPS, MAX_STOP_CHARS
from api.schemas import convert_strict, json_object
from api.unsupported import SHARED, refuse_unsupported

# Fields that would change the answer and are not honoured, with the values that ask for nothing.
MESSAGES: dict[str, tuple[object, ...]] = SHARED | {
    "thinking.display": ("summarized",),
    "output_config.task_budget": (),
    "mcp_servers": ([],),
    "thread": (),
    "compaction": (),
    "container": (),
    "context_management": (),
    # Of the other routes; messages have words of their own for these.
    "stop": (),
    "max_completion_tokens": (),
    "response_format": ({"type": "text"},),
    "reasoning_effort": ("none",),
    "chat_template_kwargs": ({}, {"enable_thinking": False}),
    "parallel_tool_calls": (True,),
    "n": (1,),
    "best_of": (1,),
    "state": (),
    "return_state": (False,),
    "resumable": (False,),
    "resume": (),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "return_token_ids": (False,),
}
OBJECTS = ("thinking", "output_config")


class MessagesBody(MessageFields, kw_only=True):
    """POST /v1/messages; null = absent. The sampling fields of a chat may be used too."""

    CALLS_FIELD: ClassVar[str] = "messages"

    messages: list[TurnBody] | None = None
    system: Content | None = None
    stop_sequences: list[str] | None = None

    @property
    def asks_answer(self) -> bool:
        return not self.continues_last

    @property
    def continues_last(self) -> bool:
        """A last message of the assistant is the beginning of the answer."""
        turns = self.messages or []
        return [turn.role for turn in turns[-1:]] == ["assistant"]

    @property
    def added_stops(self) -> tuple[str, ...]:
        return tuple(self.stop_sequences or ())

    def chat_messages(self) -> list[ChatMessage]:
        """System and messages. Raises ApiError 400."""
        if not self.messages:
            raise invalid("'messages' must be a list of at least one message", "messages")
        found = chat_messages(self.system, self.messages)
        if self.continues_last:
            self._check_continues(found[-1])
        return found

    def check_answer(self) -> None:
        """Raise ApiError 400 for what an answer needs and a count of tokens does not."""
        self.check()
        if self.max_tokens is None:
            raise invalid("'max_tokens' is missing: say how long the answer may be", "max_tokens")
        stops = self.added_stops
        if len(stops) > MAX_NUM_STOPS:
            raise invalid(
                f"'stop_sequences' has {len(stops)} strings, at most {MAX_NUM_STOPS} are supported",
                "stop_sequences",
            )
        for stop in stops:
            if not 0 < len(stop) <= MAX_STOP_CHARS:
                raise invalid(
                    f"'stop_sequences' has a string of {len(stop)} characters; they must have 1 to "
                    f"{MAX_STOP_CHARS}",
                    "stop_sequences",
                )

    def _check_continues(self, last: ChatMessage) -> None:
        """What only an answer from its beginning can have."""
        remedy = "the last of 'messages' is the assistant's, and the answer goes on with it"
        if last.calls:
            raise invalid(f"{remedy}: it must not have tool_use; send the tool_result", "messages")
        if self.tool_use() is not None:
            raise invalid(f"{remedy} without 'tools'; send tool_choice none, or no such", "tools")
        field, thinking = self.asked_thinking()
        if thinking is not Thinking.NONE:
            raise invalid(f"{remedy}, so there is no thought; leave out {field!r}", field)


def parse_messages(data: bytes) -> MessagesBody:
    """Raises ApiError 400 that names the first field in the way."""
    body = _parse(data)
    body.check_answer()
    return body


def parse_count(data: bytes) -> MessagesBody:
    """The body of count_tokens. Raises ApiError 400 that names the first field in the way."""
    return _parse(data)


def _parse(data: bytes) -> MessagesBody:
    fields = json_object(data)
    refuse_unsupported(_flattened(fields), MESSAGES)
    known = {name: fields[name] for name in MessagesBody.__struct_fields__ if name in fields}
    return convert_strict(known, MessagesBody)


def _flattened(fields: Mapping[str, object]) -> dict[str, object]:
    """Objects are judged field by field."""
    flat = dict(fields)
    for outer in OBJECTS:
        inner = fields.get(outer)
        if isinstance(inner, Mapping):
            flat |= {f"{outer}.{name}": value for name, value in inner.items()}
    return flat
