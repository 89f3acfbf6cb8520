"""Input items of /v1/responses: what a client sends -> chat messages and the items it may list.

Knows neither engine nor store. A stored item is the JSON object that GET .../input_items gives.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import msgspec

from api.chat import ROLE_OF_NAME, ChatMessage
from api.errors import invalid
from api.response_output import ID_PREFIXES, output_part
from api.tool_checks import checked_call
from api.tool_text import ToolCall

ROLES = ("user", "assistant", "system", "developer")
TEXT_PARTS = ("input_text", "output_text", "text")
THOUGHT_PARTS = ("reasoning_text",)

ItemObject = Mapping[str, Any]  # decoded JSON


class ItemPart(msgspec.Struct, kw_only=True):
    type: str
    text: str | None = None


ItemContent = str | list[ItemPart]


class InputItem(msgspec.Struct, kw_only=True):
    """A message, whose `type` may be left out, a thought, a call, or what a call gave."""

    type: str | None = None
    role: str | None = None
    content: ItemContent | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None
    output: ItemContent | None = None


def item_objects(items: str | Sequence[InputItem]) -> list[dict[str, object]]:
    """Items with ids, as they are stored. A string is one user message. Raises ApiError 400."""
    if isinstance(items, str):
        return [_message("user", [items])]
    if not items:
        raise invalid("'input' must be a string or a list of at least one item", "input")
    return [_checked(f"input[{index}]", item) for index, item in enumerate(items)]


def messages_of(items: Iterable[ItemObject]) -> list[ChatMessage]:
    """Stored items, or the output of a stored response, as what the model is shown.

    Calls belong to what the assistant said before them; thoughts are not shown again.
    """
    found: list[ChatMessage] = []
    for item in items:
        match item["type"]:
            case "reasoning":
                continue
            case "function_call":
                call = ToolCall(item["name"], item["arguments"])
                says_more = found and found[-1].role == "assistant"
                said = found.pop() if says_more else ChatMessage("assistant", "")
                found.append(replace(said, calls=(*said.calls, call)))
            case "function_call_output":
                found.append(ChatMessage("tool", _text(item["output"])))
            case _:
                found.append(ChatMessage(ROLE_OF_NAME[item["role"]], _text(item["content"])))
    return found


def _text(content: str | list[ItemObject]) -> str:
    return content if isinstance(content, str) else "\n".join(part["text"] for part in content)


def _checked(place: str, item: InputItem) -> dict[str, object]:
    match item.type:
        case None | "message":
            return _checked_message(place, item)
        case "reasoning":
            thought = _texts(f"{place}.content", item.content or [], THOUGHT_PARTS)
            parts = [{"type": "reasoning_text", "text": text} for text in thought]
            return _object("reasoning", summary=[], content=parts)
        case "function_call":
            call = checked_call(item.name or "", item.arguments or "", place)
            called = {"name": call.name, "arguments": call.arguments}
            return _object("function_call", call_id=_call_id(place, item), **called)
        case "function_call_output":
            call_id, output = _call_id(place, item), item.output
            if not isinstance(output, str):
                texts = _texts(f"{place}.output", output, TEXT_PARTS)
                return _object("function_call_output", call_id=call_id, output=_parts(texts))
            return _object("function_call_output", call_id=call_id, output=output)
    raise invalid(
        f"'{place}.type' = {item.type!r} is not supported; send items of type message, reasoning, "
        "function_call or function_call_output",
        f"{place}.type",
        "unsupported_parameter",
    )


def _checked_message(place: str, item: InputItem) -> dict[str, object]:
    role = (item.role or "").strip().lower()
    if role not in ROLES:
        known = ", ".join(ROLES)
        raise invalid(
            f"'{place}.role' = {item.role!r} is unknown; known are {known}", f"{place}.role"
        )
    return _message(role, _texts(f"{place}.content", item.content, TEXT_PARTS))


def _call_id(place: str, item: InputItem) -> str:
    if not item.call_id:
        raise invalid(f"'{place}.call_id' is missing: it says which call", f"{place}.call_id")
    return item.call_id


def _texts(place: str, content: ItemContent | None, kinds: Sequence[str]) -> list[str]:
    if content is None:
        raise invalid(f"'{place}' is missing: send a string or a list of text parts", place)
    if isinstance(content, str):
        return [content]
    texts = []
    for index, part in enumerate(content):
        if part.type not in kinds or part.text is None:
            raise invalid(
                f"'{place}[{index}]' of type {part.type!r} is not supported; send parts of type "
                f"{kinds[0]} with a text",
                f"{place}[{index}]",
            )
        texts.append(part.text)
    return texts


def _message(role: str, texts: Sequence[str]) -> dict[str, object]:
    parts = [output_part(text) for text in texts] if role == "assistant" else _parts(texts)
    return _object("message", role=role, content=parts)


def _parts(texts: Sequence[str]) -> list[dict[str, object]]:
    return [{"type": "input_text", "text": text} for text in texts]


def _object(kind: str, **fields: object) -> dict[str, object]:
    item_id = f"{ID_PREFIXES[kind]}_{uuid.uuid4().hex}"
    return {"id": item_id, "type": kind, "status": "completed", **fields}
