"""States on trained weights: where one comes from, and where it has been, shows in no answer.

Every answer is compared with the model alone: tokens, log probabilities and text.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import engine.engine
from engine.client import merge
from engine.core import EngineCore
from engine.engine import Engine
from engine.plan import StepPlan
from engine.runner import ModelRunner
from engine.types import OutputDelta, SamplingParams, StateOptions
from tests.engine.real_engines import (
    CONFIG_DIR,
    EXACT,
    MODELS,
    PARAGRAPH,
    SAMPLED,
    Oracle,
    ask,
    mixed_params,
    opened,
    real_table,
    save_tuned,
    text_ids,
)
from tests.engine.replica import Recorder

KEPT = StateOptions(label="kept")
GREEDY = replace(SAMPLED, temperature=0.0)
CACHED_OR_NOT = [(model, True) for model in MODELS] + [("reverse-float64", False)]


def num_prompt_tokens(recorder: Recorder) -> int:
    return sum(step.num_prefill_tokens for step in recorder.steps)


# Reuse


@pytest.mark.parametrize("model", MODELS)
def test_any_split_of_a_text_gives_the_same_cached_or_not(model: str, tmp_path: Path) -> None:
    oracle = Oracle(real_table(model, tmp_path))
    whole = text_ids(model, 120)
    splits = st.lists(st.integers(1, len(whole)), min_size=2, max_size=4)

    @settings(max_examples=3, deadline=None, derandomize=True)
    @given(splits=splits, seed=st.integers(0, 2**64 - 1))
    def check(splits: list[int], seed: int) -> None:
        asyncio.run(compare(splits, replace(SAMPLED, seed=seed, max_tokens=8)))

    async def compare(splits: list[int], params: SamplingParams) -> None:
        answers = []
        for is_on in (True, False):
            table = real_table(model, tmp_path, enable_prefix_cache=is_on)
            async with opened(table) as core:
                answers.append([await ask(core, whole[:end], params) for end in splits * 2])
        for end, cached, plain in zip(splits * 2, *answers, strict=True):
            oracle.check(cached, whole[:end], params)
            oracle.check(plain, whole[:end], params)
            assert plain.num_cached_tokens == 0
            if model in EXACT:
                assert cached.token_ids == plain.token_ids
        again = answers[0][len(splits) :]
        assert [answer.num_cached_tokens for answer in again] == splits

    check()


@pytest.mark.parametrize("model", MODELS)
async def test_an_identical_prompt_costs_no_forward_pass(model: str, tmp_path: Path) -> None:
    table, recorder = real_table(model, tmp_path), Recorder()
    oracle = Oracle(table)
    async with opened(table, recorder) as core:
        for num_tokens in (1, PARAGRAPH, 3 * PARAGRAPH + 5):
            prompt = text_ids(model, num_tokens, start=num_tokens)
            recorder.steps.clear()
            first = await ask(core, prompt, SAMPLED, cache_salt=f"{num_tokens}")
            assert num_prompt_tokens(recorder) == num_tokens
            recorder.steps.clear()
            second = await ask(core, prompt, SAMPLED, cache_salt=f"{num_tokens}")
            assert num_prompt_tokens(recorder) == 0
            assert second.num_cached_tokens == num_tokens
            assert (second.token_ids, second.text) == (first.token_ids, first.text)
            for answer in (first, second):
                oracle.check(answer, prompt, SAMPLED)


@pytest.mark.parametrize("model", MODELS)
async def test_n_seeds_of_one_prompt_compute_it_once_and_each_equals_its_lonely_run(
    model: str, tmp_path: Path
) -> None:
    table = real_table(model, tmp_path, max_batch_size=3)
    oracle, prompt = Oracle(table), text_ids(model, 50)
    several = [replace(SAMPLED, seed=seed, temperature=1.2) for seed in range(5)]
    recorder = Recorder()
    async with opened(table, recorder) as core:
        together = await asyncio.gather(*(ask(core, prompt, params) for params in several))
        assert num_prompt_tokens(recorder) == len(prompt)
    assert len({answer.token_ids for answer in together}) > 1
    async with opened(real_table(model, tmp_path, enable_prefix_cache=False)) as core:
        alone = [await ask(core, prompt, params) for params in several]
    for params, *answers in zip(several, together, alone, strict=True):
        for answer in answers:
            oracle.check(answer, prompt, params)
        if model in EXACT:
            assert answers[0].token_ids == answers[1].token_ids


# States that users keep


@pytest.mark.parametrize(("model", "has_cache"), CACHED_OR_NOT)
async def test_a_kept_state_and_what_follows_equal_the_whole_text(
    model: str, has_cache: bool, tmp_path: Path
) -> None:
    """Turn after turn, each from the state that the one before has left."""
    table = real_table(model, tmp_path, enable_prefix_cache=has_cache)
    oracle, text, state_id = Oracle(table), list[int](), None
    turns = [text_ids(model, 30), text_ids(model, 8, start=30)[1:], [], text_ids(model, 40)[1:]]
    async with opened(table) as core:
        for number, prompt in enumerate(turns):
            params = replace(SAMPLED, seed=number, max_tokens=1 + 6 * number)
            answer = await ask(core, prompt, params, state_id=state_id, keep_state=KEPT)
            assert answer.num_state_tokens == len(text)
            text += prompt
            oracle.check(answer, text, params)
            text += answer.token_ids
            assert answer.state is not None
            assert answer.state.num_tokens == len(text)
            assert answer.state.parent_id == state_id
            state_id = answer.state.state_id
        assert len(core.states.list("me")) == len(turns)


@pytest.mark.parametrize("model", EXACT)
async def test_one_state_goes_on_in_several_ways_at_once(model: str, tmp_path: Path) -> None:
    table = real_table(model, tmp_path)
    oracle, prompt = Oracle(table), text_ids(model, 37)
    async with opened(table) as core:
        empty = replace(GREEDY, max_tokens=0)
        state = (await ask(core, prompt, empty, keep_state=KEPT)).state
        assert state is not None
        fork = core.states.fork("me", state.state_id, KEPT)
        ways = [([], 0), ([], 1), (text_ids(model, 6)[1:], 0), (text_ids(model, 20)[1:], 2)] * 2
        ids = [state.state_id, fork.state_id]
        answers = await asyncio.gather(
            *(
                ask(core, more, replace(SAMPLED, seed=seed), state_id=ids[i % 2])
                for i, (more, seed) in enumerate(ways)
            )
        )
        core.states.delete("me", state.state_id)
        late = await ask(core, [], SAMPLED, state_id=fork.state_id)
    for (more, seed), answer in zip(ways, answers, strict=True):
        oracle.check(answer, prompt + more, replace(SAMPLED, seed=seed))
    oracle.check(late, prompt, SAMPLED)


async def test_a_state_stands_for_what_was_emitted_before_stop_string_and_stop_token(
    tmp_path: Path,
) -> None:
    table = real_table("embedded-float64", tmp_path)
    oracle, prompt = Oracle(table), text_ids("embedded", 40)
    async with opened(table) as core:
        free = await ask(core, prompt, SAMPLED)
        stop = next(free.text[i : i + 3] for i in range(9, 40) if free.text[i : i + 3].isalpha())
        params = replace(SAMPLED, stop=(stop,))
        cut = await ask(core, prompt, params, keep_state=KEPT)
        oracle.check(cut, prompt, params)
        ended = replace(SAMPLED, stop_token_ids=(free.token_ids[7],))
        token_cut = await ask(core, prompt, ended, keep_state=KEPT)
        oracle.check(token_cut, prompt, ended)
        emitted = [
            [*prompt, *core.tokenizer.encode(cut.text)],
            [*prompt, *token_cut.token_ids[:-1]],
        ]
        assert b"".join(map(core.tokenizer.token_bytes, emitted[0][1:])).endswith(cut.text.encode())
        for answer, text in zip((cut, token_cut), emitted, strict=True):
            assert answer.state is not None
            assert answer.state.num_tokens == len(text)
            going_on = await ask(core, [], SAMPLED, state_id=answer.state.state_id)
            oracle.check(going_on, text, SAMPLED)


# Tuned initial states


@pytest.mark.parametrize("model", MODELS)
async def test_a_tuned_state_is_where_the_reference_model_would_begin(
    model: str, tmp_path: Path
) -> None:
    oracle, prompt = Oracle(real_table(model, tmp_path)), text_ids(model, 40)
    names = ("poet", "clerk")
    paths = [tmp_path / f"{name}.pth" for name in names]
    tuned = [save_tuned(path, oracle, seed) for seed, path in enumerate(paths)]
    table = real_table(model, tmp_path, initial_states=tuple(paths), initial_state="clerk")
    async with opened(table) as core:
        assert core.info.initial_states == names
        # twice, at once: what one leaves in the cache is not the other's
        asked = [None, *names] * 2
        answers = await asyncio.gather(
            *(ask(core, prompt, SAMPLED, initial_state=name) for name in asked)
        )
        again = [await ask(core, prompt, SAMPLED, initial_state=name) for name in asked]
        kept = await ask(core, prompt, SAMPLED, initial_state="poet", keep_state=KEPT)
        assert kept.state is not None
        going_on = await ask(core, [5], SAMPLED, state_id=kept.state.state_id)
    for name, answer in zip(asked * 2, [*answers, *again], strict=True):
        oracle.check(answer, prompt, SAMPLED, None if name is None else tuned[names.index(name)])
    assert all(answer.num_cached_tokens == len(prompt) for answer in again)
    assert len({answer.logprobs for answer in again}) == 3
    oracle.check(going_on, [*prompt, *kept.token_ids, 5], SAMPLED, tuned[0])


async def test_engine_open_begins_prompts_from_the_configured_initial_state(tmp_path: Path) -> None:
    oracle = Oracle(real_table("embedded-float32", tmp_path))
    prompt = text_ids("embedded", 20)
    wkv = save_tuned(tmp_path / "poet.pth", oracle, 3)
    overrides = [
        f'initial_states=["{tmp_path / "poet.pth"}"]',
        "initial_state=poet",
        "dtype=float32",
    ]
    async with Engine.open("rwkv-lm-tiny", CONFIG_DIR, overrides) as tuned:
        whole = None
        async for delta in tuned.generate(prompt, SAMPLED):
            whole = delta if whole is None else merge(whole, delta)
    assert whole is not None
    oracle.check(whole, prompt, SAMPLED, wkv)
    with pytest.raises(AssertionError, match="log probability of token 0"):
        oracle.check(whole, prompt, SAMPLED)


# Turns, batches, slots


@pytest.mark.parametrize(("model", "has_cache"), CACHED_OR_NOT)
async def test_answers_that_take_turns_equal_those_that_ran_through(
    model: str, has_cache: bool, tmp_path: Path
) -> None:
    table = real_table(
        model, tmp_path, max_batch_size=2, time_slice_tokens=3, enable_prefix_cache=has_cache
    )
    oracle = Oracle(table)
    prompts = [text_ids(model, 5 + 7 * number, start=number % 3) for number in range(12)]
    priorities = [number % 3 for number in range(12)]

    async def one(core: EngineCore, number: int) -> OutputDelta:
        await asyncio.sleep(0.01 * (number // 3))  # the later ones matter more
        params = mixed_params(number)
        return await ask(core, prompts[number], params, priority=priorities[number])

    async with opened(table) as core:
        answers = await asyncio.gather(*(one(core, number) for number in range(12)))
        stats = core.snapshot().cache
    assert stats.num_preemptions > 12
    assert stats.num_loads > 12
    roomy = real_table(model, tmp_path, max_batch_size=12, enable_prefix_cache=has_cache)
    async with opened(roomy) as core:
        through = await asyncio.gather(*(one(core, number) for number in range(12)))
        assert core.snapshot().cache.num_preemptions == 0
    for number in range(12):
        for answer in (answers[number], through[number]):
            oracle.check(answer, prompts[number], mixed_params(number))
        if model in EXACT:
            assert answers[number].token_ids == through[number].token_ids


@pytest.mark.parametrize("model", MODELS)
async def test_a_full_batch_answers_as_each_request_alone(model: str, tmp_path: Path) -> None:
    table = real_table(
        model, tmp_path, max_batch_size=8, max_batch_tokens=400, enable_prefix_cache=False
    )
    prompts = [text_ids(model, 3 + 9 * number, start=number) for number in range(8)]
    several = [mixed_params(number) for number in range(8)]
    oracle, recorder = Oracle(table), Recorder()
    async with opened(table, recorder) as core:
        together = await asyncio.gather(*map(lambda *a: ask(core, *a), prompts, several))
        assert max(step.num_decode_rows for step in recorder.steps) == 8
        alone = [await ask(core, *pair) for pair in zip(prompts, several, strict=True)]
    for prompt, params, *answers in zip(prompts, several, together, alone, strict=True):
        for answer in answers:
            oracle.check(answer, prompt, params)
        if model in EXACT:
            assert answers[0].token_ids == answers[1].token_ids


class SlotRecorder(ModelRunner):
    """Remembers in which slots states were written."""

    slots: list[int]

    def submit(self, plan: StepPlan) -> None:
        self.slots += [row.dst.slot for row in plan.rows if row.num_tokens > 0]
        super().submit(plan)


@pytest.mark.parametrize("model", ["embedded-float64", "embedded-float32"])
async def test_every_slot_gives_the_same_answer_to_the_last_bit(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine.engine, "ModelRunner", SlotRecorder)
    table = real_table(model, tmp_path, num_state_slots=6, enable_prefix_cache=False)
    oracle, prompt, answers = Oracle(table), text_ids(model, 30), []
    async with opened(table) as core:
        runner, pool = core._pipeline._runner, core._scheduler.cache.pool
        assert isinstance(runner, SlotRecorder)
        for slot in range(1, 7):
            runner.slots = []
            pool._free.remove(slot)
            pool._free.append(slot)  # the next to be taken
            answers.append(await ask(core, prompt, SAMPLED))
            assert set(runner.slots) == {slot}
    oracle.check(answers[0], prompt, SAMPLED)
    assert len({(answer.token_ids, answer.logprobs) for answer in answers}) == 1
