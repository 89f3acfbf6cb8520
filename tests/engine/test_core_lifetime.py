"""EngineCore: drain and close end in time, whatever the device does."""

from __future__ import annotations

import asyncio
import logging
import threading

import pytest

from engine.errors import Draining
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
from tests.hash_model import HashRunner, ThreadedHashRunner


async def test_drain_finishes_what_was_accepted_and_refuses_the_rest() -> None:
    runner = ThreadedHashRunner()
    async with running(make_core(runner, num_slots=1)) as core:
        streams = [core.submit(ask(f"r{i}")) for i in range(3)]
        draining = asyncio.create_task(core.drain(10))
        await turn()
        with pytest.raises(Draining):
            core.submit(ask("late"))
        assert not core.snapshot().is_accepting
        assert await draining
        for i, stream in enumerate(streams):
            assert_is_whole(await read_all(stream), ask(f"r{i}"))


async def test_drain_waits_for_the_last_request() -> None:
    runner = HashRunner()
    async with running(make_core(runner)) as core:
        core.submit(ask("short", max_tokens=1))
        core.submit(ask("long"))
        draining = asyncio.create_task(core.drain(10))
        await turn()
        runner.deliver()
        await turn()
        assert core.snapshot().num_running == 1
        assert not draining.done()
        await deliver_all(runner)
        assert await draining


async def test_drain_aborts_what_is_left_at_its_deadline() -> None:
    runner = HashRunner()
    async with running(make_core(runner)) as core:
        stream = core.submit(ask())
        assert not await core.drain(0.01)
        assert_is_free(core)
        assert (await read_all(stream)).finish_reason is FinishReason.ABORT


async def test_drain_of_an_idle_engine_is_done_at_once() -> None:
    async with running(make_core(HashRunner())) as core:
        assert await core.drain(0)


async def test_close_aborts_what_runs_and_may_be_called_again() -> None:
    runner = HashRunner()
    core = make_core(runner)
    core.start()
    stream = core.submit(ask())
    await turn()
    await asyncio.gather(core.close(), core.close())
    await core.close()
    assert runner.is_closed
    assert (await read_all(stream)).finish_reason is FinishReason.ABORT
    assert_is_free(core)
    with pytest.raises(Draining):
        core.submit(ask("late"))


async def test_close_works_before_the_start() -> None:
    runner = HashRunner()
    await make_core(runner).close()
    assert runner.is_closed


async def test_close_goes_on_when_its_caller_is_cancelled() -> None:
    runner = HashRunner()
    core = make_core(runner)
    core.start()
    closing = asyncio.create_task(core.close())
    await asyncio.sleep(0)
    closing.cancel()
    await core.close()
    assert runner.is_closed


async def test_close_does_not_wait_for_a_dead_device_thread() -> None:
    core = make_core(ThreadedHashRunner(die_at=1))
    core.start()
    stream = core.submit(ask())
    await anext(stream)
    async with asyncio.timeout(5):
        await core.close()
    assert (await read_all(stream)).finish_reason is FinishReason.ABORT


class HangingRunner(HashRunner):
    def __init__(self) -> None:
        super().__init__()
        self.may_stop = threading.Event()

    def close(self) -> None:
        self.may_stop.wait()


async def test_close_leaves_a_hanging_device_thread_behind(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("engine.core.CLOSE_TIMEOUT_S", 0.02)
    runner = HangingRunner()
    core = make_core(runner)
    core.start()
    async with asyncio.timeout(5):
        await core.close()
    [left] = [thread for thread in threading.enumerate() if thread.name == "runner close"]
    runner.may_stop.set()
    left.join()
    assert left.daemon, "it would keep the process alive"
    assert "did not stop and is left behind" in caplog.text


class BrokenRunner(HashRunner):
    def close(self) -> None:
        raise OSError("cannot close")


async def test_close_ends_when_the_runner_fails_to(caplog: pytest.LogCaptureFixture) -> None:
    core = make_core(BrokenRunner())
    core.start()
    async with asyncio.timeout(5):
        await core.close()
    assert "cannot close" in caplog.text


async def test_a_result_after_close_is_ignored(caplog: pytest.LogCaptureFixture) -> None:
    runner = HashRunner()
    core = make_core(runner)
    core.start()
    core.submit(ask())
    await turn()
    await core.close()
    with caplog.at_level(logging.WARNING):
        runner.deliver()
        await turn()
    assert caplog.text == ""
    assert_is_free(core)
