"""Suspended generations go on after a restart to exactly the text they would have had."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import pytest

from engine.client import RequestStream
from engine.errors import Draining, StateNotFound
from engine.types import FinishReason, LiveLimits, OutputDelta, StateOptions
from tests.engine.machine import Machine, assert_answers, join, text_state
from tests.engine.replica import ask, hash_tokenizer, limits, read_all, turn
from tests.hash_model import HashRunner, oracle

KEEP = StateOptions()
LONG = tuple(range(100, 141))
TIGHT = limits(max_batch_tokens=8)


def busy(
    live: LiveLimits | None = None,
    *,
    num_slots: int = 4,
    max_batch_size: int = 4,
    num_frames: int = 24,
) -> Machine:
    return Machine(
        live,
        is_eager=False,
        num_slots=num_slots,
        max_batch_size=max_batch_size,
        num_frames=num_frames,
    )


async def step(machine: Machine, times: int) -> None:
    for _ in range(times):
        await turn()
        if machine.runner.plans:
            machine.runner.deliver()
    await turn()


async def suspended(machine: Machine, streams: Iterable[RequestStream]) -> list[OutputDelta]:
    """Stop gracefully; what the readers have got until then."""
    assert await machine.suspend()
    deltas = [await read_all(stream) for stream in streams]
    await machine.check_is_sound()
    return deltas


async def resumed(machine: Machine, delta: OutputDelta, owner: str = "") -> OutputDelta:
    """All that the reader of a suspended answer sees in the end."""
    if delta.finish_reason is not FinishReason.SUSPENDED:
        return delta
    assert delta.resume_id is not None
    stream = machine.core.resume(delta.resume_id, owner, f"again {delta.resume_id}")
    return join(delta, await machine.while_settling(read_all(stream)))


@pytest.mark.parametrize("num_steps", [*range(12), 20, 26])
async def test_an_answer_suspended_at_any_step_goes_on_to_the_same_text(num_steps: int) -> None:
    """Prefilling up to step 6, drawing up to 26."""
    request = ask("r", LONG, max_tokens=20, is_resumable=True)
    async with busy(TIGHT) as machine:
        stream = machine.core.submit(request)
        await step(machine, num_steps)
        [delta] = await suspended(machine, [stream])
        await machine.restart()
        assert_answers(await resumed(machine, delta), request)
        if num_steps < 20:
            assert delta.finish_reason is FinishReason.SUSPENDED
        await machine.check_is_sound()
        assert machine.folder.records == {}


async def test_waiting_running_and_swapped_answers_all_go_on() -> None:
    live = limits(time_slice_tokens=2)
    async with busy(live, num_slots=2, max_batch_size=2, num_frames=40) as machine:
        requests = [
            ask(f"r{i}", (i, i + 1, i + 2), max_tokens=25, seed=i, is_resumable=True)
            for i in range(9)
        ]
        streams = [machine.core.submit(request) for request in requests[:5]]
        await step(machine, 20)
        assert machine.core.snapshot().cache.num_preemptions > 2
        streams += [machine.core.submit(request) for request in requests[5:]]
        await turn()
        deltas = await suspended(machine, streams)
        assert [delta.finish_reason for delta in deltas] == [FinishReason.SUSPENDED] * 9
        assert {delta.num_output_tokens > 0 for delta in deltas} == {True, False}
        await machine.restart()
        for request, delta in zip(requests, deltas, strict=True):
            assert_answers(await resumed(machine, delta), request)
        await machine.check_is_sound()
        assert machine.folder.records == {}


async def test_an_answer_may_be_suspended_again_and_again() -> None:
    request = ask("r", LONG, max_tokens=40, is_resumable=True)
    async with busy(TIGHT) as machine:
        stream = machine.core.submit(request)
        whole: list[OutputDelta] = []
        for _ in range(30):
            await step(machine, 3)
            [delta] = await suspended(machine, [stream])
            whole.append(delta)
            if delta.resume_id is None:
                break
            await machine.restart()
            stream = machine.core.resume(delta.resume_id, "", "r")
            await turn()
            while machine.disk.jobs:
                machine.disk.finish()
                await turn()
        assert len(whole) > 7
        assert_answers(join(*whole), request)


async def test_the_reader_has_all_text_once_with_unfinished_characters_and_stop_strings() -> None:
    """The text that is held back at the suspension comes when the answer goes on."""
    tokenizer = hash_tokenizer()
    plain = ask("r", LONG, max_tokens=60)
    text = tokenizer.decode(oracle(plain).token_ids)
    stop = next(text[i : i + 5] for i in range(70, 200) if "\ufffd" not in text[i : i + 5])
    ids = list(oracle(plain).token_ids)
    num_held = 0
    for num_steps in range(1, 30):
        request = replace(
            plain,
            is_resumable=True,
            sampling=replace(
                plain.sampling, stop=(stop, text.replace("\ufffd", "")[30:33] + "never", "x" * 30)
            ),
        )
        async with busy() as machine:
            stream = machine.core.submit(request)
            await step(machine, num_steps)
            [delta] = await suspended(machine, [stream])
            shown = tokenizer.decode(ids[: delta.num_output_tokens])
            num_held += delta.resume_id is not None and delta.text != shown
            await machine.restart()
            whole = await resumed(machine, delta)
        assert whole.text == text[: text.index(stop)]
        assert whole.matched_stop == stop
        assert whole.finish_reason is FinishReason.STOP
        assert list(whole.token_ids) == ids[: len(whole.token_ids)]
    assert num_held > 0, "nothing was held back at any step"


class LogprobRunner(HashRunner):
    """Says of each token a number that only its place and value give."""

    def deliver(self) -> None:
        plan = self.plans.popleft()
        result = self.model.execute(plan)
        rows = [row for row in plan.rows if row.sample]
        logprobs = tuple(
            -token - (row.position + row.num_tokens) / 1000
            for row, token in zip(rows, result.tokens, strict=True)
        )
        self._report(replace(result, logprobs=logprobs))


@pytest.mark.parametrize("num_steps", [2, 5, 9, 14])
async def test_logprobs_are_all_there_once(num_steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.engine.machine.HashRunner", LogprobRunner)
    plain = ask("r", LONG, max_tokens=20, is_resumable=True)
    request = replace(plain, sampling=replace(plain.sampling, has_logprobs=True))
    async with busy() as machine:
        stream = machine.core.submit(request)
        await step(machine, num_steps)
        [delta] = await suspended(machine, [stream])
        await machine.restart()
        whole = await resumed(machine, delta)
    assert_answers(whole, request)
    expected = [-token - (41 + i) / 1000 for i, token in enumerate(whole.token_ids)]
    assert list(whole.logprobs) == expected


async def test_a_suspended_answer_from_a_state_keeps_its_state_at_the_end() -> None:
    async with busy(TIGHT) as machine:
        made = await machine.answer(ask("m", LONG, max_tokens=0, keep_state=KEEP))
        assert made.state is not None
        request = ask(
            "r",
            LONG,
            max_tokens=9,
            state_id=made.state.state_id,
            keep_state=KEEP,
            is_resumable=True,
        )
        base = text_state(LONG)
        for num_steps in (0, 2, 5):
            stream = machine.core.submit(request)
            await step(machine, num_steps)
            [delta] = await suspended(machine, [stream])
            assert delta.resume_id is not None
            await machine.restart()
            whole = await resumed(machine, delta)
            assert_answers(whole, request, base)
            assert whole.state is not None
            ids = LONG + whole.token_ids
            further = ask("f", (7, 8), state_id=whole.state.state_id)
            assert_answers(await machine.answer(further), further, text_state(ids, base))
            await machine.check_is_sound()


async def test_a_suspended_answer_goes_on_though_its_first_state_was_deleted() -> None:
    async with busy(TIGHT) as machine:
        made = await machine.answer(ask("m", LONG, max_tokens=0, keep_state=KEEP))
        assert made.state is not None
        request = ask("r", LONG, max_tokens=9, state_id=made.state.state_id, is_resumable=True)
        stream = machine.core.submit(request)
        await step(machine, 3)
        [delta] = await suspended(machine, [stream])
        await machine.restart()
        machine.core.states.delete("", made.state.state_id)
        assert_answers(await resumed(machine, delta), request, text_state(LONG))
        await machine.check_is_sound()


async def test_a_suspended_answer_from_a_tuned_state_goes_on() -> None:
    request = ask("r", LONG, max_tokens=9, initial_state="poet", is_resumable=True)
    for num_steps in (0, 3, 9):
        async with Machine(TIGHT, is_eager=False, tuned={"poet": 77}) as machine:
            stream = machine.core.submit(request)
            await step(machine, num_steps)
            [delta] = await suspended(machine, [stream])
            await machine.restart()
            assert_answers(await resumed(machine, delta), request, (77, 0))


async def test_an_id_resumes_once_and_for_its_owner_only() -> None:
    async with busy() as machine:
        request = ask("r", LONG, max_tokens=9, owner="ann", is_resumable=True)
        stream = machine.core.submit(request)
        await step(machine, 3)
        [delta] = await suspended(machine, [stream])
        assert delta.resume_id is not None
        with pytest.raises(Draining):
            machine.core.resume(delta.resume_id, "ann", "r")
        await machine.restart()
        for owner, resume_id in (("bob", delta.resume_id), ("ann", "gen-x"), ("ann", "state-x")):
            with pytest.raises(StateNotFound) as refused:
                machine.core.resume(resume_id, owner, "r")
            assert refused.value.field == "resume"
        assert_answers(await resumed(machine, delta, "ann"), request)
        with pytest.raises(StateNotFound, match="resumed already"):
            machine.core.resume(delta.resume_id, "ann", "r")
        await machine.restart()
        with pytest.raises(StateNotFound):
            machine.core.resume(delta.resume_id, "ann", "r")
        await machine.check_is_sound()


async def test_drain_alone_suspends_nobody() -> None:
    async with busy() as machine:
        requests = [ask(f"r{i}", (i,), max_tokens=9, is_resumable=True) for i in range(7)]
        streams = [machine.core.submit(request) for request in requests]
        await step(machine, 3)
        assert await machine.while_settling(machine.core.drain(10))
        for request, stream in zip(requests, streams, strict=True):
            assert_answers(await read_all(stream), request)
        assert machine.folder.records == {}


async def test_who_did_not_ask_for_it_is_not_suspended() -> None:
    async with busy() as machine:
        request = ask("plain", LONG, max_tokens=30)
        stream = machine.core.submit(request)
        other = machine.core.submit(ask("other", LONG, max_tokens=30, is_resumable=True))
        await step(machine, 3)
        plain, gone = await suspended(machine, [stream, other])
        assert_answers(plain, request)
        assert gone.finish_reason is FinishReason.SUSPENDED


async def test_without_a_disk_everybody_finishes() -> None:
    async with Machine(with_disk=False, is_eager=False) as machine:
        request = ask("r", LONG, is_resumable=True)
        stream = machine.core.submit(request)
        await step(machine, 2)
        [delta] = await suspended(machine, [stream])
        assert_answers(delta, request)


async def test_an_answer_that_has_just_come_back_may_leave_at_once() -> None:
    """Before its page was read: it leaves as the page that it came as."""
    request = ask("r", LONG, max_tokens=20, is_resumable=True)
    async with busy() as machine:
        stream = machine.core.submit(request)
        await step(machine, 5)
        [first] = await suspended(machine, [stream])
        await machine.restart()
        files = set(machine.folder.files)
        assert first.resume_id is not None
        stream = machine.core.resume(first.resume_id, "", "r")
        [second] = await suspended(machine, [stream])
        assert set(machine.folder.files) == files
        assert second.token_ids == ()
        await machine.restart()
        assert_answers(await resumed(machine, join(first, second)), request)
        await machine.check_is_sound()
