"""Server-sent events: a RequestStream as the byte pieces of a text/event-stream body.

One piece per wake-up of the reader, whatever came in between; a comment after each silence of
`keep_alive_s`. Knows no route; the encoder says what the events hold.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable

from api.encode import Encoder
from api.errors import ApiError
from engine.client import RequestStream
from engine.types import FinishReason, OutputDelta

logger = logging.getLogger(__name__)

KEEP_ALIVE = b": keep-alive\n\n"
DONE = b"data: [DONE]\n\n"


async def event_stream(
    stream: RequestStream,
    encoder: Encoder,
    failure_of: Callable[[OutputDelta], ApiError],
    keep_alive_s: float,
) -> AsyncIterator[bytes]:
    """Never empty pieces: BlackSheep takes one for the end of the body.

    The status line is long out, so a failure becomes an error event before [DONE].
    """
    if first := encoder.first():
        yield _events(first)
    try:
        while True:
            delta = await stream.take(keep_alive_s)
            if delta is None:
                yield KEEP_ALIVE
                continue
            objects = encoder.text(delta.text)
            if delta.finish_reason is not None:
                yield _events(objects) + _end(delta, encoder, failure_of)
                return
            if objects:
                yield _events(objects)
    except Exception:
        logger.exception("the stream of %s failed", stream.request_id)
        error = ApiError(500, "internal error", code="internal_error")
        yield _events([error.body()]) + DONE


def _end(
    delta: OutputDelta, encoder: Encoder, failure_of: Callable[[OutputDelta], ApiError]
) -> bytes:
    if delta.finish_reason in (FinishReason.STOP, FinishReason.LENGTH):
        return _events(encoder.last(delta)) + DONE
    return _events([failure_of(delta).body()]) + DONE


def _events(objects: list[bytes]) -> bytes:
    return b"".join(b"data: %b\n\n" % item for item in objects)
