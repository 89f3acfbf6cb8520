"""StateKeeper: states leave as bytes and come back as they were, whatever happens meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from engine.errors import EngineDead, InvalidRequest, StateMismatch, StateNotFound, StatesFull
from engine.state.page import Page, ReadFile, WriteFile
from engine.types import StateInfo, StateOptions
from tests.engine.machine import Machine, assert_answers, text_state
from tests.engine.replica import ask, read_all, turn

KEEP = StateOptions()
PROMPT = tuple(range(5, 18))
MORE = (300, 301)


async def keep(machine: Machine, prompt: tuple[int, ...] = PROMPT) -> StateInfo:
    name = f"keep {len(machine.stats.requests)}"
    delta = await machine.answer(ask(name, prompt, max_tokens=0, keep_state=KEEP))
    assert delta.state is not None, delta.error
    return delta.state


def page_of(machine: Machine, state: StateInfo) -> Page:
    return machine.core._store.find("", state.state_id).page


async def check_goes_on(machine: Machine, state: StateInfo) -> None:
    request = ask("further", MORE, state_id=state.state_id)
    assert_answers(await machine.answer(request), request, text_state(PROMPT))


async def in_frame_only(machine: Machine, page: Page) -> None:
    machine.core._cache.tiers.demote(page)


async def in_slot_only(machine: Machine, page: Page) -> None:
    machine.core._cache.tiers._leave_frame(page)


async def in_file_only(machine: Machine, page: Page) -> None:
    machine.core._cache.tiers.demote(page)
    machine.core._cache.tiers._leave_frame(page)


@pytest.mark.parametrize("where", [in_frame_only, in_slot_only, in_file_only])
async def test_a_state_is_exported_from_wherever_it_lies(
    where: Callable[[Machine, Page], asyncio.Future[None]],
) -> None:
    async with Machine() as machine:
        state = await keep(machine)
        await machine.settle()
        page = page_of(machine, state)
        assert page.slot
        assert page.frame
        assert page.has_file
        everywhere = await machine.core.states.export_file("", state.state_id)
        await where(machine, page)
        places = (page.slot is not None, page.frame is not None)
        assert places != (True, True)
        data = await machine.while_settling(machine.core.states.export_file("", state.state_id))
        assert data == everywhere
        await machine.check_is_sound()
        await check_goes_on(machine, state)


async def test_a_state_moves_to_another_engine_as_bytes() -> None:
    async with Machine() as one, Machine(with_disk=False, seed=None) as other:
        state = await keep(one)
        data = await one.core.states.export_file("", state.state_id)
        options = StateOptions(label="moved", ttl_s=100)
        found = await other.core.states.import_file("", data, options)
        assert (found.num_tokens, found.label, found.parent_id) == (len(PROMPT), "moved", None)
        assert found.has_logits
        await check_goes_on(other, found)
        nothing_more = ask("none", (), state_id=found.state_id)
        assert_answers(await other.answer(nothing_more), nothing_more, text_state(PROMPT))
        again = await other.core.states.export_file("", found.state_id)
        assert again == data
        await other.check_is_sound()
        await one.check_is_sound()


async def test_the_same_bytes_imported_twice_are_one_page_under_two_ids() -> None:
    async with Machine() as machine:
        data = await machine.core.states.export_file("", (await keep(machine)).state_id)
        both = await asyncio.gather(
            *(machine.core.states.import_file("", data, KEEP) for _ in range(2))
        )
        assert both[0].state_id != both[1].state_id
        first, second = (page_of(machine, state) for state in both)
        assert first is second
        await machine.check_is_sound()
        machine.core.states.delete("", both[0].state_id)
        await check_goes_on(machine, both[1])
        await machine.check_is_sound()


async def test_an_imported_state_survives_a_restart() -> None:
    async with Machine() as machine:
        data = await machine.core.states.export_file("", (await keep(machine)).state_id)
        found = await machine.core.states.import_file("bob", data, StateOptions(label="x"))
        await machine.restart()
        [again] = machine.core.states.list("bob")
        assert (again.state_id, again.label) == (found.state_id, "x")
        request = ask("further", MORE, state_id=found.state_id, owner="bob")
        assert_answers(await machine.answer(request), request, text_state(PROMPT))
        await machine.check_is_sound()


async def test_garbage_is_refused_and_leaves_nothing() -> None:
    async with Machine(num_frames=5) as machine:
        for _ in range(20):
            with pytest.raises(StateMismatch):
                await machine.core.states.import_file("", b"\x00garbage", KEEP)
        await machine.check_is_sound()
        assert machine.core.states.list("") == []
        await check_goes_on(machine, await keep(machine))


async def cancelled(work: asyncio.Task[object]) -> None:
    work.cancel()
    with pytest.raises(asyncio.CancelledError):
        await work


async def inside_codec(machine: Machine) -> None:
    await machine.until(lambda: machine.codec.num_inside > 0)


@pytest.mark.parametrize("data", [b"[1, 2, null]", b"garbage"])
async def test_an_import_given_up_while_the_thread_reads_frees_its_frame_after_it(
    data: bytes,
) -> None:
    async with Machine(num_frames=5) as machine:
        machine.codec.gate.clear()
        work = asyncio.create_task(machine.core.states.import_file("", data, KEEP))
        await inside_codec(machine)
        used = machine.core._cache.tiers.num_frames_used
        assert used == 1
        await cancelled(work)
        assert machine.core._cache.tiers.num_frames_used == used, "the thread still fills it"
        machine.codec.gate.set()
        await machine.settle()
        await turn()
        assert machine.core._cache.tiers.num_frames_used == 0
        assert machine.core.states.list("") == []
        await machine.check_is_sound()


async def test_an_export_given_up_while_the_thread_writes_leaves_nothing_held() -> None:
    async with Machine(num_frames=5) as machine:
        state = await keep(machine)
        machine.codec.gate.clear()
        work = asyncio.create_task(machine.core.states.export_file("", state.state_id))
        await inside_codec(machine)
        await cancelled(work)
        machine.codec.gate.set()
        await machine.check_is_sound()
        await check_goes_on(machine, state)


async def test_a_state_deleted_while_it_is_exported_is_exported_whole() -> None:
    async with Machine(num_frames=5) as machine:
        state = await keep(machine)
        await machine.settle()
        data = await machine.core.states.export_file("", state.state_id)
        machine.codec.gate.clear()
        work = asyncio.create_task(machine.core.states.export_file("", state.state_id))
        await inside_codec(machine)
        machine.core.states.delete("", state.state_id)
        for i in range(6):  # others need the frames
            await machine.answer(ask(f"r{i}", (i, *PROMPT)))
        machine.codec.gate.set()
        assert await work == data
        await machine.check_is_sound()


async def test_exports_and_imports_of_unknown_owners_are_not_found() -> None:
    async with Machine() as machine:
        state = await keep(machine)
        with pytest.raises(StateNotFound):
            await machine.core.states.export_file("bob", state.state_id)
        await machine.check_is_sound()


async def test_imports_beyond_the_capacity_are_refused_before_the_bytes_are_read() -> None:
    async with Machine(num_files=2) as machine:
        await keep(machine)
        machine.codec.gate.clear()
        work = asyncio.create_task(machine.core.states.import_file("", b"[1, 2, null]", KEEP))
        await inside_codec(machine)
        with pytest.raises(StatesFull, match="1 states are kept and 1 on their way, of 2"):
            await machine.core.states.import_file("", b"[1, 3, null]", KEEP)
        with pytest.raises(StatesFull):
            machine.core.submit(ask(keep_state=KEEP))
        machine.codec.gate.set()
        assert (await work).num_tokens == 1
        await machine.check_is_sound()


async def test_without_host_memory_states_neither_come_nor_go() -> None:
    async with Machine(num_frames=0, with_disk=False) as machine:
        for work in (
            machine.core.states.import_file("", b"[1, 2, null]", KEEP),
            machine.core.states.export_file("", "state-x"),
        ):
            with pytest.raises(InvalidRequest, match="host_state_mib"):
                await work


async def test_an_export_that_finds_no_room_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.keeper.COPY_TIMEOUT_S", 0.05)
    async with Machine(num_frames=4) as machine:
        state = await keep(machine)
        await machine.settle()
        page = page_of(machine, state)
        await in_file_only(machine, page)
        tiers = machine.core._cache.tiers
        frames = [tiers.take_frame() for _ in range(4)]
        with pytest.raises(StatesFull, match="host memory"):
            await machine.core.states.export_file("", state.state_id)
        for frame in frames:
            assert frame is not None
            tiers.release_frame(frame)
        await machine.check_is_sound()
        await machine.core.states.export_file("", state.state_id)


async def test_a_state_whose_file_is_broken_is_gone_with_a_clear_error() -> None:
    async with Machine() as machine:
        state = await keep(machine)
        await machine.settle()
        page = page_of(machine, state)
        await in_file_only(machine, page)
        machine.folder.broken.add(page.digest)
        with pytest.raises(StateNotFound, match="is broken"):
            await machine.core.states.export_file("", state.state_id)
        assert machine.core.states.list("") == []
        await machine.check_is_sound()


async def test_exports_while_the_device_dies_end_with_its_error() -> None:
    async with Machine(is_eager=False, with_disk=False) as machine:
        state = await keep(machine)
        await in_slot_only(machine, page_of(machine, state))
        stream = machine.core.submit(ask("victim"))
        work = asyncio.create_task(machine.core.states.export_file("", state.state_id))
        await turn()
        machine.runner.deliver_failure(is_fatal=True)
        async with asyncio.timeout(2):
            with pytest.raises(EngineDead, match="injected failure"):
                await work
            await read_all(stream)
            with pytest.raises(EngineDead):
                await machine.core.states.import_file("", b"[1, 2, null]", KEEP)
        await machine.core.close()
        machine.start()


async def test_an_import_that_outlives_the_engine_is_refused_since_nobody_would_save_it() -> None:
    machine = Machine(num_frames=5)
    machine.start()
    machine.codec.gate.clear()
    work = asyncio.create_task(machine.core.states.import_file("", b"[1, 2, null]", KEEP))
    await inside_codec(machine)
    await machine.core.close()
    machine.codec.gate.set()
    with pytest.raises(EngineDead, match="hash is closed"):
        await work
    assert machine.core._cache.tiers.num_frames_used == 0
    assert machine.core.states.list("") == []


async def test_a_copy_that_fails_on_the_device_is_made_again() -> None:
    async with Machine(is_eager=False, with_disk=False) as machine:
        state = await keep(machine)
        await machine.settle()
        await in_slot_only(machine, page_of(machine, state))
        work = asyncio.create_task(machine.core.states.export_file("", state.state_id))
        await turn()
        machine.runner.deliver_failure()
        data = await machine.while_settling(work)
        assert data.startswith(b"[13, %d," % text_state(PROMPT)[0])
        await machine.check_is_sound()


async def test_many_exports_at_once_wait_for_one_copy() -> None:
    async with Machine(is_eager=False) as machine:
        state = await keep(machine)
        await machine.settle()
        await in_file_only(machine, page_of(machine, state))
        works = [
            asyncio.create_task(machine.core.states.export_file("", state.state_id))
            for _ in range(5)
        ]
        await turn()
        assert [type(job) for job in machine.disk.jobs] == [ReadFile]
        datas = await machine.while_settling(asyncio.gather(*works))
        assert len(set(datas)) == 1
        await machine.check_is_sound()


async def test_records_of_imports_wait_for_the_file() -> None:
    async with Machine(is_eager=False) as machine:
        work = machine.core.states.import_file("", b"[1, 2, null]", KEEP)
        state = await work
        await turn()
        assert [type(job) for job in machine.disk.jobs] == [WriteFile]
        assert machine.folder.records == {}
        await machine.settle()
        assert list(machine.folder.records) == [state.state_id]
