"""EngineCore over a folder: what a stop saves, what a kill leaves, what another replica finds."""

from __future__ import annotations

import asyncio
import threading

import pytest

from engine.errors import StateNotFound
from engine.state.page import (
    DeleteFile,
    DeleteRecord,
    PageFile,
    ReadFile,
    WriteFile,
    WriteRecord,
)
from engine.types import FinishReason, StateInfo, StateOptions
from tests.engine.machine import Machine, assert_answers, text_state
from tests.engine.replica import ask, limits, read_all, turn
from tests.hash_disk import HashFolder

KEEP = StateOptions()
LONG = tuple(range(100, 141))
MORE = (7, 8, 9)


async def keep(machine: Machine, prompt: tuple[int, ...] = LONG, owner: str = "") -> StateInfo:
    name = f"keep {len(machine.stats.requests)}"
    delta = await machine.answer(ask(name, prompt, max_tokens=0, keep_state=KEEP, owner=owner))
    assert delta.state is not None, delta.error
    return delta.state


async def check_goes_on(machine: Machine, state: StateInfo, owner: str = "") -> None:
    request = ask("further", MORE, state_id=state.state_id, owner=owner)
    assert_answers(await machine.answer(request), request, text_state(LONG))


@pytest.mark.parametrize("is_eager", [True, False])
async def test_after_a_restart_the_same_prompt_is_not_computed_again(is_eager: bool) -> None:
    async with Machine(is_eager=is_eager) as machine:
        first = ask("first", LONG)
        assert_answers(await machine.answer(first), first)
        await machine.restart()
        for seed in range(3):
            again = ask("again", LONG, seed=seed)
            delta = await machine.answer(again)
            assert_answers(delta, again)
            assert delta.num_cached_tokens == len(LONG)
        assert machine.num_prefill_tokens == 0
        longer = ask("longer", (*LONG, 1, 2, 3, 4, 5))
        delta = await machine.answer(longer)
        assert_answers(delta, longer)
        assert delta.num_cached_tokens == 40
        await machine.check_is_sound()


async def test_after_a_restart_the_states_are_there_and_go_on() -> None:
    async with Machine() as machine:
        states = [await keep(machine, owner="ann"), await keep(machine, owner="bob")]
        fork = machine.core.states.fork("ann", states[0].state_id, StateOptions(label="fork"))
        await machine.restart()
        assert [one.state_id for one in machine.core.states.list("bob")] == [states[1].state_id]
        assert {one.state_id for one in machine.core.states.list("ann")} == {
            states[0].state_id,
            fork.state_id,
        }
        await check_goes_on(machine, states[0], "ann")
        machine.core.states.delete("ann", states[0].state_id)
        await machine.restart()
        with pytest.raises(StateNotFound):
            machine.core.states.get("ann", states[0].state_id)
        await check_goes_on(machine, fork, "ann")
        await check_goes_on(machine, states[1], "bob")
        await machine.check_is_sound()


async def test_states_without_the_prefix_cache_survive_a_restart() -> None:
    async with Machine(seed=None) as machine:
        state = await keep(machine)
        await machine.restart()
        await check_goes_on(machine, state)
        await machine.check_is_sound()


async def test_a_kill_leaves_what_was_written_and_nothing_broken() -> None:
    for num_jobs in range(8):
        async with Machine(is_eager=False) as machine:
            stream = machine.core.submit(ask("r", LONG, keep_state=KEEP))
            num_done = 0
            while machine.core._responses or machine.runner.plans:
                await turn()
                if machine.runner.plans:
                    machine.runner.deliver()
            await turn()
            while machine.disk.jobs and num_done < num_jobs:
                machine.disk.finish()
                num_done += 1
                await turn()
            delta = await read_all(stream)
            assert delta.state is not None
            has_record = delta.state.state_id in machine.folder.records
            await machine.kill()
            machine.start()
            listed = [one.state_id for one in machine.core.states.list("")]
            assert listed == ([delta.state.state_id] if has_record else [])
            if has_record:
                ids = LONG + delta.token_ids
                request = ask("further", MORE, state_id=listed[0])
                assert_answers(await machine.answer(request), request, text_state(ids))
            again = ask("again", LONG)
            assert_answers(await machine.answer(again), again)
            await machine.check_is_sound()
    assert has_record, "the record was never written"


async def test_a_kill_in_the_middle_of_answers_breaks_nothing() -> None:
    folder = HashFolder()
    live = limits(time_slice_tokens=2)
    async with Machine(live, folder=folder, num_slots=3, is_eager=False) as machine:
        for round_number in range(6):
            requests = [
                ask(f"r{i}", (*LONG[: 4 * i], round_number % 2), max_tokens=12, is_resumable=True)
                for i in range(8)
            ]
            for request in requests:
                machine.core.submit(request)
            for _ in range(5 * round_number):
                await turn()
                if machine.runner.plans:
                    machine.runner.deliver()
                elif machine.disk.jobs:
                    machine.disk.finish()
            if round_number % 2:
                machine.core._persistence.begin_suspending()
            await machine.kill()
            machine.start()
            for request in requests:
                assert_answers(await machine.answer(request), request)
            await machine.check_is_sound()


async def test_a_file_that_breaks_is_computed_anew() -> None:
    async with Machine() as machine:
        request = ask("r", LONG)
        await machine.answer(request)
        await machine.restart()
        machine.folder.broken |= set(machine.folder.files)
        delta = await machine.answer(request)
        assert_answers(delta, request)
        assert delta.num_cached_tokens == 0
        await machine.check_is_sound()
        await machine.restart()
        delta = await machine.answer(request)
        assert (delta.num_cached_tokens, machine.num_prefill_tokens) == (len(LONG), 0)


async def test_a_state_whose_file_breaks_is_an_error_and_then_gone() -> None:
    async with Machine() as machine:
        state = await keep(machine)
        await machine.restart()
        machine.folder.broken |= set(machine.folder.files)
        delta = await machine.answer(ask("r", MORE, state_id=state.state_id))
        assert delta.finish_reason is FinishReason.ERROR
        assert delta.error == "the state it was to go on from is lost"
        with pytest.raises(StateNotFound):
            machine.core.submit(ask("again", MORE, state_id=state.state_id))
        await machine.answer(ask("any"))  # jobs are handed out with the next step
        await machine.check_is_sound()
        assert machine.folder.records == {}


async def test_a_close_does_not_wait_for_a_disk_that_hangs(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("engine.persistence.SAVE_TIMEOUT_S", 0.05)
    machine = Machine(is_eager=False)
    machine.start()
    stream = machine.core.submit(ask("r", LONG))
    await turn()
    while machine.core._responses:
        machine.runner.deliver()
        await turn()
    assert_answers(await read_all(stream), ask("r", LONG))
    closing = asyncio.create_task(machine.core.close())
    async with asyncio.timeout(5):
        while not closing.done():
            if machine.runner.plans and not machine.runner.is_closed:
                machine.runner.deliver()
            await asyncio.sleep(0.001)
    assert "not every state could be saved in" in caplog.text


async def test_a_close_does_not_wait_for_a_device_that_dies_meanwhile() -> None:
    machine = Machine(is_eager=False)
    machine.start()
    stream = machine.core.submit(ask("r", LONG))
    await turn()
    while machine.core._responses:
        machine.runner.deliver()
        await turn()
    await read_all(stream)
    await turn()
    closing = asyncio.create_task(machine.core.close())
    await turn()
    machine.runner.deliver_failure(is_fatal=True)
    async with asyncio.timeout(2):
        await closing


async def test_waiting_requests_with_states_move_to_a_replica_that_finds_them() -> None:
    folder = HashFolder()
    old = Machine(folder=folder, is_eager=False, num_slots=1, max_batch_size=1)
    new = Machine(folder=folder, is_eager=False)
    async with old, new:
        state = await keep(old)
        await old.settle()
        runs = ask("runs", LONG)
        running = old.core.submit(runs)
        await turn()
        request = ask("moves", MORE, state_id=state.state_id)
        unknown = ask("unknown", MORE, state_id=(await lost_state(old)).state_id)
        streams = [old.core.submit(request), old.core.submit(unknown)]
        old.core.states.delete("", unknown.state_id or "")
        taken = old.core.take_waiting()
        assert [one for one, _ in taken] == [request, unknown]
        new.core.rescan()
        await rescanned(new)
        for one, stream in taken:
            new.core.adopt(one, stream)
        await new.settle()
        await old.settle()
        assert_answers(await read_all(running), runs)
        assert_answers(await read_all(streams[0]), request, text_state(LONG))
        delta = await read_all(streams[1])
        assert delta.finish_reason is FinishReason.ERROR
        assert delta.error is not None
        assert "there is no state" in delta.error
        await old.check_is_sound()
        await new.check_is_sound()


async def lost_state(machine: Machine) -> StateInfo:
    """A state whose record comes to no disk, since its jobs are not done."""
    [state] = machine.core.states.list("")
    return machine.core.states.fork("", state.state_id, KEEP)


async def rescanned(machine: Machine) -> None:
    await machine.until(lambda: machine.core._persistence._rescan is None)


async def test_a_rescan_finds_states_pages_and_suspended_answers_of_another_replica() -> None:
    folder = HashFolder()
    async with Machine(folder=folder) as new:
        async with Machine(folder=folder) as old:
            state = await keep(old)
            request = ask("r", LONG, max_tokens=60, is_resumable=True)
            stream = old.core.submit(request)
            await asyncio.sleep(0)
            await old.suspend()
            before = await read_all(stream)
            assert before.resume_id is not None
        new.core.rescan()
        new.core.rescan()
        await rescanned(new)
        await check_goes_on(new, state)
        after = await new.while_settling(read_all(new.core.resume(before.resume_id, "", "r")))
        whole = ask("whole", LONG, max_tokens=60)
        assert (*before.token_ids, *after.token_ids) == (await new.answer(whole)).token_ids
        await new.check_is_sound()


async def test_what_is_deleted_during_a_rescan_does_not_come_back() -> None:
    async with Machine() as machine:
        state = await keep(machine)
        request = ask("r", LONG, max_tokens=60, is_resumable=True)
        stream = machine.core.submit(request)
        await machine.suspend()
        before = await read_all(stream)
        assert before.resume_id is not None
        await machine.restart()
        gate, scan = threading.Event(), machine.disk.scan_records

        def slow_scan() -> dict[str, bytes]:
            found = scan()
            assert gate.wait(5)
            return found

        machine.disk.scan_records = slow_scan  # type: ignore[method-assign]
        machine.core.rescan()
        await asyncio.sleep(0.02)
        machine.core.states.delete("", state.state_id)
        resumed = machine.core.resume(before.resume_id, "", "r")
        await machine.settle()
        gate.set()
        await rescanned(machine)
        assert machine.core.states.list("") == []
        with pytest.raises(StateNotFound):
            machine.core.resume(before.resume_id, "", "twice")
        await machine.while_settling(read_all(resumed))
        await machine.check_is_sound()
        assert machine.core._persistence._deleted == set()


async def test_a_rescan_that_fails_is_told_and_harms_nobody(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with Machine() as machine:

        def no_folder() -> list[PageFile]:
            raise FileNotFoundError("no such folder")

        machine.disk.scan_pages = no_folder  # type: ignore[method-assign]
        machine.core.rescan()
        await rescanned(machine)
        assert "no such folder" in caplog.text
        await machine.answer(ask())


async def test_a_record_never_comes_before_its_page_nor_after_its_deletion() -> None:
    async with Machine(is_eager=False) as machine:
        state = await keep(machine)
        machine.core.states.update("", state.state_id, label="x")
        await machine.settle()
        machine.core.states.delete("", state.state_id)
        await machine.settle()
        done = [job for job in machine.disk.done if not isinstance(job, ReadFile)]
        page = machine.disk.done.index(next(job for job in done if isinstance(job, WriteRecord)))
        digests = [
            job.file.digest for job in machine.disk.done[:page] if isinstance(job, WriteFile)
        ]
        [deleted] = [job for job in done if isinstance(job, DeleteFile)]
        assert deleted.digest in digests
        names = [job for job in done if isinstance(job, WriteRecord | DeleteRecord)]
        assert isinstance(names[-1], DeleteRecord)
        assert machine.folder.records == {}
        assert deleted.digest not in machine.folder.files


async def test_expired_states_are_swept_though_nobody_asks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("engine.core.SWEEP_S", 0.01)
    async with Machine() as machine:
        request = ask("r", LONG, max_tokens=0, keep_state=StateOptions(ttl_s=0.03))
        assert (await machine.answer(request)).state is not None
        await machine.settle()
        assert len(machine.folder.records) == 1
        await asyncio.sleep(0.1)
        await machine.settle()
        assert machine.folder.records == {}
        await machine.check_is_sound()


async def test_states_beyond_slots_and_frames_come_back_from_the_disk() -> None:
    async with Machine(num_slots=3, num_frames=6, num_files=60) as machine:
        states = {}
        for i in range(40):
            state = await keep(machine, (i, *LONG))
            await machine.settle()
            states[i] = state
        assert machine.core.snapshot().cache.num_disk_pages >= 40
        for i in (39, 0, 17, 5, 5, 38, 1):
            request = ask("further", MORE, state_id=states[i].state_id)
            delta = await machine.answer(request)
            assert_answers(delta, request, text_state((i, *LONG)))
        assert machine.core.snapshot().cache.num_disk_reads > 3
        await machine.check_is_sound()
