"""Streams as events: who is ended when, and which way each piece goes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from api.answers import Answers
from api.encode import AnswerHead
from api.encode_completion import CompletionEncoder
from api.errors import ApiError
from api.sse import DONE, KEEP_ALIVE, EventBody
from engine.client import RequestStream
from engine.types import FinishReason, OutputDelta
from tests.api.harness import eventually

HEAD = AnswerHead(answer_id="a", created=1, model_name="m", fingerprint="f", num_choices=2)
SHORT_S, LONG_S = 0.01, 60.0


class Writer:
    """Takes pieces while it is `open`."""

    def __init__(self) -> None:
        self.is_open = True
        self.written: list[bytes] = []

    def write(self, piece: bytes) -> bool:
        if self.is_open:
            self.written.append(piece)
        return self.is_open


class Stream:
    """The body of an answer with so many choices, and who was aborted."""

    def __init__(
        self, num_choices: int = 1, keep_alive_s: float = LONG_S, writer: Writer | None = None
    ) -> None:
        self.aborted: list[str] = []
        self.streams = [RequestStream(f"r-{i}", self.aborted.append) for i in range(num_choices)]
        self.encoder = CompletionEncoder(HEAD)
        self.body = EventBody(
            Answers(self.streams), self.encoder, failure, dict, keep_alive_s, writer=writer
        )
        self.pieces = self.body.pieces()

    def say(self, text: str, reason: FinishReason | None = None) -> None:
        self.streams[0].put(OutputDelta(text=text, finish_reason=reason))

    async def read_on(self) -> asyncio.Task[bytes]:
        """A reader who waits for the next piece."""
        reader = asyncio.create_task(next_of(self.pieces))
        await settle()
        return reader


async def next_of(pieces: AsyncIterator[bytes]) -> bytes:
    return await anext(pieces)


async def settle() -> None:
    """Let everybody go on who can."""
    for _ in range(5):
        await asyncio.sleep(0)


def failure(delta: OutputDelta) -> ApiError:
    return ApiError(500, delta.error or "", code="engine_error")


async def test_failure_ends_the_others_before_the_reader_has_read_it():
    stream = Stream(num_choices=2)
    stream.streams[0].put(OutputDelta(text="so far"))
    stream.streams[1].put(OutputDelta(finish_reason=FinishReason.ERROR, error="broken"))
    piece = await anext(stream.pieces)
    assert stream.aborted == ["r-0"]
    assert b"so far" in piece
    assert piece.endswith(DONE)
    assert [rest async for rest in stream.pieces] == []


async def test_crash_while_encoding_is_told_and_ends_all(caplog):
    for writer in (None, Writer()):
        stream = Stream(num_choices=2, writer=writer)
        stream.encoder.piece = lambda *_: 1 // 0  # type: ignore[method-assign]
        reader = await stream.read_on()
        stream.say("x")
        assert b'"internal_error"' in await reader
        assert [rest async for rest in stream.pieces] == []
        assert stream.aborted == ["r-0", "r-1"]
        assert "ZeroDivisionError" in caplog.text


async def test_empty_deltas_give_no_piece():
    """BlackSheep would take an empty one for the end of the body."""
    stream = Stream(keep_alive_s=SHORT_S)
    stream.say("")
    assert await anext(stream.pieces) == KEEP_ALIVE
    stream.say("", FinishReason.LENGTH)
    assert (await anext(stream.pieces)).endswith(DONE)


async def test_writer_is_given_all_but_the_last_piece():
    writer = Writer()
    stream = Stream(writer=writer)
    reader = await stream.read_on()
    for text in ("one", "two"):
        stream.say(text)
        await settle()
    assert [b"one" in writer.written[0], b"two" in writer.written[1]] == [True, True]
    assert not reader.done()
    stream.say("three", FinishReason.LENGTH)
    last = await reader
    assert b"three" in last
    assert last.endswith(DONE)
    assert len(writer.written) == 2


async def test_step_that_gives_several_choices_tokens_is_one_piece():
    writer = Writer()
    stream = Stream(num_choices=2, writer=writer)
    await stream.read_on()
    for one in stream.streams:
        one.put(OutputDelta(text="x"))
    assert writer.written == [], "the engine's own work comes first"
    await settle()
    (piece,) = writer.written
    assert piece.count(b"data: ") == 2


async def test_slow_reader_gets_what_it_missed_in_one_piece():
    """While it waits for the reader nothing is written past the piece that it could not write."""
    writer = Writer()
    stream = Stream(writer=writer)
    reader = await stream.read_on()
    writer.is_open = False
    stream.say("one")
    assert b"one" in await reader
    writer.is_open = True
    stream.say("two")
    stream.say("three")
    await settle()
    assert writer.written == []
    piece = await anext(stream.pieces)
    assert b"two" in piece
    assert b"three" in piece
    await stream.read_on()
    stream.say("four")
    await settle()
    (piece,) = writer.written
    assert b"four" in piece


async def test_silence_after_a_written_piece_is_broken_by_the_writer():
    writer = Writer()
    stream = Stream(keep_alive_s=SHORT_S, writer=writer)
    reader = await stream.read_on()
    stream.say("one")
    await eventually(lambda: writer.written.count(KEEP_ALIVE) >= 2)
    assert b"one" in writer.written[0]
    assert not reader.done()


async def test_keep_alive_waits_for_silence_not_for_its_clock():
    """Pieces come more often than the alarm would go off, for several of its times."""
    writer = Writer()
    stream = Stream(keep_alive_s=0.2, writer=writer)
    await stream.read_on()
    loop = asyncio.get_running_loop()
    written, late, until = 0, False, loop.time() + 0.7
    while loop.time() < until:
        before = loop.time()
        stream.say("x")
        await settle()
        written += 1
        await asyncio.sleep(0.02)
        late = late or loop.time() - before > 0.15  # a busy machine: then there was silence
    assert late or writer.written.count(KEEP_ALIVE) == 0
    assert written > 5 or late


async def test_reader_that_leaves_is_written_to_no_more():
    writer = Writer()
    stream = Stream(keep_alive_s=SHORT_S, writer=writer)
    reader = await stream.read_on()
    reader.cancel()
    await asyncio.wait([reader])
    stream.say("x")
    await asyncio.sleep(5 * SHORT_S)
    assert writer.written == []
