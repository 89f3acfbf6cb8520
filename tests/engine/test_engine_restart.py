"""Trained weights in process after process: a text goes on as if nothing had happened."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest

import engine.engine
from config import ModelTable
from engine.client import merge
from engine.core import EngineCore
from engine.errors import StateNotFound
from engine.executor import Read
from engine.plan import StepPlan
from engine.runner import ModelRunner
from engine.types import EngineRequest, FinishReason, OutputDelta, SamplingParams, StateOptions
from tests.engine.fresh_process import Job, in_fresh_process
from tests.engine.real_engines import (
    SAMPLED,
    Oracle,
    ask,
    opened,
    real_table,
    request,
    save_tuned,
    text_ids,
)
from tests.engine.replica import Recorder

KEPT = StateOptions(label="kept", is_pinned=True)
# Each costs a process, that is seconds: one of a kind always runs, the others by hand.
SLOW = pytest.mark.slow


# Snapshots and states


@pytest.mark.parametrize(
    "model",
    [
        "chat-demo-float32",
        pytest.param("embedded-float64", marks=SLOW),
        pytest.param("embedded-float32", marks=SLOW),
    ],
)
async def test_snapshots_and_kept_states_go_on_in_a_new_process(model: str, tmp_path: Path) -> None:
    table = real_table(model, tmp_path, state_dir=tmp_path / "states")
    oracle, prompt = Oracle(table), text_ids(model, 60)
    async with opened(table) as core:
        first = await ask(core, prompt, SAMPLED, keep_state=KEPT)
        assert first.state is not None
    text = [*prompt, *first.token_ids]
    more = text_ids(model, 15, start=7)[1:]
    asked = [
        request(prompt, SAMPLED),
        request(text + more, SAMPLED),
        request([], SAMPLED, state_id=first.state.state_id),
        request(more, SAMPLED, state_id=first.state.state_id, keep_state=KEPT),
    ]
    job = Job(model=model, folder=str(tmp_path), state_dir=str(tmp_path / "states"), requests=asked)
    outcome = await in_fresh_process(job)
    same, longer, next_, next_more = outcome.answers
    assert [state.state_id for state in outcome.states][-1] == first.state.state_id
    assert outcome.states[-1].label == KEPT.label
    assert outcome.states[0].parent_id == first.state.state_id
    assert same.num_cached_tokens == len(prompt)  # and so, not even a step
    assert longer.num_cached_tokens >= len(text) // 16 * 16 - 16
    assert (same.token_ids, same.text) == (first.token_ids, first.text)
    for answer, fed in (
        (first, prompt), (same, prompt), (longer, text + more), (next_, text),
        (next_more, text + more),
    ):  # fmt: skip
        oracle.check(answer, fed, SAMPLED)


@pytest.mark.parametrize(
    ("model", "has_answer"),
    [
        ("embedded-float64", True),
        pytest.param("embedded-float64", False, marks=SLOW),
        pytest.param("chat-demo-float32", False, marks=SLOW),
        pytest.param("embedded-float32", True, marks=SLOW),
    ],
)
async def test_an_exported_state_goes_on_in_a_fresh_process(
    model: str, has_answer: bool, tmp_path: Path
) -> None:
    table = real_table(model, tmp_path)
    oracle, prompt = Oracle(table), text_ids(model, 45)
    params = replace(SAMPLED, max_tokens=9 if has_answer else 0)
    async with opened(table) as core:
        first = await ask(core, prompt, params, keep_state=KEPT)
        assert first.state is not None
        text, more = [*prompt, *first.token_ids], text_ids(model, 30, start=3)[1:]
        data = await core.states.export_file("me", first.state.state_id)
        here = await ask(core, more, SAMPLED, state_id=first.state.state_id)
    job = Job(
        model=model,
        folder=str(tmp_path),
        imported=data,
        requests=[request(more, SAMPLED, state_id=""), request([], SAMPLED, state_id="")],
    )
    outcome = await in_fresh_process(job)
    assert outcome.imported is not None
    assert outcome.imported.num_tokens == len(text)
    there, at_once = outcome.answers
    assert (there.token_ids, there.logprobs) == (here.token_ids, here.logprobs)
    assert there.num_state_tokens == len(text)
    oracle.check(there, text + more, SAMPLED)
    oracle.check(at_once, text, SAMPLED)


# Suspended generations

STOPS = ("abb", "€a")
ALPHABET = [byte + 1 for byte in "€ab".encode()]  # ids of the single bytes


class SteppedRunner(ModelRunner):
    """Runs as many steps as there are permits, so that a test knows when it stops."""

    permits: threading.Semaphore | None = None

    def issue(self, plan: StepPlan) -> Read:
        if self.permits is not None:
            self.permits.acquire()
        return super().issue(plan)


@asynccontextmanager
async def stepped(table: ModelTable, num_steps: int) -> AsyncIterator[tuple[EngineCore, Recorder]]:
    """An engine that has to be told to go on after so many steps, with `suspend`."""
    recorder = Recorder()
    async with opened(table, recorder) as core:
        runner = core._pipeline._runner
        assert isinstance(runner, SteppedRunner)
        runner.permits = threading.Semaphore(num_steps)
        yield core, recorder
        runner.permits.release(10_000)


async def suspend(core: EngineCore, recorder: Recorder, num_steps: int) -> None:
    """Stop gracefully when so many steps have been committed."""
    runner = core._pipeline._runner
    assert isinstance(runner, SteppedRunner)
    assert runner.permits is not None
    while len(recorder.steps) < num_steps:  # noqa: ASYNC110
        await asyncio.sleep(0.002)
    draining = asyncio.ensure_future(core.drain(30.0, suspends=True))
    await asyncio.sleep(0.01)
    runner.permits.release(10_000)
    assert await draining


def byte_params(number: int) -> SamplingParams:
    """Text of the bytes of the euro sign, a and b, in any order: unfinished characters, bytes
    that are none, and beginnings of a stop string everywhere."""
    return replace(
        SAMPLED,
        temperature=50.0,  # the model expects hardly any of them
        top_p=1.0,
        seed=number,
        max_tokens=60,
        stop=STOPS if number % 4 else (),
        banned_token_ids=tuple(set(range(2048)) - set(ALPHABET)),
    )


def pending_of(core: EngineCore, tokens: tuple[int, ...]) -> tuple[bool, bool]:
    """Whether a text of these tokens ends in part of a character; in part of a stop string."""
    data = b"".join(map(core.tokenizer.token_bytes, tokens))
    beginnings = [stop.encode()[:n] for stop in STOPS for n in range(1, len(stop.encode()))]
    return data.endswith(("€".encode()[:1], "€".encode()[:2])), data.endswith(tuple(beginnings))


@pytest.mark.parametrize(
    "model", ["embedded-float64", pytest.param("embedded-float32", marks=SLOW)]
)
async def test_suspended_generations_go_on_in_a_new_process_in_the_middle_of_whatever_it_was(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Penalties, bytes of characters, stop strings begun; running, swapped out, waiting."""
    monkeypatch.setattr(engine.engine, "ModelRunner", SteppedRunner)
    keys = dict(max_batch_size=4, time_slice_tokens=3)
    table = real_table(model, tmp_path, state_dir=tmp_path / "states", **keys)
    oracle, num_steps = Oracle(table), 40
    oracle.tolerance *= 3  # on bytes it never saw, logits go to 40, where a float32 ulp is 4e-6
    prompts = [text_ids(model, 6 + 5 * number) for number in range(18)]
    several = [byte_params(number) for number in range(18)]
    async with stepped(table, num_steps) as (core, recorder):
        streams = [
            core.submit(
                request(prompt, several[i], is_resumable=True, priority=0 if i < 16 else -1)
            )
            for i, prompt in enumerate(prompts)
        ]
        await suspend(core, recorder, num_steps)
        before = [await stream.collect() for stream in streams]
    suspended = [i for i, delta in enumerate(before) if delta.resume_id is not None]
    assert len(suspended) >= 10
    halves = [pending_of(core, before[i].token_ids) for i in suspended]
    assert {(True, True), (False, True), (False, False)} <= set(halves)
    assert any(before[i].num_output_tokens == 0 for i in suspended)  # had not begun
    ids = [before[i].resume_id or "" for i in suspended]
    job = Job(model=model, folder=str(tmp_path), state_dir=str(tmp_path / "states"), resume_ids=ids)
    outcome = await in_fresh_process(job)
    whole = dict(enumerate(before))
    for i, after in zip(suspended, outcome.resumed, strict=True):
        assert before[i].finish_reason is FinishReason.SUSPENDED
        assert after.num_prompt_tokens == len(prompts[i])
        whole[i] = merge(before[i], after)
    for i, answer in whole.items():
        oracle.check(answer, prompts[i], several[i])
    stopped = [answer.matched_stop for answer in outcome.resumed]
    assert set(STOPS) <= set(stopped)


async def go_on(core: EngineCore, before: OutputDelta, request_id: str) -> OutputDelta:
    assert before.finish_reason is FinishReason.SUSPENDED
    assert before.resume_id is not None
    return merge(before, await core.resume(before.resume_id, "me", request_id).collect())


async def test_a_generation_that_is_suspended_twice_goes_on_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine.engine, "ModelRunner", SteppedRunner)
    table = real_table("embedded-float64", tmp_path, state_dir=tmp_path / "states")
    oracle, prompt = Oracle(table), text_ids("embedded", 40)
    params = replace(SAMPLED, max_tokens=40)
    async with stepped(table, 8) as (core, recorder):
        stream = core.submit(request(prompt, params, is_resumable=True))
        await suspend(core, recorder, 8)
        first = await stream.collect()
    async with stepped(table, 9) as (core, recorder):
        assert first.resume_id is not None
        stream = core.resume(first.resume_id, "me", "again")
        with pytest.raises(StateNotFound):
            core.resume(first.resume_id, "me", "twice")
        await suspend(core, recorder, 9)
        second = merge(first, await stream.collect())
    assert 0 < first.num_output_tokens < second.num_output_tokens < 40
    async with opened(table) as core:
        core._pipeline._runner.permits = None  # type: ignore[attr-defined]
        whole = await go_on(core, second, "at last")
    oracle.check(whole, prompt, params)


@pytest.mark.parametrize("begins_from", ["zeros", "state", "tuned"])
async def test_a_resumed_generation_goes_on_from_its_state_and_leaves_the_state_it_promised(
    begins_from: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine.engine, "ModelRunner", SteppedRunner)
    oracle = Oracle(real_table("embedded-float64", tmp_path))
    wkv = save_tuned(tmp_path / "poet.pth", oracle, 9)
    table = real_table(
        "embedded-float64", tmp_path,
        state_dir=tmp_path / "states", initial_states=(tmp_path / "poet.pth",),
    )  # fmt: skip
    prompt, params = text_ids("embedded", 40), replace(SAMPLED, max_tokens=30)
    text, begin = list[int](), {"initial_state": "poet"} if begins_from == "tuned" else {}
    if begins_from == "state":
        async with opened(table) as core:
            earlier = await ask(core, text_ids("embedded", 21), SAMPLED, keep_state=KEPT)
            assert earlier.state is not None
            text = [*text_ids("embedded", 21), *earlier.token_ids]
            begin = {"state_id": earlier.state.state_id}
            prompt = prompt[1:]
    job: EngineRequest = request(prompt, params, is_resumable=True, keep_state=KEPT, **begin)
    async with stepped(table, 10) as (core, recorder):
        stream = core.submit(job)
        await suspend(core, recorder, 10)
        before = await stream.collect()
    assert 0 < before.num_output_tokens < 30
    async with opened(table) as core:
        whole = await go_on(core, before, "again")
        assert whole.state is not None
        later = await ask(core, [7], SAMPLED, state_id=whole.state.state_id)
    start = wkv if begins_from == "tuned" else None
    oracle.check(whole, text + prompt, params, start)
    text += [*prompt, *whole.token_ids]
    assert whole.state.num_tokens == len(text)
    oracle.check(later, [*text, 7], SAMPLED, start)
