"""EngineCore: a full queue, live limits, and requests that move to another engine."""

from __future__ import annotations

import asyncio

import pytest

from engine.errors import InvalidRequest, Overloaded
from engine.types import FinishReason
from tests.engine.replica import (
    ask,
    assert_is_whole,
    deliver_all,
    limits,
    make_core,
    read_all,
    running,
    turn,
)
from tests.hash_model import HashRunner


async def test_a_full_queue_is_refused_with_a_time_to_try_again() -> None:
    runner = HashRunner()
    live = limits(max_waiting=2)
    async with running(make_core(runner, live, num_slots=1)) as core:
        for i in range(3):  # one can start at once, two wait
            core.submit(ask(f"r{i}"))
        with pytest.raises(Overloaded, match="max_waiting = 2") as refused:
            core.submit(ask("late"))
        assert 1 <= refused.value.retry_after_s <= 60
        await deliver_all(runner)
        core.submit(ask("later"))


async def test_the_time_to_try_again_comes_from_queue_and_recent_rate() -> None:
    runner = HashRunner()
    async with running(make_core(runner, limits(max_waiting=39), num_slots=1)) as core:
        core.submit(ask("only one so far", max_tokens=1))
        await deliver_all(runner)
        await asyncio.sleep(0.05)  # one request in at least so long
        for i in range(40):
            core.submit(ask(f"r{i}"))
        with pytest.raises(Overloaded) as refused:
            core.submit(ask("late"))
        assert refused.value.retry_after_s >= 40 * 0.05


async def test_a_request_id_in_use_is_refused() -> None:
    async with running(make_core(HashRunner())) as core:
        core.submit(ask("twin"))
        with pytest.raises(InvalidRequest, match="'twin' is in use") as refused:
            core.submit(ask("twin"))
        assert refused.value.field == "request_id"
        assert core.snapshot().num_waiting == 1


async def test_requests_that_can_start_at_once_do_not_count_as_waiting() -> None:
    async with running(make_core(HashRunner(), limits(max_waiting=0))) as core:
        for i in range(4):
            core.submit(ask(f"r{i}"))
        with pytest.raises(Overloaded):
            core.submit(ask("late"))


async def test_reconfigure_works_between_steps_and_shows_in_info() -> None:
    runner = HashRunner()
    async with running(make_core(runner, limits(decode_first=True))) as core:
        stream = core.submit(ask("old"))
        await turn()
        core.reconfigure(limits(decode_first=False, max_batch_tokens=8, max_context_len=50))
        assert core.info.max_batch_tokens == 8
        assert core.info.max_context_len == 50
        core.submit(ask("new", tuple(range(45))))
        runner.deliver()
        await turn()
        newest = runner.plans[-1]
        assert [(row.seq_id, row.num_tokens) for row in newest.rows] == [(1, 8)]
        await deliver_all(runner)
        assert_is_whole(await read_all(stream), ask("old"))


async def test_reconfigure_refuses_limits_that_cannot_work() -> None:
    async with running(make_core(HashRunner())) as core:
        with pytest.raises(ValueError, match="max_batch_tokens = 7"):
            core.reconfigure(limits(max_batch_tokens=7))
        assert core.info.max_batch_tokens == 32


async def test_waiting_requests_move_to_another_engine_and_keep_their_streams() -> None:
    old_runner, new_runner = HashRunner(), HashRunner()
    old, new = make_core(old_runner, num_slots=1), make_core(new_runner)
    async with running(old), running(new):
        streams = {name: old.submit(ask(name)) for name in ("runs", "moves", "leaves", "shut")}
        await turn()
        taken = old.take_waiting()
        assert [request.request_id for request, _ in taken] == ["moves", "leaves", "shut"]
        assert old.snapshot().num_waiting == 0
        streams["shut"].close()  # its reader goes away between the two
        for request, stream in taken:
            new.adopt(request, stream)
        streams["leaves"].close()  # and this one afterwards
        assert new.snapshot().num_waiting == 1
        await deliver_all(old_runner)
        await deliver_all(new_runner)
        for name in ("runs", "moves"):
            assert_is_whole(await read_all(streams[name]), ask(name))
        assert await old.drain(0)


async def test_an_adopted_request_keeps_its_deadline() -> None:
    old, new = make_core(HashRunner(), num_slots=1), make_core(HashRunner())
    async with running(old), running(new):
        old.submit(ask("first"))
        await turn()
        stream = old.submit(ask("second", timeout_s=100))
        stream.submitted_s -= 60  # as if it had waited a minute
        [(request, _)] = old.take_waiting()
        new.adopt(request, stream)
        left_s = new._responses._timers["second"].when() - asyncio.get_running_loop().time()
        assert left_s == pytest.approx(40, abs=1)
        assert old._responses._timers == {}


async def test_a_request_that_cannot_be_adopted_ends_with_an_error() -> None:
    old, new = (
        make_core(HashRunner(), num_slots=1),
        make_core(HashRunner(), limits(max_context_len=2)),
    )
    async with running(old), running(new):
        old.submit(ask("first"))
        await turn()
        stream = old.submit(ask("second"))
        [(request, _)] = old.take_waiting()
        new.adopt(request, stream)
        delta = await read_all(stream)
    assert delta.finish_reason is FinishReason.ERROR
    assert delta.error is not None
    assert "max_context_len = 2" in delta.error
