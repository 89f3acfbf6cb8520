"""Whole engines on trained weights: log probabilities and rules, whatever befalls a request.

The model alone says what they must be, in float64 to 1e-10 and in float32 to 1e-4.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from msgspec import structs

from engine.core import EngineCore
from engine.types import EngineRequest, FinishReason, OutputDelta, SamplingParams, StateOptions
from tests.engine.real_engines import (
    PARAGRAPH,
    SAMPLED,
    Oracle,
    ask,
    opened,
    real_table,
    request,
    text_ids,
)

MODELS = ["embedded-float64", "embedded-float32"]
TOLERANCES = {"embedded-float64": 1e-10, "embedded-float32": 1e-4}
EXACT = "embedded-float64"
NONE = SamplingParams(temperature=0.0, max_tokens=0, num_top_logprobs=2, candidate_token_ids=(9,))


def check_prompt(
    oracle: Oracle,
    answer: OutputDelta,
    prompt: Sequence[int],
    scores_from: int,
    tolerance: float,
    params: SamplingParams = NONE,
) -> None:
    assert answer.error is None, answer.error
    first = max(scores_from, 1)
    assert len(answer.prompt_logprobs) == len(answer.prompt_tops) == max(len(prompt) - first, 0)
    logprobs_TV = oracle.logits(prompt).log_softmax(-1)
    told = zip(answer.prompt_logprobs, answer.prompt_tops, strict=True)
    for place, (logprob, top) in enumerate(told, start=first):
        expected_V = logprobs_TV[place - 1]
        assert abs(logprob - float(expected_V[prompt[place]])) <= tolerance
        for token, value in top:
            assert abs(value - float(expected_V[token])) <= tolerance
        best = expected_V.topk(params.num_top_logprobs).values.tolist()
        values = [value for _, value in top[: params.num_top_logprobs]]
        assert values == pytest.approx(best, abs=tolerance, rel=0)


@pytest.mark.parametrize("model", MODELS)
async def test_scores_of_prompts_are_those_of_the_model_however_they_are_cut(
    model: str, tmp_path: Path
) -> None:
    """Cold, beside others, after the same prompt left snapshots, and from any token on."""
    table = real_table(model, tmp_path, max_batch_tokens=4 + PARAGRAPH)
    oracle, tolerance = Oracle(table), TOLERANCES[model]
    prompts = [text_ids(model, length, start=length) for length in (1, 2, 16, 17, 50, 101)]
    async with opened(table) as core:
        for scores_from in (0, 16, 17, 49):
            asked = [(prompt, min(scores_from, len(prompt))) for prompt in prompts]
            answers = await asyncio.gather(
                *(ask(core, prompt, NONE, scores_from=first) for prompt, first in asked),
                ask(core, prompts[3], replace(SAMPLED, max_tokens=5)),
            )
            for (prompt, first), answer in zip(asked, answers, strict=False):
                check_prompt(oracle, answer, prompt, first, tolerance)
                assert answer.finish_reason is FinishReason.LENGTH
                assert answer.token_ids == ()
                assert answer.num_cached_tokens <= max(first - 1, 0) or not answer.prompt_logprobs


@pytest.mark.parametrize(("scores_from", "num_cached"), [(80, 0), (81, 80), (97, 96), (99, 96)])
async def test_a_scored_prompt_begins_from_the_deepest_state_that_it_may(
    tmp_path: Path, scores_from: int, num_cached: int
) -> None:
    """There are states after 80, 96 and 100 tokens; that after 80 says how probable token 80 is
    only to who computes token 79 again."""
    table = real_table(EXACT, tmp_path)
    prompt = text_ids(EXACT, 100)
    async with opened(table) as core:
        await ask(core, prompt, NONE, snapshot_hints=(80,))
        answer = await ask(core, prompt, NONE, scores_from=scores_from)
    assert answer.num_cached_tokens == num_cached
    check_prompt(Oracle(table), answer, prompt, scores_from, 1e-10)


async def test_a_scored_prompt_leaves_snapshots_for_others(tmp_path: Path) -> None:
    prompt = text_ids(EXACT, 60)
    async with opened(real_table(EXACT, tmp_path)) as core:
        await ask(core, prompt, NONE, scores_from=0)
        after = await ask(core, prompt, replace(SAMPLED, max_tokens=1))
        assert after.num_cached_tokens == len(prompt)


async def test_a_prompt_alone_is_computed_for_those_who_come_after(tmp_path: Path) -> None:
    """max_tokens = 0, without a state to keep and without host memory."""
    table = real_table(EXACT, tmp_path, host_state_mib=0)
    prompt = text_ids(EXACT, 40)
    async with opened(table) as core:
        first = await ask(core, prompt, replace(NONE, num_top_logprobs=0))
        assert (first.finish_reason, first.num_output_tokens) == (FinishReason.LENGTH, 0)
        assert (await ask(core, prompt, NONE)).num_cached_tokens == len(prompt)


async def test_scores_come_before_the_tokens_and_together(tmp_path: Path) -> None:
    table = real_table(EXACT, tmp_path, max_batch_tokens=4 + PARAGRAPH)
    prompt = text_ids(EXACT, 90)
    async with opened(table) as core:
        params = replace(SAMPLED, num_top_logprobs=2, max_tokens=6)
        stream = core.submit(request(prompt, params, scores_from=0))
        deltas = [delta async for delta in stream]
    assert len(deltas[0].prompt_logprobs) == 89
    assert not any(delta.prompt_logprobs for delta in deltas[1:])
    assert sum(len(delta.token_ids) for delta in deltas) == 6
    for delta in deltas:
        assert len(delta.logprobs) == len(delta.tops) == len(delta.token_ids)


async def test_scores_go_on_from_a_kept_state(tmp_path: Path) -> None:
    table = real_table(EXACT, tmp_path)
    text, prompt = text_ids(EXACT, 37), text_ids(EXACT, 50, start=40)[1:]
    async with opened(table) as core:
        keep = replace(NONE, num_top_logprobs=0, candidate_token_ids=())
        kept = await ask(core, text, keep, keep_state=StateOptions())
        assert kept.state is not None
        answer = await ask(core, prompt, NONE, state_id=kept.state.state_id, scores_from=0)
    whole = [*text, *prompt]
    expected = Oracle(table).logits(whole).log_softmax(-1)
    first = len(text) + 1
    for place, value in enumerate(answer.prompt_logprobs, start=first):
        assert abs(value - float(expected[place - 1][whole[place]])) < 1e-10
    assert len(answer.prompt_logprobs) == len(prompt) - 1


# What follows has rules that depend on the past of a request.


def ruled(core: EngineCore, seed: int) -> SamplingParams:
    """Words that the small model likes to say are bad; short ones, of several tokens too."""
    eos = (0,)
    return replace(
        SAMPLED, seed=seed, temperature=0.9, num_top_logprobs=3, candidate_token_ids=(5, 7),
        stop_token_ids=eos, min_tokens=30, max_tokens=60,
        bad_words=("the", "a", "to", "was", "and", "he", "it", "."),
        logit_bias=((0, 4.0), (32, -1.5)),
    )  # fmt: skip


def assert_same(answer: OutputDelta, expected: OutputDelta) -> None:
    assert answer.error is None, answer.error
    assert answer.token_ids == expected.token_ids
    assert answer.text == expected.text
    assert answer.logprobs == pytest.approx(expected.logprobs, abs=1e-10, rel=0)
    assert [[token for token, _ in top] for top in answer.tops] == [
        [token for token, _ in top] for top in expected.tops
    ]
    values = [value for top in answer.tops for _, value in top]
    others = [value for top in expected.tops for _, value in top]
    assert values == pytest.approx(others, abs=1e-10, rel=0)
    assert answer.prompt_logprobs == pytest.approx(expected.prompt_logprobs, abs=1e-10, rel=0)
    assert len(answer.prompt_tops) == len(expected.prompt_tops)


def check_rules(oracle: Oracle, answer: OutputDelta, params: SamplingParams) -> None:
    """No word is spelt by whole tokens, and nothing ended it too early."""
    assert answer.num_output_tokens > params.min_tokens
    assert not spelt(oracle, answer, params)


def spelt(oracle: Oracle, answer: OutputDelta, params: SamplingParams) -> set[bytes]:
    """The bad words that are spelt by whole tokens."""
    pieces = [oracle._tokenizer.token_bytes(token) for token in answer.token_ids]
    bad = {text for word in params.bad_words for text in (word.encode(), b" " + word.encode())}
    runs = {
        b"".join(pieces[begin:end])
        for begin in range(len(pieces))
        for end in range(begin + 1, min(begin + max(map(len, bad)), len(pieces)) + 1)
    }
    return runs & bad


async def test_the_model_would_say_the_bad_words_and_end_early(tmp_path: Path) -> None:
    """Or the tests below would show nothing."""
    table = real_table(EXACT, tmp_path)
    async with opened(table) as core:
        rules = ruled(core, 0)
        free = replace(rules, bad_words=(), min_tokens=0, logit_bias=((0, 4.0),))
        said = [
            await ask(core, text_ids(EXACT, 200), replace(free, seed=seed)) for seed in range(4)
        ]
    assert any(spelt(Oracle(table), answer, rules) for answer in said)
    assert any(answer.num_output_tokens <= rules.min_tokens for answer in said)


async def alone(core: EngineCore, prompts: Sequence[Sequence[int]]) -> list[OutputDelta]:
    """Each by itself, undisturbed."""
    return [
        await ask(core, prompt, ruled(core, seed), scores_from=3)
        for seed, prompt in enumerate(prompts)
    ]


async def test_answers_that_give_way_keep_logprobs_and_rules(tmp_path: Path) -> None:
    prompts = [text_ids(EXACT, length, start=7 * length) for length in (20, 33, 48, 64, 75)]
    calm = real_table(EXACT, tmp_path)
    busy = real_table(
        EXACT, tmp_path, max_batch_size=2, max_batch_tokens=2 + PARAGRAPH, time_slice_tokens=5
    )
    async with opened(calm) as core:
        expected = await alone(core, prompts)
    async with opened(busy) as core:
        requests = [
            request(prompt, ruled(core, seed), scores_from=3) for seed, prompt in enumerate(prompts)
        ]
        answers = await asyncio.gather(*(core.submit(one).collect() for one in requests))
        assert core.snapshot().cache.num_preemptions >= 5
    oracle = Oracle(calm)
    for answer, other, prompt in zip(answers, expected, prompts, strict=True):
        assert_same(answer, other)
        check_rules(oracle, answer, requests[0].sampling)
        check_prompt(oracle, answer, prompt, 3, 1e-10, requests[0].sampling)


@pytest.mark.parametrize("num_tokens", [0, 1, 25, 31])
async def test_answers_that_are_suspended_keep_logprobs_and_rules(
    tmp_path: Path, num_tokens: int
) -> None:
    """Cut while it is computing its prompt, at its first token, and before and after min_tokens."""
    prompt = text_ids(EXACT, 200)
    table = real_table(
        EXACT, tmp_path, state_dir=tmp_path / "states", max_batch_tokens=4 + PARAGRAPH
    )
    async with opened(table) as core:
        (expected,) = await alone(core, [prompt])
        asked = request(
            prompt, ruled(core, 0), scores_from=3, is_resumable=True, cache_salt="another"
        )
        first = await suspended_after(core, asked, num_tokens)
    assert first.finish_reason is FinishReason.SUSPENDED
    assert first.resume_id is not None
    async with opened(table) as core:
        second = await core.resume(first.resume_id, "me", "again").collect()
    whole = structs.replace(
        second,
        text=first.text + second.text,
        token_ids=first.token_ids + second.token_ids,
        logprobs=first.logprobs + second.logprobs,
        tops=first.tops + second.tops,
        prompt_logprobs=first.prompt_logprobs + second.prompt_logprobs,
        prompt_tops=first.prompt_tops + second.prompt_tops,
    )
    assert_same(whole, expected)
    check_rules(Oracle(table), whole, asked.sampling)


async def suspended_after(core: EngineCore, asked: EngineRequest, num_tokens: int) -> OutputDelta:
    """Stop the engine in good order when so many tokens were read."""
    stream, parts = core.submit(asked), list[OutputDelta]()
    while sum(len(part.token_ids) for part in parts) < num_tokens:
        parts.append(await anext(stream))
    if not num_tokens:
        await asyncio.sleep(0.03)
    drained = asyncio.create_task(core.drain(20, suspends=True))
    parts += [part async for part in stream]
    assert await drained
    whole = parts[0]
    for part in parts[1:]:
        whole = structs.replace(
            part,
            text=whole.text + part.text,
            token_ids=whole.token_ids + part.token_ids,
            logprobs=whole.logprobs + part.logprobs,
            tops=whole.tops + part.tops,
            prompt_logprobs=whole.prompt_logprobs + part.prompt_logprobs,
            prompt_tops=whole.prompt_tops + part.prompt_tops,
        )
    return whole


async def test_copies_of_a_prompt_draw_under_rules_of_their_own(tmp_path: Path) -> None:
    prompt = text_ids(EXACT, 40)
    async with opened(real_table(EXACT, tmp_path)) as core:
        calm = [await ask(core, prompt, ruled(core, seed)) for seed in range(4)]
        together = await asyncio.gather(
            *(ask(core, prompt, ruled(core, seed), cache_salt="x") for seed in range(4))
        )
    for answer, other in zip(together, calm, strict=True):
        assert_same(answer, other)
