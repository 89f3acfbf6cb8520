"""ResponseEncoder: the answer to POST /v1/responses, whole and as its named events.

Knows no sockets and no store: whoever makes it is told the final object before a client is.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import orjson

from api.answer_items import AnswerItems, ItemStep
from api.answer_reader import AnswerForm
from api.encode import Usage
from api.errors import ApiError
from api.response_object import ResponseObject, answered, cancelled, failed
from api.response_output import events_of, output_item
from engine.types import OutputDelta

# (the response as it ended, its last delta where the engine has completed it)
OnEnd = Callable[[ResponseObject, OutputDelta | None], None]


class ResponseEncoder:
    """An api.encode.Encoder of one answer, whose events are framed: `event:` and `data:` lines."""

    def __init__(self, response: ResponseObject, on_end: OnEnd, form: AnswerForm) -> None:
        """`response` is the object as it is before the answer, `form` what that may hold."""
        self.response = response
        self._on_end = on_end
        self._items = AnswerItems(form)
        self._end: OutputDelta | None = None
        self._num_events = 0
        self.is_answered = False  # and so the state at the end is the response's

    def first(self) -> list[bytes]:
        return [
            self._event("response.created", response=self.response),
            self._event("response.in_progress", response=self.response),
        ]

    def piece(self, index: int, delta: OutputDelta) -> list[bytes]:
        return self._events(self._items.feed(delta.text))

    def last(self, index: int, delta: OutputDelta) -> list[bytes]:
        self._end = delta
        return self._events(self._items.finish(delta))

    def end(self, usage: Usage) -> list[bytes]:
        assert self._end is not None, "the answer has not ended"
        self._answer(self._end, usage)
        return [self._event(f"response.{self.response['status']}", response=self.response)]

    def whole(self, deltas: Sequence[OutputDelta], usage: Usage) -> bytes:
        (end,) = deltas
        self._items.read_whole(end)
        self._answer(end, usage)
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

    def _answer(self, end: OutputDelta, usage: Usage) -> None:
        output = [output_item(item) for item in self._items.items]
        self._conclude(answered(self.response, output, end, usage, int(time.time())), end)
        self.is_answered = True

    def _conclude(self, response: ResponseObject, end: OutputDelta | None) -> None:
        self.response = response
        self._on_end(response, end)

    def _events(self, steps: Sequence[ItemStep]) -> list[bytes]:
        return [self._event(name, **fields) for step in steps for name, fields in events_of(step)]

    def _event(self, name: str, **fields: object) -> bytes:
        data = {"type": name, "sequence_number": self._num_events, **fields}
        self._num_events += 1
        return b"event: %b\ndata: %b\n\n" % (name.encode(), orjson.dumps(data))
