"""Several streams read as one."""

from __future__ import annotations

import asyncio

import pytest
from msgspec.structs import replace

from api.answers import AnswerFailed, Answers, best
from engine.client import RequestStream
from engine.types import FinishReason, OutputDelta, StateInfo


class Queued:
    """n streams with a book of who was aborted."""

    def __init__(self, num_streams: int) -> None:
        self.aborted: list[str] = []
        self.streams = [RequestStream(f"r-{i}", self.aborted.append) for i in range(num_streams)]
        self.answers = Answers(self.streams)


def text(content: str, token_id: int = 1) -> OutputDelta:
    return OutputDelta(text=content, token_ids=(token_id,))


def end(content: str = "", reason: FinishReason = FinishReason.LENGTH) -> OutputDelta:
    return OutputDelta(text=content, token_ids=(9,), finish_reason=reason)


async def test_one_wake_up_takes_what_all_have():
    queued = Queued(3)
    reader = asyncio.create_task(queued.answers.take())
    await asyncio.sleep(0)
    queued.streams[2].put(text("c"))
    queued.streams[0].put(text("a"))
    queued.streams[0].put(text("b"))
    found = await reader
    assert [(index, delta.text) for index, delta in found] == [(0, "ab"), (2, "c")]


async def test_what_came_before_the_reader_is_not_missed():
    stream = RequestStream("r", lambda _: None)
    stream.put(text("a"))
    answers = Answers([stream])
    async with asyncio.timeout(1):
        ((index, delta),) = await answers.take()
    assert (index, delta.text) == (0, "a")


async def test_ends_hold_the_tokens_of_the_whole():
    queued = Queued(2)
    for stream in queued.streams:
        stream.put(text("x", 3))
    await queued.answers.take()
    queued.streams[1].put(end())
    await queued.answers.take()
    assert not queued.answers.is_finished
    queued.streams[0].put(end())
    await queued.answers.take()
    assert queued.answers.is_finished
    assert [answer.token_ids for answer in queued.answers.ends] == [(3, 9), (3, 9)]


async def test_collect_gives_whole_answers_in_order_and_aborts_nobody():
    queued = Queued(2)
    reader = asyncio.create_task(queued.answers.collect())
    queued.streams[1].put(text("b"))
    await asyncio.sleep(0)
    queued.streams[1].put(end("B"))
    await asyncio.sleep(0)
    queued.streams[0].put(end("A"))
    assert [answer.text for answer in await reader] == ["A", "bB"]
    assert queued.aborted == []


@pytest.mark.parametrize("reason", [FinishReason.ERROR, FinishReason.ABORT])
async def test_failure_of_one_ends_all(reason: FinishReason):
    queued = Queued(3)
    queued.streams[0].put(end())
    queued.streams[1].put(end(reason=reason))
    with pytest.raises(AnswerFailed) as caught:
        await queued.answers.collect()
    assert caught.value.delta.finish_reason is reason
    assert queued.aborted == ["r-2"]


async def test_suspended_is_an_end_like_others():
    queued = Queued(1)
    queued.streams[0].put(end("so far", FinishReason.SUSPENDED))
    (answer,) = await queued.answers.collect()
    assert answer.text == "so far"


async def test_cancelled_reader_ends_all():
    queued = Queued(2)
    reader = asyncio.create_task(queued.answers.collect())
    await asyncio.sleep(0)
    reader.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reader
    assert queued.aborted == ["r-0", "r-1"]


def test_best_have_the_highest_mean_log_probability():
    def answer(*logprobs: float) -> OutputDelta:
        return OutputDelta(text=str(logprobs), logprobs=logprobs)

    short, long, poor, empty = answer(-1.0), answer(-0.5, -0.7, -0.6), answer(-3.0, -0.1), answer()
    assert best([empty, short, poor, long, poor], 5, 4) == [3, 1, 2, 4]
    assert best([poor, long, short], 3, 1) == [1]


def test_best_are_chosen_for_each_prompt():
    answers = [OutputDelta(logprobs=(value,)) for value in (-3.0, -1.0, -2.0, -5.0, -6.0, -4.0)]
    assert best(answers, 3, 2) == [1, 2, 5, 3]
    assert best(answers, 3, 3) == [0, 1, 2, 3, 4, 5], "all of them stay in order"


def test_best_of_equals_is_the_first():
    same = [OutputDelta(text=name, logprobs=(-1.0,)) for name in "abc"]
    assert best(same, 3, 2) == [0, 1]


async def test_abandoned_answers_give_the_states_that_nobody_will_read_of():
    queued = Queued(4)
    states = [
        StateInfo(
            state_id=f"state-{number}",
            num_tokens=1,
            num_bytes=1,
            created_unix_s=0.0,
            expires_unix_s=None,
            label="",
            is_pinned=False,
            has_logits=False,
            parent_id=None,
            tier="host",
        )
        for number in range(2)
    ]
    queued.streams[0].put(replace(end(), state=states[0]))
    await queued.answers.take()
    queued.streams[1].put(replace(end(), state=states[1]))
    queued.streams[2].put(end())
    assert queued.answers.abandon() == states
    assert queued.aborted == ["r-3"]
