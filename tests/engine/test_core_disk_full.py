"""EngineCore over a folder that cannot be written to, and then can."""

from __future__ import annotations

import pytest

from engine.state.page import WriteFile, WriteRecord
from tests.engine.machine import Machine, assert_answers
from tests.engine.replica import ask
from tests.engine.test_core_disk import LONG, check_goes_on, keep


async def test_a_disk_that_is_full_costs_only_what_it_was_to_keep() -> None:
    async with Machine(num_frames=12, num_slots=5) as machine:
        machine.disk.fails = (WriteFile, WriteRecord)
        for i in range(20):
            request = ask(f"r{i}", (i, *LONG))
            assert_answers(await machine.answer(request), request)
        state = await keep(machine)
        await check_goes_on(machine, state)
        await machine.check_is_sound()
        assert machine.folder.files == {}
        machine.disk.fails = ()
        other = await keep(machine, (1, *LONG))
        await machine.restart()
        assert other.state_id in [one.state_id for one in machine.core.states.list("")]


@pytest.mark.parametrize("kind", [WriteFile, WriteRecord])
async def test_states_go_to_a_disk_that_has_room_again_though_nothing_else_is_written(
    monkeypatch: pytest.MonkeyPatch, kind: type[WriteFile] | type[WriteRecord]
) -> None:
    """So that a crash later on does not take them."""
    monkeypatch.setattr("engine.core.SWEEP_S", 0.01)
    async with Machine() as machine:
        machine.disk.fails = (kind,)
        states = [await keep(machine, (i, *LONG)) for i in range(3)]
        await machine.settle()
        assert machine.folder.records == {}
        machine.disk.fails = ()
        await machine.until(lambda: len(machine.folder.records) == len(states))
        await machine.check_is_sound()
        await machine.kill()
        machine.start()
        for state in states:
            assert machine.core.states.get("", state.state_id).tier == "disk"
