"""BodyWriter: a piece of a chunked body, written at once where its connection can take it.

The way through ASGI is a coroutine that every layer of the application has a frame in: that costs
more than a token is worth. Knows uvicorn's cycle of one request; no events.
"""

from __future__ import annotations

from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

BODY_WRITER_KEY = "rwkv.body_writer"  # in the ASGI scope


class BodyWriter:
    """For between two `send`s of an application that streams, whose order it keeps."""

    __slots__ = ("_cycle",)

    def __init__(self, cycle: RequestResponseCycle) -> None:
        self._cycle = cycle

    def write(self, piece: bytes) -> bool:
        """False where `send` is to do it: the reader is slow or gone, or the body not begun or
        not chunked. Never for empty pieces, which would end the body.
        """
        cycle = self._cycle
        if not cycle.chunked_encoding or cycle.flow.write_paused or cycle.disconnected:
            return False
        assert not cycle.response_complete, "a piece after the end of its body"
        cycle.transport.write(b"%x\r\n%b\r\n" % (len(piece), piece))
        return True
