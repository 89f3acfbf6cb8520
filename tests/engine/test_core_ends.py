"""EngineCore: how a request ends, and what is left of it."""

from __future__ import annotations

import asyncio
from dataclasses import replace

from engine.types import FinishReason, SamplingParams
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
from tests.hash_model import HashRunner, oracle


async def test_a_stop_string_ends_the_request_and_is_not_shown() -> None:
    request = ask(max_tokens=40)
    tokens = oracle(request).token_ids
    text = hash_tokenizer().decode(tokens)
    stop = text[20:24]
    runner = HashRunner()
    async with running(make_core(runner)) as core:
        stream = core.submit(
            replace(
                request, sampling=SamplingParams(max_tokens=40, stop=(stop,), stop_token_ids=())
            )
        )
        await deliver_all(runner)
        delta = await read_all(stream)
        assert_is_free(core)
    assert delta.text == text[: text.index(stop)]
    assert delta.finish_reason is FinishReason.STOP
    assert delta.matched_stop == stop
    assert delta.token_ids == tokens[: delta.num_output_tokens]
    assert delta.num_output_tokens < 40


async def test_a_stop_string_completed_by_the_last_token_is_a_stop() -> None:
    tokenizer = hash_tokenizer()
    request = next(
        ask(max_tokens=8, seed=seed)
        for seed in range(1000)
        if len(tokenizer.decode(oracle(ask(max_tokens=8, seed=seed)).token_ids[-1:])) > 3
    )
    tokens = oracle(request).token_ids
    stop = tokenizer.decode(tokens[-1:])
    sampling = replace(request.sampling, stop=(stop,))
    runner = HashRunner()
    async with running(make_core(runner)) as core:
        stream = core.submit(replace(request, sampling=sampling))
        await deliver_all(runner)
        delta = await read_all(stream)
    assert delta.finish_reason is FinishReason.STOP
    assert delta.matched_stop == stop
    assert delta.text == tokenizer.decode(tokens[:-1])


async def test_text_held_for_a_stop_string_is_flushed_at_the_end() -> None:
    request = ask(max_tokens=8)
    text = hash_tokenizer().decode(oracle(request).token_ids)
    stop = text[-2:] + "never comes"
    runner = HashRunner()
    async with running(make_core(runner)) as core:
        stream = core.submit(ask(max_tokens=8, stop=(stop,)))
        await deliver_all(runner)
        delta = await read_all(stream)
    assert delta.text == text
    assert delta.finish_reason is FinishReason.LENGTH
    assert delta.matched_stop is None


async def test_a_stop_token_gives_no_text_but_counts() -> None:
    tokens = oracle(ask()).token_ids
    runner = HashRunner()
    async with running(make_core(runner)) as core:
        stream = core.submit(ask(stop_token_ids=(tokens[3],)))
        await deliver_all(runner)
        delta = await read_all(stream)
    assert delta.finish_reason is FinishReason.STOP
    assert delta.token_ids == tokens[:4]
    assert delta.num_output_tokens == 4
    assert delta.text == hash_tokenizer().decode(tokens[:3])


async def test_the_context_length_cuts_the_completion() -> None:
    runner = HashRunner()
    async with running(make_core(runner, limits(max_context_len=5))) as core:
        stream = core.submit(ask(prompt_ids=(1, 2, 3), max_tokens=100))
        await deliver_all(runner)
        delta = await read_all(stream)
    assert delta.num_output_tokens == 2
    assert delta.finish_reason is FinishReason.LENGTH


async def test_logits_that_are_not_finite_end_the_request_with_an_error() -> None:
    runner = HashRunner(bad_every=1)
    async with running(make_core(runner)) as core:
        stream = core.submit(ask())
        await deliver_all(runner)
        delta = await read_all(stream)
        assert_is_free(core)
        assert not core.snapshot().is_dead
    assert delta.finish_reason is FinishReason.ERROR
    assert delta.error == "logits of token 3 are not finite"


async def test_abort_frees_the_slot_at_once_with_rows_in_flight() -> None:
    runner = HashRunner()
    async with running(make_core(runner, num_slots=1, max_batch_size=1)) as core:
        gone = core.submit(ask("gone"))
        await turn()
        assert len(runner.plans) == 2
        assert core.snapshot().num_free_slots == 0
        core.abort("gone")
        assert core.snapshot().num_free_slots == 1
        next_one = core.submit(ask("next", seed=3))
        await deliver_all(runner)
        assert (await read_all(gone)).finish_reason is FinishReason.ABORT
        assert_is_whole(await read_all(next_one), ask("next", seed=3))


async def test_abort_of_a_waiting_request_takes_it_off_the_queue() -> None:
    runner = HashRunner()
    async with running(make_core(runner, num_slots=1)) as core:
        core.submit(ask("first"))
        await turn()
        waiting = core.submit(ask("second"))
        core.abort("second")
        assert core.snapshot().num_waiting == 0
        assert (await read_all(waiting)).finish_reason is FinishReason.ABORT


async def test_abort_of_an_unknown_request_changes_nothing() -> None:
    async with running(make_core(HashRunner())) as core:
        core.submit(ask())
        core.abort("somebody else")
        assert core.snapshot().num_waiting == 1


async def test_closing_the_stream_aborts_the_request() -> None:
    runner = HashRunner()
    async with running(make_core(runner)) as core:
        stream = core.submit(ask())
        await turn()
        stream.close()
        assert_is_free(core)


async def test_a_deadline_ends_the_request_with_what_it_has() -> None:
    runner = HashRunner()
    async with running(make_core(runner)) as core:
        stream = core.submit(ask(timeout_s=0.25))
        await turn()
        for _ in range(3):
            runner.deliver()
            await turn()
        delta = await read_all(stream)
        assert_is_free(core)
    assert delta.finish_reason is FinishReason.TIMEOUT
    assert delta.token_ids == oracle(ask()).token_ids[:3]


async def test_the_deadline_of_an_ended_request_is_forgotten() -> None:
    runner = HashRunner()
    async with running(make_core(runner)) as core:
        core.submit(ask(timeout_s=0.05))
        await deliver_all(runner)
        stream = core.submit(ask())  # of the same name
        await asyncio.sleep(0.08)
        await deliver_all(runner)
        assert_is_whole(await read_all(stream), ask())


async def test_a_deadline_also_ends_a_request_that_waits() -> None:
    runner = HashRunner()
    async with running(make_core(runner, num_slots=1)) as core:
        core.submit(ask("first"))
        await turn()
        delta = await read_all(core.submit(ask("second", timeout_s=0.01)))
        assert core.snapshot().num_waiting == 0
    assert delta.finish_reason is FinishReason.TIMEOUT
