"""ResponseEncoder: the answer to POST /v1/responses, whole and as its named events.

Knows no sockets and no store: whoever makes it is told the final object before a client is.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import orjson

from api.encode import Usage
from api.errors import ApiError
from api.response_items import new_item_id, output_part
from api.response_object import (
    ResponseObject,
    answered,
    cancelled,
    failed,
    output_message,
)
from engine.types import OutputDelta

# (the response as it ended, its last delta where the engine has completed it)
OnEnd = Callable[[ResponseObject, OutputDelta | None], None]


class ResponseEncoder:
    """An api.encode.Encoder of one answer, whose events are framed: `event:` and `data:` lines.

    With `strips_start`, white space before the first word is dropped, as in a chat.
    """

    def __init__(self, response: ResponseObject, on_end: OnEnd, *, strips_start: bool) -> None:
        """`response` is the object as it is before the answer."""
        self.response = response
        self._on_end = on_end
        self._item_id = new_item_id()
        self._texts: list[str] = []
        self._strips_start = strips_start
        self._end: OutputDelta | None = None
        self._num_events = 0
        self.is_answered = False  # and so the state at the end is the response's

    def first(self) -> list[bytes]:
        item = output_message(self._item_id, "in_progress")
        return [
            self._event("response.created", response=self.response),
            self._event("response.in_progress", response=self.response),
            self._event("response.output_item.added", output_index=0, item=item),
            self._part_event("response.content_part.added", part=output_part("")),
        ]

    def piece(self, index: int, delta: OutputDelta) -> list[bytes]:
        text = delta.text
        if self._strips_start and not self._texts:
            text = text.lstrip()
        if not text:
            return []
        self._texts.append(text)
        return [self._part_event("response.output_text.delta", delta=text, logprobs=[])]

    def last(self, index: int, delta: OutputDelta) -> list[bytes]:
        self._end = delta
        return []

    def end(self, usage: Usage) -> list[bytes]:
        assert self._end is not None, "the answer has not ended"
        text = "".join(self._texts)
        self._answer(text, self._end, usage)
        status = self.response["status"]
        item = output_message(self._item_id, str(status), text)
        return [
            self._part_event("response.output_text.done", text=text, logprobs=[]),
            self._part_event("response.content_part.done", part=output_part(text)),
            self._event("response.output_item.done", output_index=0, item=item),
            self._event(f"response.{status}", response=self.response),
        ]

    def whole(self, deltas: Sequence[OutputDelta], usage: Usage) -> bytes:
        (end,) = deltas
        text = end.text.lstrip() if self._strips_start else end.text
        self._answer(text, end, usage)
        return orjson.dumps(self.response)

    def fail(self, error: ApiError) -> bytes:
        """The events that end a stream whose answer cannot be completed."""
        self._conclude(failed(self.response, error.message), None)
        told = {"code": error.code, "message": error.message, "param": error.param}
        events = [
            self._event("error", **told),
            self._event("response.failed", response=self.response),
        ]
        return b"".join(events)

    def cancel(self) -> None:
        """Nobody wants the answer any more."""
        self._conclude(cancelled(self.response), None)

    def _answer(self, text: str, end: OutputDelta, usage: Usage) -> None:
        now_s = int(time.time())
        self._conclude(answered(self.response, self._item_id, text, end, usage, now_s), end)
        self.is_answered = True

    def _conclude(self, response: ResponseObject, end: OutputDelta | None) -> None:
        self.response = response
        self._on_end(response, end)

    def _part_event(self, name: str, **fields: object) -> bytes:
        """Of the one part of the one item."""
        place = {"item_id": self._item_id, "output_index": 0, "content_index": 0}
        return self._event(name, **place, **fields)

    def _event(self, name: str, **fields: object) -> bytes:
        data = {"type": name, "sequence_number": self._num_events, **fields}
        self._num_events += 1
        return b"event: %b\ndata: %b\n\n" % (name.encode(), orjson.dumps(data))
