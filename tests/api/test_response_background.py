"""Responses with background = true: begun by one request, found by others, ended by any."""

from __future__ import annotations

from pathlib import Path

import pytest

from api.response_encode import ResponseEncoder
from tests.api.harness import Running, eventually, running
from tests.api.test_responses import PATH, ask, well


async def begin(server: Running, **fields: object) -> str:
    response = well(await ask(server, background=True, **fields))
    assert (response.status, response.background) == ("in_progress", True)
    assert response.output == []
    return response.id


async def status_of(server: Running, response_id: str) -> str | None:
    return well(await server.get(f"{PATH}/{response_id}")).status


async def test_it_is_computed_after_its_client_has_gone(tmp_path: Path):
    async with running(tmp_path) as server:
        foreground = well(await ask(server))
        server.runner.gate.clear()
        response_id = await begin(server)
        assert await status_of(server, response_id) == "in_progress"
        items = await server.get(f"{PATH}/{response_id}/input_items")
        assert items.json()["data"][0]["content"][0]["text"] == "hi"
        server.runner.gate.set()
        await eventually(lambda: server.snapshot().num_running == 0)
        response = well(await server.get(f"{PATH}/{response_id}"))
        await ask(server, previous_response_id=response_id)
        assert server.engine.requests[-1].state_id is not None
    assert response.output_text == foreground.output_text
    assert (response.status, response.background) == ("incomplete", True)
    assert response.usage == foreground.usage


async def test_cancel_frees_the_slot_and_may_be_repeated(tmp_path: Path):
    async with running(tmp_path, delay_s=0.01) as server:
        response_id = await begin(server, max_output_tokens=1000)
        await eventually(lambda: server.snapshot().num_running == 1)
        cancelled = well(await server.post(f"{PATH}/{response_id}/cancel", {}))
        assert server.snapshot().num_running == 0
        again = well(await server.post(f"{PATH}/{response_id}/cancel", {}))
        assert await status_of(server, response_id) == "cancelled"
        refused = await ask(server, previous_response_id=response_id)
        assert server.states.kept == {}
    assert cancelled == again
    assert cancelled.status == "cancelled"
    assert (refused.status, refused.error["param"]) == (400, "previous_response_id")


async def test_cancelling_what_has_ended_changes_nothing(tmp_path: Path):
    async with running(tmp_path) as server:
        response_id = await begin(server)
        await eventually(lambda: server.snapshot().num_running == 0)
        before = await server.get(f"{PATH}/{response_id}")
        after = await server.post(f"{PATH}/{response_id}/cancel", {})
    assert after.body == before.body


async def test_delete_ends_it(tmp_path: Path):
    async with running(tmp_path, delay_s=0.01) as server:
        response_id = await begin(server, max_output_tokens=1000)
        reply = await server.request("DELETE", f"{PATH}/{response_id}")
        assert server.snapshot().num_running == 0
        missing = await server.get(f"{PATH}/{response_id}")
    assert (reply.status, missing.status) == (200, 404)


async def test_failure_is_found_in_it(tmp_path: Path):
    async with running(tmp_path) as server:
        server.runner.fail_next = "out of luck"
        response_id = await begin(server)
        await eventually(lambda: server.snapshot().num_running == 0)
        response = well(await server.get(f"{PATH}/{response_id}"))
    assert response.status == "failed"
    assert response.error is not None
    assert response.error.message == "out of luck"


async def test_one_that_cannot_be_stored_as_it_is_has_failed_and_leaves_no_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(ResponseEncoder, "whole", lambda *_: 1 // 0)
    async with running(tmp_path) as server:
        response_id = await begin(server)
        await eventually(lambda: server.service.background.get("", response_id) is None)
        assert await status_of(server, response_id) == "failed"
        assert server.states.kept == {}


async def test_what_a_stop_of_the_server_cuts_off_has_failed(tmp_path: Path):
    async with running(tmp_path, delay_s=0.01) as server:
        response_id = await begin(server, max_output_tokens=1000)
        await eventually(lambda: server.snapshot().num_running == 1)
        server.service.is_draining = True
        await server.engine.drain(0.0)
        await eventually(lambda: server.service.background.get("", response_id) is None)
        response = well(await server.get(f"{PATH}/{response_id}"))
    assert response.status == "failed"
    assert response.error is not None
    assert "shutting down" in response.error.message


async def test_nobody_else_can_see_or_end_it(tmp_path: Path):
    async with running(tmp_path, delay_s=0.01) as server:
        response_id = await begin(server, max_output_tokens=1000)
        await server.service.background.cancel("somebody", response_id)
        assert server.service.background.get("somebody", response_id) is None
        assert await status_of(server, response_id) == "in_progress"
        await server.post(f"{PATH}/{response_id}/cancel", {})
