"""EngineCore: what it tells the statistics."""

from __future__ import annotations

import asyncio

import pytest

from engine.types import FinishReason
from tests.engine.replica import (
    Recorder,
    ask,
    deliver_all,
    make_core,
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


async def test_stats_of_a_request_that_never_ran_have_no_times() -> None:
    runner, stats = HashRunner(), Recorder()
    async with running(make_core(runner, stats=stats)) as core:
        core.submit(ask())
        core.abort("r")
    [one] = stats.requests
    assert one.finish_reason is FinishReason.ABORT
    assert (one.queue_s, one.prefill_s, one.time_to_first_token_s) == (None, None, None)
