"""Batches: accepted once, never refused half way, and nobody's engine goes away before the end."""

from __future__ import annotations

import asyncio

import pytest

from engine.errors import Draining, EngineDead, InvalidRequest, Overloaded
from engine.types import FinishReason
from tests.engine.replica import (
    ask,
    assert_is_free,
    assert_is_whole,
    deliver_all,
    limits,
    make_core,
    read_all,
    running,
    turn,
)
from tests.hash_model import HashRunner


async def test_a_full_queue_refuses_a_batch_but_not_the_rest_of_one() -> None:
    runner = HashRunner()
    core = make_core(runner, limits(max_waiting=1), max_batch_size=1, num_slots=1)
    async with running(core):
        with core.open_batch() as batch:
            await turn()
            others = [core.submit(ask(f"other-{i}")) for i in range(2)]
            with pytest.raises(Overloaded):
                core.submit(ask("refused"))
            with pytest.raises(Overloaded):
                core.open_batch()
            asked = ask("part", (9, 8))
            part = batch.submit(asked)
            await deliver_all(runner)
            assert_is_whole(await read_all(part), asked)
            for stream in others:
                await read_all(stream)
        assert_is_free(core)


async def test_a_drain_waits_for_the_rest_of_a_batch() -> None:
    runner = HashRunner()
    core = make_core(runner)
    async with running(core):
        with core.open_batch() as batch:
            drain = asyncio.create_task(core.drain(20))
            await turn()
            with pytest.raises(Draining):
                core.submit(ask("late"))
            with pytest.raises(Draining):
                core.open_batch()
            for number in range(3):
                asked = ask(f"part-{number}")
                stream = batch.submit(asked)
                await deliver_all(runner)
                assert_is_whole(await read_all(stream), asked)
                assert not drain.done(), "the engine is empty, but the batch is open"
        assert await drain


async def test_a_drain_that_takes_too_long_aborts_the_batch() -> None:
    core = make_core(HashRunner())
    async with running(core):
        with core.open_batch() as batch:
            stream = batch.submit(ask("part"))
            assert not await core.drain(0.01)
            assert (await read_all(stream)).finish_reason is FinishReason.ABORT


async def test_after_the_end_of_an_engine_nothing_more_is_taken() -> None:
    core = make_core(HashRunner())
    async with running(core):
        batch = core.open_batch()
    with pytest.raises(Draining):
        batch.submit(ask("part"))


async def test_a_dead_engine_takes_nothing_more() -> None:
    runner = HashRunner()
    core = make_core(runner)
    async with running(core, dies=True):
        with core.open_batch() as batch:
            stream = batch.submit(ask("part"))
            await turn()
            runner.deliver_failure(is_fatal=True)
            assert (await read_all(stream)).finish_reason is FinishReason.ERROR
            with pytest.raises(EngineDead):
                batch.submit(ask("next"))


async def test_leaving_ends_what_still_runs_and_frees_its_slot() -> None:
    runner = HashRunner()
    core = make_core(runner)
    async with running(core):
        with core.open_batch() as batch:
            for number in range(3):
                batch.submit(ask(f"part-{number}"))
            await turn()
        assert_is_free(core)
        assert await core.drain(1)


async def test_parts_are_checked_like_requests() -> None:
    core = make_core(HashRunner())
    async with running(core):
        with core.open_batch() as batch, pytest.raises(InvalidRequest) as refusal:
            batch.submit(ask("part", (-1,)))
    assert refusal.value.field == "prompt_ids"


async def test_waiting_parts_are_not_handed_to_another_engine() -> None:
    runner = HashRunner()
    core = make_core(runner, num_slots=1, max_batch_size=1)
    async with running(core):
        with core.open_batch() as batch:
            streams = [batch.submit(ask(f"part-{number}")) for number in range(3)]
            other = core.submit(ask("other"))
            await turn()
            assert [request.request_id for request, _ in core.take_waiting()] == ["other"]
            await deliver_all(runner)
            for stream in streams:
                assert_is_whole(await read_all(stream), ask())
        other.close()
