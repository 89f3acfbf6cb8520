"""MessagesBody: the fields of Anthropic's POST /v1/messages, checked. Knows no engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec

from api.chat import ROLE_OF_NAME, ChatMessage
from api.errors import invalid
from api.generation_body import GenerationBody
from api.sampling import MAX_NUM_STOPS, MAX_STOP_CHARS
from api.schemas import convert_strict, json_object
from api.unsupported import SHARED, refuse_unsupported

ROLES = ("user", "assistant", "system")

# Fields that would change the answer and are not honoured, with the values that ask for nothing.
MESSAGES: dict[str, tuple[object, ...]] = SHARED | {
    "tools": ([],),
    "tool_choice.type": ("auto", "none"),
    "thinking.type": ("disabled",),
    "output_config.format": (),
    "output_config.effort": (),
    "output_format": (),
    "mcp_servers": ([],),
    "container": (),
    "context_management": (),
    # Of the other routes; messages have words of their own for these.
    "stop": (),
    "max_completion_tokens": (),
    "response_format": ({"type": "text"},),
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
OBJECTS = ("tool_choice", "thinking", "output_config")


class ContentBlock(msgspec.Struct, kw_only=True):
    type: str
    text: str | None = None


Content = str | list[ContentBlock]


class TurnBody(msgspec.Struct, kw_only=True):
    role: str
    content: Content


class MessagesBody(GenerationBody, kw_only=True):
    """POST /v1/messages; null = absent. The sampling fields of a chat may be used too."""

    messages: list[TurnBody] | None = None
    system: Content | None = None
    stop_sequences: list[str] | None = None

    def chat_messages(self) -> list[ChatMessage]:
        """System and messages; turns of one role that follow each other are one. Raises ApiError.

        A last message of the assistant is the beginning of the answer.
        """
        if not self.messages:
            raise invalid("'messages' must be a list of at least one message", "messages")
        found = []
        if self.system is not None:
            found.append(ChatMessage("system", _text("system", self.system)))
        for index, turn in enumerate(self.messages):
            message = _message(f"messages[{index}]", turn)
            if found and index and found[-1].role == message.role:
                message = ChatMessage(message.role, f"{found.pop().text}\n{message.text}")
            found.append(message)
        return found

    @property
    def stops(self) -> Sequence[str]:
        return self.stop_sequences or ()

    def check_answer(self) -> None:
        """Raise ApiError 400 for what an answer needs and a count of tokens does not."""
        self.check()
        if self.max_tokens is None:
            raise invalid("'max_tokens' is missing: say how long the answer may be", "max_tokens")
        if len(self.stops) > MAX_NUM_STOPS:
            raise invalid(
                f"'stop_sequences' has {len(self.stops)} strings, at most {MAX_NUM_STOPS} are "
                "supported",
                "stop_sequences",
            )
        for stop in self.stops:
            if not 0 < len(stop) <= MAX_STOP_CHARS:
                raise invalid(
                    f"'stop_sequences' has a string of {len(stop)} characters; they must have 1 to "
                    f"{MAX_STOP_CHARS}",
                    "stop_sequences",
                )


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


def _message(place: str, turn: TurnBody) -> ChatMessage:
    if turn.role not in ROLES:
        known = ", ".join(ROLES)
        raise invalid(
            f"'{place}.role' = {turn.role!r} is unknown; known are {known}", f"{place}.role"
        )
    return ChatMessage(ROLE_OF_NAME[turn.role], _text(f"{place}.content", turn.content))


def _text(place: str, content: Content) -> str:
    if isinstance(content, str):
        return content
    texts = []
    for index, block in enumerate(content):
        if block.type != "text" or block.text is None:
            raise invalid(
                f"'{place}[{index}]' of type {block.type!r} is not supported yet; send blocks of "
                "type text with a text",
                f"{place}[{index}]",
                "unsupported_parameter",
            )
        texts.append(block.text)
    return "\n".join(texts)
