"""EngineCore: who gives way to whom, and that nobody can tell from the text."""

from __future__ import annotations

import asyncio
import random

from tests.engine.machine import Machine, assert_answers
from tests.engine.replica import ask, limits, read_all, turn

PROMPT = (5, 6, 7, 8, 9, 10, 11)
MORE = (300, 301, 302)


async def test_300_requests_on_4_seats_take_turns_and_answer_right() -> None:
    rng = random.Random(5)
    live = limits(time_slice_tokens=3, max_waiting=300)
    requests = [
        ask(
            f"r{i}",
            tuple(rng.randrange(900) for _ in range(rng.randint(1, 12))),
            max_tokens=rng.randint(1, 14),
            priority=rng.randrange(3),
            seed=i,
        )
        for i in range(300)
    ]
    async with Machine(live, num_frames=400, num_slots=6) as machine:
        streams = [machine.core.submit(request) for request in requests]
        deltas = await machine.while_settling(asyncio.gather(*map(read_all, streams)))
        assert machine.core.snapshot().cache.num_preemptions > 100
        await machine.check_is_sound()
    for request, delta in zip(requests, deltas, strict=True):
        assert_answers(delta, request)


async def test_a_request_of_higher_priority_goes_first_and_changes_no_text() -> None:
    async with Machine(is_eager=False, num_slots=1, max_batch_size=1) as machine:
        low = ask("low", PROMPT, max_tokens=30)
        low_stream = machine.core.submit(low)
        await turn()
        for _ in range(5):
            machine.runner.deliver()
            await turn()
        high = ask("high", MORE, priority=1, max_tokens=8)
        high_stream = machine.core.submit(high)
        num_at_end = 0
        while (delta := high_stream.poll()) is None or delta.finish_reason is None:
            machine.runner.deliver()
            await turn()
            num_at_end = len(machine.core._responses["low"].seq.output_ids)
        assert num_at_end < 12, "the request of low priority went on beside it"
        await machine.settle()
        assert_answers(await read_all(low_stream), low)
        assert machine.core.snapshot().cache.num_preemptions == 1


async def test_those_that_gave_way_do_not_count_as_waiting() -> None:
    live = limits(time_slice_tokens=2, max_waiting=4)
    async with Machine(live, is_eager=False, num_slots=2, max_batch_size=2) as machine:
        streams = [machine.core.submit(ask(f"r{i}", (i,), max_tokens=40)) for i in range(6)]
        for _ in range(30):
            await turn()
            machine.runner.deliver()
        snapshot = machine.core.snapshot()
        assert snapshot.cache.num_preemptions > 0
        assert (snapshot.num_running, snapshot.num_waiting) == (6, 0)
        late = [ask(f"late {i}", (9, i), max_tokens=40) for i in range(4)]
        streams += [machine.core.submit(request) for request in late]  # none is one too many
        await machine.settle()
        for i, stream in enumerate(streams[:6]):
            assert_answers(await read_all(stream), ask(f"r{i}", (i,), max_tokens=40))
