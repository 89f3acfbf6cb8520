"""Streams as events, where what matters is who is ended when."""

from __future__ import annotations

from api.answers import Answers
from api.encode import AnswerHead
from api.encode_completion import CompletionEncoder
from api.errors import ApiError
from api.sse import DONE, KEEP_ALIVE, event_stream
from engine.client import RequestStream
from engine.types import FinishReason, OutputDelta

HEAD = AnswerHead(answer_id="a", created=1, model_name="m", fingerprint="f", num_choices=2)


def failure(delta: OutputDelta) -> ApiError:
    return ApiError(500, delta.error or "", code="engine_error")


def never_finished() -> dict[str, object]:
    raise AssertionError("a failed answer has no usage")


async def test_failure_ends_the_others_before_the_reader_has_read_it():
    aborted: list[str] = []
    streams = [RequestStream(f"r-{i}", aborted.append) for i in range(2)]
    pieces = event_stream(Answers(streams), CompletionEncoder(HEAD), failure, never_finished, 1)
    streams[0].put(OutputDelta(text="so far"))
    streams[1].put(OutputDelta(finish_reason=FinishReason.ERROR, error="broken"))
    piece = await anext(pieces)
    assert aborted == ["r-0"]
    assert b"so far" in piece
    assert piece.endswith(DONE)
    assert [rest async for rest in pieces] == []


async def test_crash_while_encoding_is_told_and_ends_all(caplog):
    aborted: list[str] = []
    streams = [RequestStream(f"r-{i}", aborted.append) for i in range(2)]
    encoder = CompletionEncoder(HEAD)
    encoder.piece = lambda *_: 1 // 0  # type: ignore[method-assign]
    pieces = event_stream(Answers(streams), encoder, failure, never_finished, 1)
    streams[0].put(OutputDelta(text="x"))
    (piece,) = [piece async for piece in pieces]
    assert b'"internal_error"' in piece
    assert aborted == ["r-0", "r-1"]
    assert "ZeroDivisionError" in caplog.text


async def test_empty_deltas_give_no_piece():
    """BlackSheep would take an empty one for the end of the body."""
    streams = [RequestStream("r", lambda _: None)]
    pieces = event_stream(Answers(streams), CompletionEncoder(HEAD), failure, dict, 0.01)
    streams[0].put(OutputDelta(text=""))
    assert await anext(pieces) == KEEP_ALIVE
    streams[0].put(OutputDelta(finish_reason=FinishReason.LENGTH))
    assert (await anext(pieces)).endswith(DONE)
