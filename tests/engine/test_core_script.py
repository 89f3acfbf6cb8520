"""EngineCore as a whole: whatever happens around it, an answer is what it is alone.

States are kept, forked, moved and deleted, answers suspended and resumed, the process stopped and
killed, disk and device slow or failing, in every order.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import ParamSpec, TypeVar
from unittest.mock import patch

import pytest
from hypothesis import event, given, settings

from tests.engine.engine_script import Operation, scripts, setups
from tests.engine.guests import Guests, Setup

P = ParamSpec("P")
T = TypeVar("T")


async def on_the_loop(work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Instead of a thread, so that the same script always gives the same run."""
    await asyncio.sleep(0)
    return work(*args, **kwargs)


async def play(setup: Setup, script: list[Operation]) -> Guests:
    guests = Guests(setup)
    guests.machine.start()
    try:
        for operation in script:
            await operation(guests)
            core = guests.machine.core
            assert not core.snapshot().is_dead, core._death
            core._scheduler.check()
        await guests.finish()
    finally:
        await guests.machine.kill()
    return guests


def run(setup: Setup, script: list[Operation]) -> Guests:
    with patch("asyncio.to_thread", on_the_loop), patch("engine.persistence.SAVE_TIMEOUT_S", 0.1):
        return asyncio.run(play(setup, script))


@settings(max_examples=200)
@given(setup=setups(), script=scripts())
def test_every_answer_equals_its_run_alone(setup: Setup, script: list[Operation]) -> None:
    run(setup, script)


@pytest.mark.slow
@pytest.mark.timeout(7200)
@settings(max_examples=10_000)
@given(setup=setups(), script=scripts(max_size=60))
def test_every_answer_equals_its_run_alone_deep(setup: Setup, script: list[Operation]) -> None:
    guests = run(setup, script)
    event(f"answers: {min(guests.num_answers // 10, 5)}0")
