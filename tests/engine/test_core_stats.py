"""EngineCore: what it tells the statistics."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from engine.state.parts import StateParts
from engine.types import CacheStats, FinishReason
from tests.engine.replica import (
    Recorder,
    ask,
    assert_is_whole,
    deliver_all,
    make_core,
    read_all,
    running,
    turn,
)
from tests.hash_model import HashRunner


async def test_stats_tell_rows_tokens_and_gaps_of_each_step() -> None:
    runner, stats = HashRunner(), Recorder()
    async with running(make_core(runner, stats=stats)) as core:
        core.submit(ask(prompt_ids=(1, 2, 3), max_tokens=2))
        await deliver_all(runner)
    first, second = stats.steps
    assert (first.num_prefill_rows, first.num_prefill_tokens, first.num_decode_rows) == (1, 3, 0)
    assert (second.num_prefill_rows, second.num_prefill_tokens, second.num_decode_rows) == (0, 0, 1)
    assert first.inter_token_s == ()
    assert len(second.inter_token_s) == 1


async def test_stats_tell_the_times_of_a_finished_request() -> None:
    runner, stats = HashRunner(), Recorder()
    async with running(make_core(runner, stats=stats)) as core:
        core.submit(ask())
        await turn()
        await asyncio.sleep(0.01)
        await deliver_all(runner)
    [one] = stats.requests
    assert one.finish_reason is FinishReason.LENGTH
    assert (one.num_prompt_tokens, one.num_output_tokens) == (3, 6)
    assert one.queue_s is not None
    assert one.prefill_s is not None
    assert one.time_to_first_token_s is not None
    assert one.prefill_s >= 0.01
    assert one.time_to_first_token_s == pytest.approx(one.queue_s + one.prefill_s)
    assert one.latency_s >= one.time_to_first_token_s


async def test_cached_tokens_are_told_to_reader_statistics_and_gauges() -> None:
    runner, stats = HashRunner(), Recorder()
    request = ask(prompt_ids=tuple(range(11)), max_tokens=2)
    async with running(make_core(runner, stats=stats, parts=StateParts(seed=b"seed"))) as core:
        deltas = []
        for name in ("first", "again"):
            stream = core.submit(replace(request, request_id=name))
            await deliver_all(runner)
            deltas.append(await read_all(stream))
        snapshot = core.snapshot()
    for delta in deltas:
        assert_is_whole(delta, request)
    assert [delta.num_cached_tokens for delta in deltas] == [0, 11]
    assert [one.num_cached_tokens for one in stats.requests] == [0, 11]
    # Paragraphs of 4. Snapshots: the prompt's last boundary and its end with logits, at 8 and 11,
    # and where both ended, at 12.
    assert snapshot.cache == CacheStats(
        num_queried_tokens=22, num_hit_tokens=11, num_snapshots=3, num_device_pages=3
    )
    assert snapshot.num_free_slots == snapshot.num_slots == 4


async def test_stats_of_a_request_that_never_ran_have_no_times() -> None:
    runner, stats = HashRunner(), Recorder()
    async with running(make_core(runner, stats=stats)) as core:
        core.submit(ask())
        core.abort("r")
    [one] = stats.requests
    assert one.finish_reason is FinishReason.ABORT
    assert (one.queue_s, one.prefill_s, one.time_to_first_token_s) == (None, None, None)
