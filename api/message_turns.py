"""The turns of Anthropic's /v1/messages, made of content blocks -> chat messages.

Knows no other fields of a body.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

import msgspec

from api.chat import ROLE_OF_NAME, ChatMessage, Role
from api.errors import ApiError, invalid
from api.tool_checks import checked_call

ROLES = ("user", "assistant", "system")
ROLE_OF_BLOCK: dict[str, Role] = {
    "tool_use": "assistant",
    "thinking": "assistant",
    "redacted_thinking": "assistant",
    "tool_result": "user",
}
ERROR_MARK = "Error: "  # in front of what a call gave that failed


class ResultPart(msgspec.Struct, kw_only=True):
    type: str
    text: str | None = None


class ContentBlock(msgspec.Struct, kw_only=True):
    """A text, a thought, a call (`id`, `name`, `input`), or what a call gave (`content`)."""

    type: str
    text: str | None = None
    name: str | None = None
    input: dict[str, object] | None = None
    content: str | list[ResultPart] | None = None
    is_error: bool | None = None


Content = str | list[ContentBlock]


class TurnBody(msgspec.Struct, kw_only=True):
    role: str
    content: Content


def chat_messages(system: Content | None, turns: Sequence[TurnBody]) -> list[ChatMessage]:
    """Turns of one role that follow each other are one message. Raises ApiError 400."""
    found = [] if system is None else [ChatMessage("system", system_text(system))]
    num_before = len(found)
    for index, turn in enumerate(turns):
        for message in _messages(f"messages[{index}]", turn):
            if len(found) > num_before and _is_one(found[-1], message):
                message = _joined(found.pop(), message)
            found.append(message)
    return found


def system_text(system: Content) -> str:
    """Raises ApiError 400 for other blocks than text."""
    if isinstance(system, str):
        return system
    return "\n".join(_text(f"system[{index}]", block) for index, block in enumerate(system))


def _is_one(before: ChatMessage, message: ChatMessage) -> bool:
    """Results stay apart, and a text behind a call does."""
    is_behind_call = before.calls and message.text
    return before.role == message.role != "tool" and not is_behind_call


def _joined(before: ChatMessage, message: ChatMessage) -> ChatMessage:
    text = "\n".join(text for text in (before.text, message.text) if text)
    return ChatMessage(message.role, text, before.calls + message.calls)


def _messages(place: str, turn: TurnBody) -> list[ChatMessage]:
    """One for each block."""
    if turn.role not in ROLES:
        known = ", ".join(ROLES)
        raise invalid(
            f"'{place}.role' = {turn.role!r} is unknown; known are {known}", f"{place}.role"
        )
    role = ROLE_OF_NAME[turn.role]
    if isinstance(turn.content, str):
        return [ChatMessage(role, turn.content)]
    return [
        _message(f"{place}.content[{index}]", role, block)
        for index, block in enumerate(turn.content)
    ]


def _message(place: str, role: Role, block: ContentBlock) -> ChatMessage:
    whose = ROLE_OF_BLOCK.get(block.type, role)
    if whose != role:
        raise invalid(
            f"'{place}' of type {block.type!r} belongs to messages with role {whose}", place
        )
    match block.type:
        case "tool_result":
            return ChatMessage("tool", _result(place, block))
        case "tool_use":
            arguments = json.dumps(block.input or {}, ensure_ascii=False)
            return ChatMessage(role, "", (checked_call(block.name or "", arguments, place),))
        case "thinking" | "redacted_thinking":
            return ChatMessage(role, "")  # it is not shown again
    return ChatMessage(role, _text(place, block))


def _result(place: str, block: ContentBlock) -> str:
    content = block.content or ""
    if not isinstance(content, str):
        for index, part in enumerate(content):
            if part.type != "text" or part.text is None:
                raise _unsupported(f"{place}.content[{index}]", part.type)
        content = "\n".join(part.text or "" for part in content)
    return f"{ERROR_MARK}{content}" if block.is_error else content


def _text(place: str, block: ContentBlock) -> str:
    if block.type != "text" or block.text is None:
        raise _unsupported(place, block.type)
    return block.text


def _unsupported(place: str, kind: str) -> ApiError:
    return invalid(
        f"'{place}' of type {kind!r} is not supported; send blocks of type text with a text",
        place,
        "unsupported_parameter",
    )
