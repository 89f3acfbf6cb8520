"""Users of all kinds at once on trained weights, in too few slots: nobody notices the others."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

import engine.engine
from engine.core import EngineCore
from engine.errors import StateNotFound, StatesFull
from engine.types import StateOptions
from tests.engine.real_engines import Oracle, mixed_params, opened, real_table, request, text_ids
from tests.engine.test_engine_pages import PoisoningRunner

KEPT = StateOptions(label="kept")


class Users:
    """Requests of all kinds in random order, and what every one of them must be answered."""

    def __init__(self, core: EngineCore, oracle: Oracle, model: str, seed: int) -> None:
        self.core, self.oracle, self.model = core, oracle, model
        self.rng = random.Random(seed)
        self.texts: dict[str, list[int]] = {}  # by state id
        self.stems = [text_ids(model, 90, start=start) for start in (0, 0, 11)]
        self.tasks: set[asyncio.Task[None]] = set()
        self.num_checked = self.num_refused = self.num_aborted = 0

    async def run(self, num_operations: int) -> None:
        ways: list[Callable[[], None]] = [
            self.ask, self.ask, self.ask, self.go_on, self.go_on, self.fork, self.delete,
        ]  # fmt: skip
        for _ in range(num_operations):
            self.rng.choice(ways)()
            self.core._scheduler.check()
            if len(self.tasks) > 10:
                await asyncio.wait(self.tasks, return_when=asyncio.FIRST_COMPLETED)
            await asyncio.sleep(self.rng.random() * 0.004)
        await asyncio.gather(*self.tasks)
        self.core._scheduler.check()

    def ask(self) -> None:
        stem = self.rng.choice(self.stems)[: self.rng.choice([1, 20, 32, 50, 90])]
        if self.rng.random() < 0.5:
            stem = stem + text_ids(self.model, self.rng.randint(2, 20), self.rng.randint(0, 50))[1:]
        self.start(stem, stem)

    def go_on(self) -> None:
        if not self.texts:
            return self.ask()
        state_id = self.rng.choice(list(self.texts))
        more = text_ids(self.model, self.rng.randint(1, 12), self.rng.randint(0, 50))[1:]
        return self.start(more, self.texts[state_id] + more, state_id)

    def fork(self) -> None:
        if self.texts:
            state_id = self.rng.choice(list(self.texts))
            info = self.core.states.fork("me", state_id, KEPT)
            self.texts[info.state_id] = self.texts[state_id]

    def delete(self) -> None:
        if len(self.texts) > 4:
            state_id = self.rng.choice(list(self.texts))
            self.core.states.delete("me", state_id)
            del self.texts[state_id]

    def start(self, prompt: list[int], text: list[int], state_id: str | None = None) -> None:
        task = asyncio.ensure_future(self.serve(prompt, text, state_id))
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    async def serve(self, prompt: list[int], text: list[int], state_id: str | None) -> None:
        params = replace(mixed_params(self.rng.randrange(100)), max_tokens=self.rng.randint(1, 8))
        keep = KEPT if self.rng.random() < 0.3 and len(self.texts) < 6 else None
        is_aborted = self.rng.random() < 0.15
        job = request(
            prompt, params, state_id=state_id, keep_state=keep, priority=self.rng.randint(0, 1)
        )
        try:
            stream = self.core.submit(job)
        except (StateNotFound, StatesFull):  # deleted, or more than there is room for
            self.num_refused += 1
            return
        if is_aborted:
            await asyncio.sleep(self.rng.random() * 0.01)
            stream.close()
            self.num_aborted += 1
            return
        answer = await stream.collect()
        self.oracle.check(answer, text, params)
        self.num_checked += 1
        if answer.state is not None:
            self.texts[answer.state.state_id] = text + list(answer.token_ids)


@pytest.mark.parametrize(
    "model", ["embedded-float32", pytest.param("reverse-float64", marks=pytest.mark.slow)]
)
async def test_pool_accounting_and_answers_hold_after_random_operations(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Few slots and frames, time slices, no disk; whatever is free holds NaN all the while."""
    monkeypatch.setattr(engine.engine, "ModelRunner", PoisoningRunner)
    table = real_table(
        model, tmp_path, max_batch_size=3, num_state_slots=6, time_slice_tokens=4,
        host_state_mib=4 if model.startswith("embedded") else 1,
    )  # fmt: skip
    oracle = Oracle(table)
    async with opened(table) as core:
        runner, tiers = core._pipeline._runner, core._scheduler.cache.tiers
        assert isinstance(runner, PoisoningRunner)
        runner.slots, runner.frames = tiers.slots, tiers.frames
        users = Users(core, oracle, model, seed=1)
        await users.run(300)
        for state in core.states.list("me"):
            core.states.delete("me", state.state_id)
        stats = core.snapshot()
    assert stats.num_running == stats.num_waiting == 0
    assert users.num_checked > 150
    assert users.num_aborted > 10
    assert stats.cache.num_preemptions > 5
    assert stats.cache.num_evictions > 0
    assert runner.num_poisoned_slots > 20
    assert runner.num_poisoned_frames > 50
