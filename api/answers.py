"""Answers: the streams of one HTTP request, read as one. Knows deltas, no JSON and no sockets.

One wake-up takes what all of them have, however many tokens that is: a step of the engine gives
each of n answers a token at the same time.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence

from msgspec.structs import replace

from engine.client import RequestStream, merge
from engine.types import FinishReason, OutputDelta, StateInfo

COMPLETE = (FinishReason.STOP, FinishReason.LENGTH)
GOOD_ENDS = (*COMPLETE, FinishReason.SUSPENDED)


class AnswerFailed(Exception):
    """One of the answers ended otherwise than asked for, so all of them do."""

    def __init__(self, delta: OutputDelta) -> None:
        super().__init__(delta.error)
        self.delta = delta


class Answers:
    """Close it, or read it to the end, so that no request outlives its reader."""

    def __init__(self, streams: Sequence[RequestStream]) -> None:
        assert streams, "somebody answers"
        self._streams = streams
        self._wake = asyncio.Event()
        self.wake_with(self._wake.set)
        self._ids: list[list[int]] = [[] for _ in streams]
        self._ends: list[OutputDelta | None] = [None for _ in streams]
        self._num_open = len(streams)
        self.is_cancelled = False  # by its owner
        self.keeps_aborted = False  # then what there is is an answer

    @property
    def request_id(self) -> str:
        """The first one's."""
        return self._streams[0].request_id

    @property
    def is_finished(self) -> bool:
        """Every last delta was taken."""
        return self._num_open == 0

    @property
    def ends(self) -> list[OutputDelta]:
        """The last delta of each answer, with the token ids of the whole. Not before the end."""
        return [
            replace(end, token_ids=tuple(ids))
            for end, ids in zip(self._ends, self._ids, strict=True)
            if end is not None
        ]

    def is_good(self, end: FinishReason) -> bool:
        """An answer that ends so was answered."""
        is_kept = self.is_cancelled and self.keeps_aborted
        return end in GOOD_ENDS or (is_kept and end is FinishReason.ABORT)

    def cancel(self) -> None:
        """End what has not ended, for its owner, who reads on to the end."""
        self.is_cancelled = True
        for stream in self._streams:
            stream.abort()

    def wake_with(self, wake: Callable[[], None]) -> None:
        """From now on call `wake` for each delta that comes: for who reads with `poll`."""
        for stream in self._streams:
            stream.wake_with(wake)

    async def take(self) -> list[tuple[int, OutputDelta]]:
        """What has come, with the number of the answer. Not to be called at the end."""
        assert not self.is_finished, f"read past the end of {self.request_id}"
        while not (found := self.poll()):
            self._wake.clear()
            await self._wake.wait()
        return found

    async def collect(self) -> list[OutputDelta]:
        """Each whole answer as one delta. Raises AnswerFailed."""
        whole: list[OutputDelta | None] = [None for _ in self._streams]
        try:
            while not self.is_finished:
                for index, delta in await self.take():
                    if delta.finish_reason is not None and not self.is_good(delta.finish_reason):
                        raise AnswerFailed(delta)
                    before = whole[index]
                    whole[index] = delta if before is None else merge(before, delta)
        finally:
            self.close()
        return [answer for answer in whole if answer is not None]

    def close(self) -> None:
        """End what has not ended. Synchronous, so it works in any `finally`."""
        for stream in self._streams:
            stream.close()

    def abandon(self) -> list[StateInfo]:
        """Close, and give the states that were left by answers which have ended all the same."""
        self.close()
        self.poll()
        return [end.state for end in self._ends if end is not None and end.state is not None]

    def poll(self) -> list[tuple[int, OutputDelta]]:
        """What has come, without waiting."""
        found = []
        for index, stream in enumerate(self._streams):
            delta = stream.poll()
            if delta is None:
                continue
            found.append((index, delta))
            self._ids[index] += delta.token_ids
            if delta.finish_reason is not None:
                self._ends[index] = delta
                self._num_open -= 1
        return found


def best(candidates: Sequence[OutputDelta], num_each: int, num_choices: int) -> list[int]:
    """Of each `num_each` candidates the numbers of the `num_choices` with the highest mean log
    probability per token, the best one first; of as many choices, all in order."""
    chosen: list[int] = []
    for begin in range(0, len(candidates), num_each):
        group = range(begin, begin + num_each)
        if num_choices < num_each:
            ranked = sorted(group, key=lambda i: _mean_logprob(candidates[i]), reverse=True)
            chosen += ranked[:num_choices]
        else:
            chosen += group
    return chosen


def _mean_logprob(answer: OutputDelta) -> float:
    if not answer.logprobs:
        return -math.inf
    return math.fsum(answer.logprobs) / len(answer.logprobs)
