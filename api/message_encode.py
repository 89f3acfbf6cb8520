"""MessageEncoder: the answer to POST /v1/messages in Anthropic's words, whole and as its events.

Knows no sockets.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import orjson

from api.dialect import anthropic_error
from api.encode import AnswerHead, Usage
from api.errors import ApiError
from engine.types import FinishReason, OutputDelta

PING = b'event: ping\ndata: {"type":"ping"}\n\n'


class MessageEncoder:
    """An api.encode.Encoder of one answer, whose events are framed: `event:` and `data:` lines.

    `stops` are the stop sequences that the client has asked for; the others end a turn. With
    `strips_start`, white space before the first word is dropped, as in a chat.
    """

    def __init__(
        self,
        head: AnswerHead,
        num_prompt_tokens: int,
        stops: Collection[str],
        *,
        strips_start: bool,
    ) -> None:
        self._head = head
        self._num_prompt_tokens = num_prompt_tokens
        self._stops = stops
        self._strips_start = strips_start  # until the first word
        self._end: OutputDelta | None = None

    def first(self) -> list[bytes]:
        """The counts are what is known by now; `message_delta` has the final ones."""
        usage = _usage_object(OutputDelta(num_prompt_tokens=self._num_prompt_tokens))
        message = self._message([], usage, stop_reason=None, stop_sequence=None)
        block = {"type": "text", "text": ""}
        return [
            _event("message_start", message=message),
            _event("content_block_start", index=0, content_block=block),
            PING,
        ]

    def piece(self, index: int, delta: OutputDelta) -> list[bytes]:
        text = delta.text
        if self._strips_start:
            text = text.lstrip()
        if not text:
            return []
        self._strips_start = False
        added = {"type": "text_delta", "text": text}
        return [_event("content_block_delta", index=0, delta=added)]

    def last(self, index: int, delta: OutputDelta) -> list[bytes]:
        self._end = delta
        return []

    def end(self, usage: Usage) -> list[bytes]:
        assert self._end is not None, "the answer has not ended"
        return [
            _event("content_block_stop", index=0),
            _event("message_delta", delta=self._ending(self._end), usage=_usage_object(self._end)),
            _event("message_stop"),
        ]

    def whole(self, deltas: Sequence[OutputDelta], usage: Usage) -> bytes:
        (end,) = deltas
        text = end.text.lstrip() if self._strips_start else end.text
        content: list[dict[str, object]] = [{"type": "text", "text": text}]
        message = self._message(content, _usage_object(end), **self._ending(end))
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
        if end.matched_stop in self._stops:
            return {"stop_reason": "stop_sequence", "stop_sequence": end.matched_stop}
        return {"stop_reason": "end_turn", "stop_sequence": None}


def _usage_object(delta: OutputDelta) -> dict[str, object]:
    """Anthropic counts cached tokens beside the input tokens, not among them."""
    return {
        "input_tokens": delta.num_prompt_tokens - delta.num_cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": delta.num_cached_tokens,
        "output_tokens": delta.num_output_tokens,
    }


def _event(name: str, **fields: object) -> bytes:
    data = orjson.dumps({"type": name, **fields})
    return b"event: %b\ndata: %b\n\n" % (name.encode(), data)
