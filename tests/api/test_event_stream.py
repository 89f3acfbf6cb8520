"""The reader that streams are judged by, judged by the examples and rules of the standard."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.event_stream import Event, EventStream, EventStreamError, events_of, read_all


def datas(stream: bytes) -> list[str]:
    return [event.data for event in events_of(stream)]


def test_examples_of_the_standard():
    assert datas(b"data: YHOO\ndata: +2\ndata: 10\n\n") == ["YHOO\n+2\n10"]
    assert datas(b"data\n\ndata\ndata\n\n") == ["", "\n"]
    assert datas(b"data:test\n\ndata: test\n\n") == ["test", "test"]
    named = b"event: add\ndata: 73857293\n\nevent: remove\ndata: 2153\n\ndata: x\n\n"
    assert events_of(named) == [
        Event("add", "73857293"),
        Event("remove", "2153"),
        Event("message", "x"),
    ]
    numbered = b": test stream\n\ndata: first\nid: 1\n\ndata:second\nid\n\ndata:  third\n\n"
    events, comments = read_all([numbered])
    assert events == [
        Event("message", "first", "1"), Event("message", "second"), Event("message", " third")
    ]  # fmt: skip
    assert comments == ["test stream"]


def test_colons_of_a_value_are_its_own_and_a_byte_order_mark_comes_first_only():
    assert datas("\ufeffdata: a: b:c\n\n".encode()) == ["a: b:c"]
    assert datas("data: \ufeff\n\n".encode()) == ["\ufeff"]
    with pytest.raises(EventStreamError, match="ignore the field"):
        events_of("data: x\n\n\ufeffdata: y\n\n".encode())


def test_retry_is_a_number_of_milliseconds():
    stream = EventStream()
    assert stream.feed(b"retry: 1500\ndata: x\n\n") == [Event("message", "x")]
    assert stream.retry_ms == 1500


@pytest.mark.parametrize(
    "data",
    [
        b"data: \xff\n\n",
        b"dat: x\n\n",
        b" data: x\n\n",
        b"id: a\0b\ndata: x\n\n",
        b"retry: soon\ndata: x\n\n",
        b"event: nothing\n\n",
    ],
)
def test_what_a_browser_passes_over_is_refused(data: bytes):
    with pytest.raises(EventStreamError):
        events_of(data)


@pytest.mark.parametrize("data", [b"data: x", b"data: x\n", b"event: y\n", b"data: x\n\n\xe4\xbd"])
def test_an_unfinished_stream_is_refused(data: bytes):
    with pytest.raises(EventStreamError, match="ends within"):
        events_of(data)


LINES = st.text(st.characters(exclude_characters="\r\n\ufeff", codec="utf-8"), max_size=8)


@given(
    events=st.lists(st.lists(LINES, min_size=1, max_size=3), max_size=4),
    end=st.sampled_from(["\n", "\r", "\r\n"]),
    cuts=st.lists(st.integers(0, 200)),
)
def test_neither_cuts_nor_line_ends_matter(events: list[list[str]], end: str, cuts: list[int]):
    blocks = [[": quiet", *(f"data: {line}" for line in event), ""] for event in events]
    data = "".join(line + end for block in blocks for line in block).encode()
    borders = sorted({0, len(data), *(cut for cut in cuts if cut < len(data))})
    pieces = [data[a:b] for a, b in pairwise(borders)]
    found, comments = read_all(pieces)
    assert [event.data for event in found] == ["\n".join(event) for event in events]
    assert comments == ["quiet"] * len(events)
    assert events_of(data) == found


def test_line_ends_may_be_mixed():
    assert datas(b"data: a\rdata: b\r\ndata: c\n\r\ndata: d\r\r") == ["a\nb\nc", "d"]
