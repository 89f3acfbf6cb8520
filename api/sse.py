"""Server-sent events: Answers as the byte pieces of a text/event-stream body.

One piece per wake-up of the reader, whatever came in between; a comment after each silence of
`keep_alive_s`. Knows no route; the encoder says what the events hold.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

from api.answers import Answers
from api.encode import Encoder, Usage
from api.errors import ApiError
from engine.types import OutputDelta

logger = logging.getLogger(__name__)

KEEP_ALIVE = b": keep-alive\n\n"
DONE = b"data: [DONE]\n\n"


def data_event(item: bytes) -> bytes:
    """One JSON object as an event without a name."""
    return b"data: %b\n\n" % item


@dataclass(frozen=True, slots=True, kw_only=True)
class Framing:
    """What is around the objects of an encoder. All of it is pieces of the body."""

    event: Callable[[bytes], bytes] = data_event
    error: Callable[[ApiError], bytes] = lambda error: data_event(error.body())
    keep_alive: bytes = KEEP_ALIVE
    end: bytes = DONE


OPENAI = Framing()


def named_events(error: Callable[[ApiError], bytes], keep_alive: bytes = KEEP_ALIVE) -> Framing:
    """For an encoder that frames its events itself, since each has a name; nothing ends them."""
    return Framing(event=bytes, error=error, keep_alive=keep_alive, end=b"")


async def event_stream(
    answers: Answers,
    encoder: Encoder,
    failure_of: Callable[[OutputDelta], ApiError],
    on_finish: Callable[[], Usage],
    keep_alive_s: float,
    framing: Framing = OPENAI,
) -> AsyncIterator[bytes]:
    """Never empty pieces: BlackSheep takes one for the end of the body.

    `on_finish` is called when all answers are complete, before the client can know. The status
    line is long out, so the failure of one answer becomes an error event at the end, and ends the
    others.
    """

    def events(objects: list[bytes]) -> bytes:
        return b"".join(framing.event(item) for item in objects)

    if first := encoder.first():
        yield events(first)
    try:
        while True:
            found = await answers.take(keep_alive_s)
            if not found:
                yield framing.keep_alive
                continue
            objects: list[bytes] = []
            for index, delta in found:
                objects += encoder.piece(index, delta)
                if delta.finish_reason is None:
                    continue
                if not answers.is_good(delta.finish_reason):
                    answers.close()
                    yield events(objects) + framing.error(failure_of(delta)) + framing.end
                    return
                objects += encoder.last(index, delta)
            if answers.is_finished:
                yield events([*objects, *encoder.end(on_finish())]) + framing.end
                return
            if objects:
                yield events(objects)
    except Exception:
        logger.exception("the stream of %s failed", answers.request_id)
        answers.close()
        error = ApiError(500, "internal error", code="internal_error")
        yield framing.error(error) + framing.end
