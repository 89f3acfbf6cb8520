"""The output items of /v1/responses, and the events that build them. Knows no sockets."""

from __future__ import annotations

from typing import assert_never

from api.answer_items import AnswerItem, ItemKind, ItemStep

# By the type of item; clients look for some of them.
ID_PREFIXES = {
    "message": "msg",
    "reasoning": "rs",
    "function_call": "fc",
    "function_call_output": "fco",
}
TYPE_OF_KIND = {
    ItemKind.TEXT: "message",
    ItemKind.THOUGHT: "reasoning",
    ItemKind.CALL: "function_call",
}

Event = tuple[str, dict[str, object]]  # name and fields


def output_part(text: str) -> dict[str, object]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def output_item(item: AnswerItem) -> dict[str, object]:
    """An item that has ended."""
    status = "incomplete" if item.is_cut else "completed"
    content = [] if item.kind is ItemKind.CALL else [_part(item, item.text)]
    return _item(item, status, content)


def events_of(step: ItemStep) -> list[Event]:
    match step.kind:
        case "begin":
            return _begin(step.item)
        case "piece":
            return [_piece(step.item, step.text)]
        case "end":
            return _end(step.item)
    assert_never(step.kind)


def _begin(item: AnswerItem) -> list[Event]:
    events: list[Event] = [
        (
            "response.output_item.added",
            {"output_index": item.index, "item": _item(item, "in_progress", [])},
        )
    ]
    if item.kind is not ItemKind.CALL:
        events.append(("response.content_part.added", _in_part(item) | {"part": _part(item, "")}))
    return events


def _piece(item: AnswerItem, text: str) -> Event:
    match item.kind:
        case ItemKind.TEXT:
            fields = _in_part(item) | {"delta": text, "logprobs": []}
            return "response.output_text.delta", fields
        case ItemKind.THOUGHT:
            return "response.reasoning_text.delta", _in_part(item) | {"delta": text}
        case ItemKind.CALL:
            return "response.function_call_arguments.delta", _in_item(item) | {"delta": text}
    assert_never(item.kind)


def _end(item: AnswerItem) -> list[Event]:
    text = item.text
    done = "response.output_item.done", {"output_index": item.index, "item": output_item(item)}
    if item.kind is ItemKind.CALL:
        fields = _in_item(item) | {"arguments": text}
        return [("response.function_call_arguments.done", fields), done]
    place = _in_part(item)
    told: Event = (
        ("response.output_text.done", place | {"text": text, "logprobs": []})
        if item.kind is ItemKind.TEXT
        else ("response.reasoning_text.done", place | {"text": text})
    )
    part = "response.content_part.done", place | {"part": _part(item, text)}
    return [told, part, done]


def _item(item: AnswerItem, status: str, content: list[dict[str, object]]) -> dict[str, object]:
    kind = TYPE_OF_KIND[item.kind]
    found: dict[str, object] = {"id": _item_id(item), "type": kind, "status": status}
    match item.kind:
        case ItemKind.TEXT:
            return found | {"role": "assistant", "content": content}
        case ItemKind.THOUGHT:
            return found | {"summary": [], "content": content}
        case ItemKind.CALL:
            arguments = "" if status == "in_progress" else item.text
            call = {"call_id": f"call_{item.key}", "name": item.name, "arguments": arguments}
            return found | call
    assert_never(item.kind)


def _part(item: AnswerItem, text: str) -> dict[str, object]:
    is_text = item.kind is ItemKind.TEXT
    return output_part(text) if is_text else {"type": "reasoning_text", "text": text}


def _in_part(item: AnswerItem) -> dict[str, object]:
    """Of the one part of an item."""
    return _in_item(item) | {"content_index": 0}


def _in_item(item: AnswerItem) -> dict[str, object]:
    return {"item_id": _item_id(item), "output_index": item.index}


def _item_id(item: AnswerItem) -> str:
    return f"{ID_PREFIXES[TYPE_OF_KIND[item.kind]]}_{item.key}"
