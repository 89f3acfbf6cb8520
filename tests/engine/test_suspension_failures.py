"""Suspension with a full disk, aborts, failing steps and broken records on the way."""

from __future__ import annotations

import logging

import msgspec
import pytest
from msgspec import structs

from engine.state.page import ReadFile, WriteFile, WriteRecord
from engine.types import FinishReason
from tests.engine.machine import assert_answers
from tests.engine.replica import ask, read_all, turn
from tests.engine.test_suspension import LONG, TIGHT, busy, resumed, step, suspended


@pytest.mark.parametrize("num_steps", [0, 2, 9])
@pytest.mark.parametrize("kind", [WriteFile, WriteRecord])
async def test_with_a_full_disk_answers_go_on_and_finish_here(
    kind: type[WriteFile] | type[WriteRecord], num_steps: int
) -> None:
    async with busy(TIGHT) as machine:
        requests = [ask(f"r{i}", (i, *LONG), seed=i, is_resumable=True) for i in range(6)]
        streams = [machine.core.submit(request) for request in requests]
        await step(machine, num_steps)
        machine.disk.fails = (kind,)
        deltas = await suspended(machine, streams)
        for request, delta in zip(requests, deltas, strict=True):
            if delta.finish_reason is not FinishReason.SUSPENDED:
                assert_answers(delta, request)
            else:
                assert kind is WriteFile, "a record that was not written resumes nobody"
                assert delta.num_output_tokens == 0, "a page that was not written resumes nobody"
        machine.disk.fails = ()
        await machine.restart()
        for request, delta in zip(requests, deltas, strict=True):
            assert_answers(await resumed(machine, delta), request)


async def test_one_page_that_cannot_be_written_keeps_nobody_else_from_leaving() -> None:
    async with busy() as machine:
        requests = [ask(f"r{i}", (i, *LONG), max_tokens=40, is_resumable=True) for i in range(4)]
        streams = [machine.core.submit(request) for request in requests]
        await step(machine, 6)
        draining = machine.core.drain(10, suspends=True)
        first = True

        async def fail_the_first() -> bool:
            return await draining

        machine.disk.fails = (WriteFile,)
        finish = machine.disk.finish

        def finish_once() -> None:
            nonlocal first
            is_page = isinstance(machine.disk.jobs[0], WriteFile)
            finish()
            if is_page and first:
                first = False
                machine.disk.fails = ()

        machine.disk.finish = finish_once  # type: ignore[method-assign]
        assert await machine.while_settling(fail_the_first())
        deltas = [await read_all(stream) for stream in streams]
        reasons = [delta.finish_reason for delta in deltas]
        assert reasons.count(FinishReason.SUSPENDED) >= 1
        assert reasons.count(FinishReason.LENGTH) >= 1
        await machine.check_is_sound()
        await machine.restart()
        for request, delta in zip(requests, deltas, strict=True):
            assert_answers(await resumed(machine, delta), request)


@pytest.mark.parametrize("num_jobs", [0, 1, 2, 3])
async def test_an_abort_on_the_way_to_the_disk_leaves_nothing(num_jobs: int) -> None:
    async with busy() as machine:
        stream = machine.core.submit(ask("r", LONG, max_tokens=40, is_resumable=True))
        await step(machine, 4)
        machine.core._persistence.begin_suspending()
        await turn()
        while machine.runner.plans:
            await step(machine, 1)
        for _ in range(num_jobs):
            if machine.disk.jobs:
                machine.disk.finish()
            await turn()
        is_gone = "r" not in machine.core._responses
        machine.core.abort("r")
        delta = await read_all(stream)
        await machine.settle()
        await machine.check_is_sound()
        assert (delta.finish_reason is FinishReason.SUSPENDED) == is_gone
        assert len(machine.folder.records) == is_gone
        if not is_gone:
            assert delta.finish_reason is FinishReason.ABORT


async def test_a_step_that_fails_under_the_copy_ends_the_answer_with_its_error() -> None:
    async with busy() as machine:
        stream = machine.core.submit(ask("r", LONG, max_tokens=40, is_resumable=True))
        await step(machine, 4)
        draining = machine.while_settling(machine.core.drain(10, suspends=True))
        machine.core._persistence.begin_suspending()
        await turn()
        while not any(plan.moves for plan in [machine.runner.plans[0]]):
            await step(machine, 1)
        machine.runner.deliver_failure()
        assert await draining
        delta = await read_all(stream)
        assert delta.finish_reason is FinishReason.ERROR
        await machine.check_is_sound()
        assert machine.folder.records == {}


async def test_a_record_is_written_after_the_page_and_told_after_the_record() -> None:
    async with busy() as machine:
        stream = machine.core.submit(ask("r", LONG, max_tokens=40, is_resumable=True))
        await step(machine, 4)
        machine.core._persistence.begin_suspending()
        await turn()
        while machine.runner.plans:
            await step(machine, 1)
        while machine.disk.jobs:
            assert stream._is_finished is False, "it was told before it was certain"
            machine.disk.finish()
            await turn()
        kinds = [type(job) for job in machine.disk.done]
        assert kinds[-2:] == [WriteFile, WriteRecord]
        assert (await read_all(stream)).resume_id in machine.folder.records


async def test_a_broken_page_ends_the_resumed_answer_with_an_error() -> None:
    async with busy() as machine:
        stream = machine.core.submit(ask("r", LONG, max_tokens=40, is_resumable=True))
        await step(machine, 4)
        [delta] = await suspended(machine, [stream])
        [written] = [job for job in machine.disk.done if isinstance(job, WriteFile)][-1:]
        machine.folder.broken.add(written.file.digest)
        await machine.restart()
        whole = await resumed(machine, delta)
        assert whole.finish_reason is FinishReason.ERROR
        assert whole.error == "the state it was to go on from is lost"
        assert any(isinstance(job, ReadFile) for job in machine.disk.done)
        await machine.check_is_sound()
        assert machine.folder.records == {}


async def test_a_broken_or_old_record_is_given_up_with_one_line(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with busy() as machine:
        stream = machine.core.submit(ask("r", LONG, max_tokens=40, is_resumable=True))
        await step(machine, 4)
        [delta] = await suspended(machine, [stream])
        assert delta.resume_id is not None
        await machine.stop()
        data = machine.folder.records[delta.resume_id]
        fields = msgspec.json.decode(data)
        machine.folder.records = {
            "gen-good": data,
            "gen-cut": data[:-7],
            "gen-deep": b'{"a": ' + b"[" * 100_000,
            "gen-list": b"[]",
            "gen-old": msgspec.json.encode(fields | {"suspended_unix_s": 0.0}),
            "gen-new": msgspec.json.encode(fields | {"format": 2}),
            "gen-lost": msgspec.json.encode(fields | {"page_digest": "AAAAAAAAAAAAAAAAAAAAAA=="}),
        }
        with caplog.at_level(logging.INFO):
            machine.start()
        lines = [record.getMessage() for record in caplog.records]
        names = sorted(line.split("generation ")[1].split(" ")[0] for line in lines)
        assert names == ["gen-cut", "gen-deep", "gen-list", "gen-lost", "gen-new", "gen-old"]
        await machine.settle()
        assert list(machine.folder.records) == ["gen-good"]
        request = ask("r", LONG, max_tokens=40)
        good = structs.replace(delta, resume_id="gen-good")
        assert_answers(await resumed(machine, good), request)


async def test_the_page_that_an_answer_comes_back_on_makes_no_room_for_itself() -> None:
    """It has a file, so its frame may be taken for others: but not for the slot that it needs."""
    request = ask("r", LONG, max_tokens=20, is_resumable=True)
    async with busy(num_slots=2, max_batch_size=2, num_frames=1) as machine:
        stream = machine.core.submit(request)
        await step(machine, 4)
        [delta] = await suspended(machine, [stream])
        await machine.restart()
        others = [ask(f"r{i}", (i, *LONG[:9]), max_tokens=3) for i in range(2)]
        streams = [machine.core.submit(other) for other in others]
        assert_answers(await resumed(machine, delta), request)
        for other, stream in zip(others, streams, strict=True):
            assert_answers(await read_all(stream), other)
        await machine.check_is_sound()
