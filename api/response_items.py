"""Input items of /v1/responses: what a client sends -> chat messages and the items it may list.

Knows neither engine nor store. A stored item is the JSON object that GET .../input_items gives.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec

from api.chat import ROLE_OF_NAME, ChatMessage
from api.errors import invalid

ROLES = ("user", "assistant", "system", "developer")
TEXT_PARTS = ("input_text", "output_text", "text")

ItemObject = Mapping[str, Any]  # decoded JSON


class ItemPart(msgspec.Struct, kw_only=True):
    type: str
    text: str | None = None


class InputItem(msgspec.Struct, kw_only=True):
    """A message, the one type of item there is so far; `type` may be left out."""

    type: str | None = None
    role: str | None = None
    content: str | list[ItemPart] | None = None


def item_objects(items: str | Sequence[InputItem]) -> list[dict[str, object]]:
    """Items with ids, as they are stored. A string is one user message. Raises ApiError 400."""
    if isinstance(items, str):
        return [_object("user", [items])]
    if not items:
        raise invalid("'input' must be a string or a list of at least one item", "input")
    return [_checked(f"input[{index}]", item) for index, item in enumerate(items)]


def messages_of(items: Iterable[ItemObject]) -> list[ChatMessage]:
    """Stored items, or the output of a stored response, as what the model is shown."""
    return [
        ChatMessage(ROLE_OF_NAME[item["role"]], "\n".join(part["text"] for part in item["content"]))
        for item in items
    ]


def output_part(text: str) -> dict[str, object]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def new_item_id() -> str:
    return f"msg_{uuid.uuid4().hex}"


def _checked(place: str, item: InputItem) -> dict[str, object]:
    if item.type not in (None, "message"):
        raise invalid(
            f"'{place}.type' = {item.type!r} is not supported yet; send items of type message "
            "(what a tool has said can be the text of a user's message)",
            f"{place}.type",
            "unsupported_parameter",
        )
    role = (item.role or "").strip().lower()
    if role not in ROLES:
        known = ", ".join(ROLES)
        raise invalid(
            f"'{place}.role' = {item.role!r} is unknown; known are {known}", f"{place}.role"
        )
    return _object(role, _texts(f"{place}.content", item.content))


def _texts(place: str, content: str | list[ItemPart] | None) -> list[str]:
    if content is None:
        raise invalid(f"'{place}' is missing: send a string or a list of text parts", place)
    if isinstance(content, str):
        return [content]
    texts = []
    for index, part in enumerate(content):
        if part.type not in TEXT_PARTS or part.text is None:
            raise invalid(
                f"'{place}[{index}]' of type {part.type!r} is not supported; send parts of type "
                "input_text with a text",
                f"{place}[{index}]",
            )
        texts.append(part.text)
    return texts


def _object(role: str, texts: Sequence[str]) -> dict[str, object]:
    is_output = role == "assistant"
    parts = [output_part(t) if is_output else {"type": "input_text", "text": t} for t in texts]
    return {
        "id": new_item_id(),
        "type": "message",
        "status": "completed",
        "role": role,
        "content": parts,
    }
