"""EngineCore: states that users keep hold exactly the text that was emitted, and go on from it."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from engine.errors import InvalidRequest, StateNotFound, StatesFull
from engine.types import EngineRequest, FinishReason, OutputDelta, StateInfo, StateOptions
from tests.engine.machine import SEED, Machine, assert_answers, text_state
from tests.engine.replica import ask, hash_tokenizer, read_all, turn
from tests.hash_model import oracle

KEEP = StateOptions()
PROMPT = (5, 6, 7, 8, 9, 10, 11)
MORE = (300, 301, 302)


def kept(delta: OutputDelta) -> StateInfo:
    assert delta.state is not None, f"{delta.finish_reason}: {delta.error}"
    return delta.state


async def check_goes_on(machine: Machine, state: StateInfo, ids: tuple[int, ...]) -> None:
    """The state is the one after `ids`: a further prompt is answered as behind all of them."""
    base = text_state(ids)
    assert state.num_tokens == base[1]
    request = ask("further", MORE, state_id=state.state_id, max_tokens=9)
    delta = await machine.answer(request)
    assert_answers(delta, request, base)
    assert delta.num_state_tokens == len(ids)
    whole = await machine.answer(ask("whole", ids + MORE, max_tokens=9))
    assert whole.token_ids == delta.token_ids


SEEDS = pytest.mark.parametrize("seed", [SEED, None], ids=["cache", "no-cache"])


@SEEDS
@pytest.mark.parametrize("max_tokens", [1, 5, 6])
async def test_a_state_kept_at_max_tokens_goes_on_behind_the_last_token(
    seed: bytes | None, max_tokens: int
) -> None:
    async with Machine(seed=seed) as machine:
        request = ask("r", PROMPT, max_tokens=max_tokens, keep_state=KEEP)
        delta = await machine.answer(request)
        assert_answers(delta, request)
        await check_goes_on(machine, kept(delta), PROMPT + delta.token_ids)
        await machine.check_is_sound()


@SEEDS
async def test_a_state_kept_at_a_stop_token_does_not_hold_the_stop_token(
    seed: bytes | None,
) -> None:
    tokens = oracle(ask("r", PROMPT, max_tokens=30)).token_ids
    async with Machine(seed=seed) as machine:
        delta = await machine.answer(
            ask("r", PROMPT, max_tokens=30, stop_token_ids=(tokens[7],), keep_state=KEEP)
        )
        assert delta.finish_reason is FinishReason.STOP
        assert delta.token_ids[-1] == tokens[7]
        await check_goes_on(machine, kept(delta), PROMPT + delta.token_ids[:-1])


@SEEDS
async def test_a_state_kept_when_the_first_token_is_a_stop_token_is_that_of_the_prompt(
    seed: bytes | None,
) -> None:
    [first] = oracle(ask("r", PROMPT, max_tokens=1)).token_ids
    async with Machine(seed=seed) as machine:
        delta = await machine.answer(ask("r", PROMPT, stop_token_ids=(first,), keep_state=KEEP))
        assert delta.text == ""
        await check_goes_on(machine, kept(delta), PROMPT)


@SEEDS
async def test_a_state_kept_at_a_stop_string_inside_a_token_holds_exactly_the_emitted_text(
    seed: bytes | None,
) -> None:
    tokenizer = hash_tokenizer()
    tokens = oracle(ask("r", PROMPT, max_tokens=40)).token_ids
    num_cut = 0
    async with Machine(seed=seed) as machine:
        for place, token in enumerate(tokens):
            word = tokenizer.token_bytes(token)
            if len(word) < 4 or not word.isascii():
                continue
            stop = word[1:3].decode() if place % 2 else tokenizer.decode(tokens[place : place + 1])
            delta = await machine.answer(
                ask(f"r{place}", PROMPT, max_tokens=40, stop=(stop,), keep_state=KEEP)
            )
            assert delta.matched_stop == stop
            state = kept(delta)
            ids = emitted_ids(delta)
            assert tokenizer.decode(ids) == delta.text
            num_cut += ids != delta.token_ids[: len(ids)]
            await check_goes_on(machine, state, PROMPT + ids)
    assert num_cut > 2, "no stop string was found inside a token"


def emitted_ids(delta: OutputDelta) -> tuple[int, ...]:
    """The tokens in front of the stop string, and what was emitted of the next in new tokens."""
    tokenizer, ids = hash_tokenizer(), []
    assert delta.matched_stop is not None
    data = b"".join(map(tokenizer.token_bytes, delta.token_ids))
    data = data[: data.index(delta.matched_stop.encode())]
    for token in delta.token_ids:
        word = tokenizer.token_bytes(token)
        if len(word) > len(data):
            break
        ids.append(token)
        data = data[len(word) :]
    return (*ids, *tokenizer.encode_bytes(data))


@SEEDS
async def test_max_tokens_of_0_computes_and_keeps_the_state_of_the_prompt(
    seed: bytes | None,
) -> None:
    async with Machine(seed=seed) as machine:
        request = ask("r", PROMPT, max_tokens=0, keep_state=KEEP)
        delta = await machine.answer(request)
        assert (delta.text, delta.token_ids) == ("", ())
        assert delta.finish_reason is FinishReason.LENGTH
        state = kept(delta)
        assert state.has_logits
        await check_goes_on(machine, state, PROMPT)
        nothing_more = ask("none", (), state_id=state.state_id, max_tokens=8)
        assert_answers(await machine.answer(nothing_more), nothing_more, text_state(PROMPT))
        await machine.check_is_sound()


async def test_an_answer_from_a_state_without_a_prompt_costs_no_prefill() -> None:
    async with Machine() as machine:
        state = kept(await machine.answer(ask("r", PROMPT, max_tokens=0, keep_state=KEEP)))
        before = machine.num_prefill_tokens
        for seed in range(4):
            request = ask("none", (), state_id=state.state_id, seed=seed)
            assert_answers(await machine.answer(request), request, text_state(PROMPT))
        assert machine.num_prefill_tokens == before


@SEEDS
async def test_ten_turns_on_states_alone_equal_the_whole_text(seed: bytes | None) -> None:
    rng = random.Random(3)
    async with Machine(seed=seed, num_frames=40) as machine:
        ids: tuple[int, ...] = ()
        state: StateInfo | None = None
        for turn_number in range(10):
            prompt = tuple(rng.randrange(900) for _ in range(rng.randint(1, 9)))
            request = ask(
                f"turn {turn_number}",
                prompt,
                max_tokens=rng.randint(1, 9),
                seed=turn_number,
                state_id=None if state is None else state.state_id,
                keep_state=KEEP,
            )
            delta = await machine.answer(request)
            assert_answers(delta, request, text_state(ids))
            parent_id = None if state is None else state.state_id
            ids += prompt + delta.token_ids
            state = kept(delta)
            assert (state.num_tokens, state.parent_id) == (len(ids), parent_id)
        assert len(machine.core.states.list("")) == 10
        await machine.check_is_sound()


async def test_a_turn_on_a_state_computes_nothing_of_what_came_before() -> None:
    async with Machine() as machine:
        state = kept(await machine.answer(ask("r", tuple(range(200)), keep_state=KEEP)))
        before = machine.num_prefill_tokens
        await machine.answer(ask("next", MORE, state_id=state.state_id))
        assert machine.num_prefill_tokens - before == len(MORE)


async def test_equal_prompts_with_other_seeds_compute_the_prompt_once() -> None:
    prompt = tuple(range(50))
    async with Machine(num_slots=8) as machine:
        requests = [ask(f"r{seed}", prompt, seed=seed, max_tokens=12) for seed in range(6)]
        streams = [machine.core.submit(request) for request in requests]
        await machine.settle()
        deltas = [await read_all(stream) for stream in streams]
        assert machine.num_prefill_tokens == len(prompt)
    for request, delta in zip(requests, deltas, strict=True):
        assert_answers(delta, request)
    assert [delta.num_cached_tokens for delta in deltas] == [0] + [len(prompt)] * 5
    assert len({delta.token_ids for delta in deltas}) == 6


async def test_equal_prompts_with_other_seeds_keep_their_states_each() -> None:
    async with Machine(num_slots=8) as machine:
        requests = [ask(f"r{seed}", PROMPT, seed=seed, keep_state=KEEP) for seed in range(4)]
        streams = [machine.core.submit(request) for request in requests]
        await machine.settle()
        for request, stream in zip(requests, streams, strict=True):
            delta = await read_all(stream)
            assert_answers(delta, request)
            await check_goes_on(machine, kept(delta), PROMPT + delta.token_ids)
        await machine.check_is_sound()


@pytest.mark.parametrize("num_steps", range(12))
async def test_an_abort_at_any_step_leaves_nothing_behind(num_steps: int) -> None:
    """Six tokens and a state: steps 0 to 5 draw, the rest seals."""
    async with Machine(is_eager=False) as machine:
        stream = machine.core.submit(ask("r", PROMPT, keep_state=KEEP))
        for _ in range(num_steps):
            await turn()
            if machine.runner.plans:
                machine.runner.deliver()
        await turn()
        machine.core.abort("r")
        await machine.settle()
        delta = await read_all(stream)
        if delta.state is None:
            assert delta.finish_reason is FinishReason.ABORT
            assert machine.core.states.list("") == []
        else:
            assert delta.finish_reason is FinishReason.LENGTH
        await machine.check_is_sound()


async def to_sealing(machine: Machine, request: EngineRequest) -> None:
    """Deliver steps until the answer is complete and its state is being computed."""
    while not any(response.seal for response in machine.core._responses):
        machine.runner.deliver()
        await turn()


async def test_an_abort_while_the_state_is_computed_gives_the_text_and_no_state() -> None:
    async with Machine(is_eager=False) as machine:
        request = ask("r", PROMPT, keep_state=KEEP)
        stream = machine.core.submit(request)
        await turn()
        await to_sealing(machine, request)
        machine.core.abort("r")
        delta = await read_all(stream)
        assert delta.finish_reason is FinishReason.ABORT
        assert delta.state is None
        assert delta.token_ids == oracle(request).token_ids
        await machine.settle()
        await machine.check_is_sound()


async def test_an_abort_while_the_state_behind_a_stop_string_is_computed_is_an_abort() -> None:
    text = hash_tokenizer().decode(oracle(ask("r", PROMPT, max_tokens=40)).token_ids)
    async with Machine(is_eager=False) as machine:
        request = ask("r", PROMPT, max_tokens=40, stop=(text[20:24],), keep_state=KEEP)
        stream = machine.core.submit(request)
        await turn()
        await to_sealing(machine, request)
        machine.core.abort("r")
        delta = await read_all(stream)
        assert delta.finish_reason is FinishReason.ABORT
        assert delta.text == text[: text.index(text[20:24])]


async def test_a_deadline_while_the_state_is_computed_gives_the_text_and_no_state() -> None:
    async with Machine(is_eager=False) as machine:
        request = ask("r", PROMPT, keep_state=KEEP, timeout_s=0.1)
        stream = machine.core.submit(request)
        await turn()
        await to_sealing(machine, request)
        delta = await read_all(stream)
        assert (delta.finish_reason, delta.state) == (FinishReason.TIMEOUT, None)
        assert delta.token_ids == oracle(request).token_ids
        await machine.settle()
        await machine.check_is_sound()


async def test_a_step_that_fails_while_the_state_is_computed_is_told() -> None:
    async with Machine(is_eager=False) as machine:
        request = ask("r", PROMPT, keep_state=KEEP)
        stream = machine.core.submit(request)
        await turn()
        await to_sealing(machine, request)
        while len(machine.runner.plans) > 1:
            machine.runner.deliver()
            await turn()
        machine.runner.deliver_failure()
        await machine.settle()
        delta = await read_all(stream)
        assert delta.finish_reason is FinishReason.ERROR
        assert delta.error == "the state could not be kept: injected failure"
        assert machine.core.states.list("") == []
        await machine.check_is_sound()


async def test_a_request_that_seals_does_not_move_to_another_engine() -> None:
    """It has begun: what it has emitted would be emitted again."""
    async with Machine(is_eager=False, num_slots=1, max_batch_size=1) as machine:
        request = ask("seals", PROMPT, keep_state=KEEP)
        stream = machine.core.submit(request)
        await turn()
        others = [machine.core.submit(ask(f"other {i}")) for i in range(2)]
        await to_sealing(machine, request)
        taken = [one.request_id for one, _ in machine.core.take_waiting()]
        assert "seals" not in taken
        await machine.settle()
        assert_answers(await read_all(stream), request)
        for other in others:
            other.close()


async def test_states_beyond_the_capacity_are_refused_at_submission() -> None:
    async with Machine(num_frames=24, num_files=3) as machine:
        for i in range(3):
            await machine.answer(ask(f"r{i}", (i, *PROMPT), keep_state=KEEP))
        with pytest.raises(StatesFull, match="3 states are kept and 0 on their way, of 3"):
            machine.core.submit(ask("r3", PROMPT, keep_state=KEEP))
        await machine.answer(ask("plain", PROMPT))
        await machine.check_is_sound()
        first = machine.core.states.list("")[0]
        machine.core.states.delete("", first.state_id)
        kept(await machine.answer(ask("r4", PROMPT, keep_state=KEEP)))
        await machine.check_is_sound()


async def test_states_on_their_way_count_for_the_capacity() -> None:
    async with Machine(num_files=2, is_eager=False) as machine:
        streams = [machine.core.submit(ask(f"r{i}", (i,), keep_state=KEEP)) for i in range(2)]
        with pytest.raises(StatesFull, match="2 on their way"):
            machine.core.submit(ask("r2", keep_state=KEEP))
        machine.core.abort("r0")
        streams.append(machine.core.submit(ask("r3", keep_state=KEEP)))
        await machine.settle()
        assert [(await read_all(stream)).state is None for stream in streams] == [
            True,
            False,
            False,
        ]
        await machine.check_is_sound()


async def test_states_that_fill_host_memory_are_refused_at_submission() -> None:
    async with Machine(num_frames=4, with_disk=False) as machine:
        for i in range(2):  # half of the host's memory is for states
            kept(await machine.answer(ask(f"r{i}", (i, *PROMPT), keep_state=KEEP)))
        with pytest.raises(StatesFull):
            machine.core.submit(ask("r2", PROMPT, keep_state=KEEP))
        await machine.check_is_sound()


async def test_without_host_memory_no_state_is_kept() -> None:
    async with Machine(num_frames=0, with_disk=False) as machine:
        with pytest.raises(InvalidRequest, match="host_state_mib") as refused:
            machine.core.submit(ask(keep_state=KEEP))
        assert refused.value.field == "keep_state"
        await machine.check_is_sound()


async def test_a_state_deleted_while_a_request_runs_from_it_serves_to_its_end() -> None:
    async with Machine(is_eager=False) as machine:
        state = kept(await machine.answer(ask("r", PROMPT, max_tokens=0, keep_state=KEEP)))
        request = ask("runs", MORE, state_id=state.state_id, keep_state=KEEP)
        stream = machine.core.submit(request)
        machine.core.states.delete("", state.state_id)
        await machine.settle()
        delta = await read_all(stream)
        assert_answers(delta, request, text_state(PROMPT))
        with pytest.raises(StateNotFound):
            machine.core.submit(replace(request, request_id="late"))
        await check_goes_on(machine, kept(delta), PROMPT + MORE + delta.token_ids)
        await machine.check_is_sound()


async def test_a_fork_copies_nothing_and_goes_on_by_itself() -> None:
    async with Machine() as machine:
        state = kept(await machine.answer(ask("r", PROMPT, max_tokens=0, keep_state=KEEP)))
        await machine.settle()
        before = machine.core.snapshot().cache
        forks = [machine.core.states.fork("", state.state_id, KEEP) for _ in range(50)]
        await machine.settle()
        assert machine.core.snapshot().cache == before
        machine.core.states.delete("", state.state_id)
        for fork in forks[:3]:
            assert fork.parent_id == state.state_id
            await check_goes_on(machine, fork, PROMPT)
        await machine.check_is_sound()


async def test_the_kept_state_is_the_same_page_as_the_snapshot_of_its_text() -> None:
    """Whoever sends the same text later begins from it, and nothing is stored twice."""
    async with Machine() as machine:
        state = kept(await machine.answer(ask("r", PROMPT, max_tokens=0, keep_state=KEEP)))
        again = ask("again", PROMPT, max_tokens=5)
        delta = await machine.answer(again)
        assert_answers(delta, again)
        assert delta.num_cached_tokens == len(PROMPT)
        twin = kept(await machine.answer(ask("twin", PROMPT, max_tokens=0, keep_state=KEEP)))
        assert twin.state_id != state.state_id
        assert len(machine.core._store._num_ids) == 1
        await machine.check_is_sound()
