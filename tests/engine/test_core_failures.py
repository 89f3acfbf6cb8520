"""EngineCore: failing steps, devices and bookkeeping reach the right readers."""

from __future__ import annotations

import asyncio

import pytest

from engine.errors import EngineDead
from engine.plan import StepPlan
from engine.types import FinishReason
from tests.engine.replica import (
    ask,
    assert_is_free,
    assert_is_whole,
    deliver_all,
    make_core,
    read_all,
    running,
    turn,
)
from tests.hash_model import HashRunner


async def test_a_failed_step_ends_its_requests_and_spares_the_others(
    caplog: pytest.LogCaptureFixture,
) -> None:
    runner = HashRunner()
    async with running(make_core(runner, num_slots=1)) as core:
        failing, spared = core.submit(ask("failing")), core.submit(ask("spared"))
        await turn()
        runner.deliver_failure()
        await deliver_all(runner)
        failed = await read_all(failing)
        assert_is_whole(await read_all(spared), ask("spared"))
        assert_is_free(core)
    assert failed.finish_reason is FinishReason.ERROR
    assert failed.error == "injected failure"
    assert "step 0 failed: injected failure" in caplog.text


async def test_a_fatal_failure_ends_everybody_and_refuses_new_requests() -> None:
    runner = HashRunner()
    async with running(make_core(runner, num_slots=1), dies=True) as core:
        streams = [core.submit(ask("running")), core.submit(ask("waiting"))]
        await turn()
        runner.deliver_failure(is_fatal=True)
        await turn()
        deltas = [await read_all(stream) for stream in streams]
        assert core.snapshot().is_dead
        assert not core.snapshot().is_accepting
        assert core.snapshot().seconds_since_commit is None
        with pytest.raises(EngineDead, match="injected failure"):
            core.submit(ask("late"))
        assert await core.drain(1)
    assert [delta.finish_reason for delta in deltas] == [FinishReason.ERROR] * 2
    assert deltas[1].error == "the engine died: injected failure"


class RefusingRunner(HashRunner):
    def submit(self, plan: StepPlan) -> None:
        raise OSError("no device")


async def test_a_runner_that_raises_takes_the_engine_out_of_service(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with running(make_core(RefusingRunner()), dies=True) as core:
        delta = await read_all(core.submit(ask()))
        assert core.snapshot().is_dead
        assert_is_free(core)
    assert delta.error == "the engine died: OSError: no device"
    assert "the loop of hash failed" in caplog.text


async def test_broken_books_are_reported_to_every_reader(caplog: pytest.LogCaptureFixture) -> None:
    runner = HashRunner()
    async with running(make_core(runner), dies=True) as core:
        streams = [core.submit(ask("a", max_tokens=1)), core.submit(ask("b"))]
        await turn()
        for response in core._responses:
            assert response.seq.slot is not None
            core._scheduler.cache.pool.release(response.seq.slot)  # a bug that frees slots in use
        runner.deliver()
        deltas = [await read_all(stream) for stream in streams]
    assert [delta.finish_reason for delta in deltas] == [FinishReason.ERROR] * 2
    assert "stale SlotRef" in caplog.text


async def test_a_leaked_slot_is_found_when_the_engine_is_idle() -> None:
    runner = HashRunner()
    async with running(make_core(runner), dies=True) as core:
        stream = core.submit(ask())
        await turn()
        leaked = core._scheduler.cache.pool.alloc()
        assert leaked is not None
        await deliver_all(runner)
        assert_is_whole(await read_all(stream), ask())
        assert core._death == "AssertionError: 1 slots used, known are []"


async def test_the_age_of_the_last_commit_shows_a_hanging_device() -> None:
    runner = HashRunner()
    async with running(make_core(runner)) as core:
        assert core.snapshot().seconds_since_commit is None
        core.submit(ask())
        await turn()
        await asyncio.sleep(0.1)
        age_s = core.snapshot().seconds_since_commit
        assert age_s is not None
        assert 0.1 <= age_s < 10
        runner.deliver()
        await turn()
        younger_s = core.snapshot().seconds_since_commit
        assert younger_s is not None
        assert younger_s < 0.1
        await deliver_all(runner)
        assert core.snapshot().seconds_since_commit is None
