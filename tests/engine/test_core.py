"""EngineCore: each client reads what its request computes alone."""

from __future__ import annotations

import asyncio
import random

import pytest

from engine.output import TextOutput
from engine.types import EngineRequest, OutputDelta
from tests.engine.replica import (
    ask,
    assert_is_free,
    assert_is_whole,
    deliver_all,
    hash_tokenizer,
    limits,
    make_core,
    read_all,
    running,
    turn,
)
from tests.hash_model import VOCAB_SIZE, HashRunner, ThreadedHashRunner, oracle


def random_request(rng: random.Random, request_id: str) -> EngineRequest:
    return ask(
        request_id,
        tuple(rng.randrange(VOCAB_SIZE) for _ in range(rng.randint(1, 40))),
        max_tokens=rng.randint(1, 30),
        seed=rng.randrange(2**64),
        stop_token_ids=tuple(range(0, VOCAB_SIZE, 30)),
    )


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("decode_first", [True, False])
async def test_concurrent_requests_on_a_device_thread_equal_their_runs_alone(
    depth: int, decode_first: bool
) -> None:
    rng = random.Random(depth)
    requests = [random_request(rng, f"r{i}") for i in range(32)]
    core = make_core(ThreadedHashRunner(), limits(decode_first=decode_first), depth=depth)
    async with running(core):
        streams = [core.submit(request) for request in requests]
        deltas = await asyncio.gather(*map(read_all, streams))
        assert_is_free(core)
    for request, delta in zip(requests, deltas, strict=True):
        assert_is_whole(delta, request)


async def test_clients_that_come_and_go_disturb_nobody() -> None:
    rng = random.Random(7)
    core = make_core(ThreadedHashRunner(), num_slots=3, max_batch_size=3)

    async def client(request: EngineRequest, leaves: bool) -> None:
        stream = core.submit(request)
        if not leaves:
            assert_is_whole(await read_all(stream), request)
            return
        async for delta in stream:
            if delta.num_output_tokens > 2:
                break
        stream.close()

    async with running(core), asyncio.TaskGroup() as group:
        for i in range(60):
            group.create_task(client(random_request(rng, f"r{i}"), leaves=i % 3 == 0))
            if i % 7 == 0:
                await asyncio.sleep(0.001)
    assert_is_free(core)


async def test_a_burst_is_planned_as_one_step() -> None:
    runner = HashRunner()
    async with running(make_core(runner)) as core:
        for i in range(4):
            core.submit(ask(f"r{i}"))
        await turn()
        assert [row.seq_id for row in runner.plans[0].rows] == [0, 1, 2, 3]


async def test_no_more_than_depth_plans_are_in_flight() -> None:
    runner = HashRunner()
    async with running(make_core(runner, depth=3)) as core:
        core.submit(ask())
        await turn(20)
        assert len(runner.plans) == 3


async def test_a_slow_reader_finds_one_merged_delta() -> None:
    runner = HashRunner()
    async with running(make_core(runner)) as core:
        stream = core.submit(ask())
        await deliver_all(runner)
        deltas = [delta async for delta in stream]
    assert len(deltas) == 1
    assert_is_whole(deltas[0], ask())


async def test_only_the_last_delta_may_be_without_text() -> None:
    runner = HashRunner()
    request = ask(max_tokens=60, seed=seed_with_split_characters())
    async with running(make_core(runner)) as core:
        stream = core.submit(request)
        reader = asyncio.ensure_future(collect_each(stream.__aiter__()))
        await deliver_all(runner)
        deltas = await reader
    assert all(delta.text for delta in deltas[:-1])
    assert len(deltas) > 20
    assert sum((delta.token_ids for delta in deltas), ()) == oracle(request).token_ids
    assert "".join(delta.text for delta in deltas) == hash_tokenizer().decode(
        oracle(request).token_ids
    )


async def collect_each(stream: object) -> list[OutputDelta]:
    return [delta async for delta in stream]  # type: ignore[attr-defined]


def seed_with_split_characters() -> int:
    """So that some token alone is no text: its character is finished by the next."""
    for seed in range(1000):
        tokens = oracle(ask(max_tokens=60, seed=seed)).token_ids
        output = TextOutput(hash_tokenizer())
        if sum(output.push(token) == "" for token in tokens) >= 3:
            return seed
    raise AssertionError("no such seed")
