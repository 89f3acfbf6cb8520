"""Server-sent events: Answers as the byte pieces of a text/event-stream body.

One piece per wake-up of the reader, whatever came in between; a comment after each silence of
`keep_alive_s`. Knows no route; the encoder says what the events hold.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable

from api.answers import GOOD_ENDS, Answers
from api.encode import Encoder, Usage
from api.errors import ApiError
from engine.types import OutputDelta

logger = logging.getLogger(__name__)

KEEP_ALIVE = b": keep-alive\n\n"
DONE = b"data: [DONE]\n\n"


async def event_stream(
    answers: Answers,
    encoder: Encoder,
    failure_of: Callable[[OutputDelta], ApiError],
    on_finish: Callable[[], Usage],
    keep_alive_s: float,
) -> AsyncIterator[bytes]:
    """Never empty pieces: BlackSheep takes one for the end of the body.

    `on_finish` is called when all answers are complete, before the client can know. The status
    line is long out, so the failure of one answer becomes an error event before [DONE], and ends
    the others.
    """
    if first := encoder.first():
        yield _events(first)
    try:
        while True:
            found = await answers.take(keep_alive_s)
            if not found:
                yield KEEP_ALIVE
                continue
            objects: list[bytes] = []
            for index, delta in found:
                objects += encoder.text(index, delta.text)
                if delta.finish_reason is None:
                    continue
                if delta.finish_reason not in GOOD_ENDS:
                    answers.close()
                    yield _events([*objects, failure_of(delta).body()]) + DONE
                    return
                objects += encoder.last(index, delta)
            if answers.is_finished:
                yield _events([*objects, *encoder.end(on_finish())]) + DONE
                return
            if objects:
                yield _events(objects)
    except Exception:
        logger.exception("the stream of %s failed", answers.request_id)
        answers.close()
        error = ApiError(500, "internal error", code="internal_error")
        yield _events([error.body()]) + DONE


def _events(objects: list[bytes]) -> bytes:
    return b"".join(b"data: %b\n\n" % item for item in objects)
