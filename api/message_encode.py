"""MessageEncoder: the answer to POST /v1/messages in Anthropic's words, whole and as its events.

Knows no sockets.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import assert_never

import orjson

from api.answer_items import AnswerItem, AnswerItems, ItemKind, ItemStep
from api.answer_reader import AnswerForm
from api.dialect import anthropic_error
from api.encode import AnswerHead, Usage, num_reasoning_tokens
from api.errors import ApiError
from engine.types import FinishReason, OutputDelta

NO_SIGNATURE = ""  # of a thought: none is made, and none is asked for when it comes back
PING = b'event: ping\ndata: {"type":"ping"}\n\n'


class MessageEncoder:
    """An api.encode.Encoder of one answer, whose events are framed: `event:` and `data:` lines.

    `form` is what the answer may hold, `stops` are the stop sequences that the client has asked
    for; the others end a turn.
    """

    def __init__(
        self, head: AnswerHead, num_prompt_tokens: int, form: AnswerForm, stops: Collection[str]
    ) -> None:
        self._head = head
        self._num_prompt_tokens = num_prompt_tokens
        self._items = AnswerItems(form)
        self._stops = stops
        self._end: OutputDelta | None = None

    def first(self) -> list[bytes]:
        """The counts are what is known by now; `message_delta` has the final ones."""
        usage = _usage_object(OutputDelta(num_prompt_tokens=self._num_prompt_tokens))
        message = self._message([], usage, stop_reason=None, stop_sequence=None)
        return [_event("message_start", message=message), PING]

    def piece(self, index: int, delta: OutputDelta) -> list[bytes]:
        return [_step_event(step) for step in self._items.feed(delta.text)]

    def last(self, index: int, delta: OutputDelta) -> list[bytes]:
        self._end = delta
        return [_step_event(step) for step in self._items.finish(delta)]

    def end(self, usage: Usage) -> list[bytes]:
        assert self._end is not None, "the answer has not ended"
        counts = _usage_object(self._end, usage)
        return [
            _event("message_delta", delta=self._ending(self._end), usage=counts),
            _event("message_stop"),
        ]

    def whole(self, deltas: Sequence[OutputDelta], usage: Usage) -> bytes:
        (end,) = deltas
        content = [_block(item) for item in self._items.read_whole(end)]
        message = self._message(content, _usage_object(end, usage), **self._ending(end))
        return orjson.dumps(message)

    def fail(self, error: ApiError) -> bytes:
        """The event that ends a stream whose answer cannot be completed."""
        return b"event: error\ndata: %b\n\n" % anthropic_error(error)

    def _message(
        self, content: list[dict[str, object]], usage: dict[str, object], **ending: str | None
    ) -> dict[str, object]:
        return {
            "id": self._head.answer_id,
            "type": "message",
            "role": "assistant",
            "model": self._head.model_name,
            "content": content,
            **ending,
            "usage": usage,
        }

    def _ending(self, end: OutputDelta) -> dict[str, str | None]:
        if end.finish_reason is FinishReason.LENGTH:
            return {"stop_reason": "max_tokens", "stop_sequence": None}
        if self._items.has_called:
            return {"stop_reason": "tool_use", "stop_sequence": None}
        if end.matched_stop in self._stops:
            return {"stop_reason": "stop_sequence", "stop_sequence": end.matched_stop}
        return {"stop_reason": "end_turn", "stop_sequence": None}


def _usage_object(delta: OutputDelta, usage: Usage | None = None) -> dict[str, object]:
    """Anthropic counts cached tokens beside the input tokens, not among them."""
    counts: dict[str, object] = {
        "input_tokens": delta.num_prompt_tokens - delta.num_cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": delta.num_cached_tokens,
        "output_tokens": delta.num_output_tokens,
    }
    if usage is not None:
        counts["output_tokens_details"] = {"thinking_tokens": num_reasoning_tokens(usage)}
    return counts


def _step_event(step: ItemStep) -> bytes:
    item, place = step.item, {"index": step.item.index}
    match step.kind:
        case "begin":
            return _event(
                "content_block_start", **place, content_block=_block(replace(item, pieces=[]))
            )
        case "piece":
            return _event("content_block_delta", **place, delta=_delta(item.kind, step.text))
        case "end":
            return _event("content_block_stop", **place)
    assert_never(step.kind)


def _block(item: AnswerItem) -> dict[str, object]:
    match item.kind:
        case ItemKind.TEXT:
            return {"type": "text", "text": item.text}
        case ItemKind.THOUGHT:
            return {"type": "thinking", "thinking": item.text, "signature": NO_SIGNATURE}
        case ItemKind.CALL:
            # As it was drawn: no number is rounded, and no depth too much.
            arguments = orjson.Fragment(item.arguments())
            return {
                "type": "tool_use",
                "id": f"toolu_{item.key}",
                "name": item.name,
                "input": arguments,
            }
    assert_never(item.kind)


def _delta(kind: ItemKind, text: str) -> dict[str, object]:
    match kind:
        case ItemKind.TEXT:
            return {"type": "text_delta", "text": text}
        case ItemKind.THOUGHT:
            return {"type": "thinking_delta", "thinking": text}
        case ItemKind.CALL:
            return {"type": "input_json_delta", "partial_json": text}
    assert_never(kind)


def _event(name: str, **fields: object) -> bytes:
    data = orjson.dumps({"type": name, **fields})
    return b"event: %b\ndata: %b\n\n" % (name.encode(), data)
