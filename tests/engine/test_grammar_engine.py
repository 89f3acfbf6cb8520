"""Grammars in a whole engine with the embedded model: any schedule, the same valid answers."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from pathlib import Path

import jsonschema
import pytest

from engine.client import Resumed
from engine.core import EngineCore
from engine.errors import InvalidRequest
from engine.grammar_text import choice, json_schema, regex
from engine.limits import limits_of
from engine.types import FinishReason, SamplingParams
from tests.engine.real_engines import ask, opened, real_table, request, text_ids

MODEL = "embedded-float64"
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["cat", "dog", "bird"]}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
PERSON = SamplingParams(grammar=json_schema(SCHEMA), max_tokens=400, penalty_decay=0.99)
PROMPT = text_ids(MODEL, 23)


def assert_is_person(text: str) -> None:
    jsonschema.validate(json.loads(text), SCHEMA)


async def test_answers_of_many_seeds_are_valid_and_end_by_themselves(tmp_path: Path) -> None:
    params = [replace(PERSON, seed=seed, presence_penalty=0.2 * (seed % 3)) for seed in range(24)]
    async with opened(real_table(MODEL, tmp_path, max_batch_size=8)) as core:
        await core.prepare(PERSON.grammar or "")
        answers = await asyncio.gather(*(ask(core, PROMPT, one) for one in params))
        alone = [await ask(core, PROMPT, one) for one in params[:3]]
    for answer in answers:
        assert answer.finish_reason is FinishReason.STOP, answer
        assert answer.token_ids[-1] == 0
        assert_is_person(answer.text)
    assert len({answer.text for answer in answers}) > 20
    assert [one.token_ids for one in alone] == [one.token_ids for one in answers[:3]]


async def test_rows_with_and_without_grammars_share_steps(tmp_path: Path) -> None:
    free = SamplingParams(seed=1, max_tokens=30, stop_token_ids=())
    async with opened(real_table(MODEL, tmp_path)) as core:
        lonely = await ask(core, PROMPT, free)
        one, other, freely = await asyncio.gather(
            ask(core, PROMPT, replace(free, grammar=regex("[ab]{9}"), stop_token_ids=(0,))),
            ask(core, PROMPT, replace(PERSON, temperature=0.0, seed=9)),
            ask(core, PROMPT, free),
        )
    assert len(one.text) == 9
    assert set(one.text) <= {"a", "b"}
    assert_is_person(other.text)
    assert freely.token_ids == lonely.token_ids


async def test_answer_that_gave_way_again_and_again_is_the_same(tmp_path: Path) -> None:
    """The matcher is made anew from the tokens each time it takes a seat."""
    params = [replace(PERSON, seed=seed, presence_penalty=0.3) for seed in range(3)]
    async with opened(real_table(MODEL, tmp_path)) as core:
        alone = [await ask(core, PROMPT, one) for one in params]
    table = real_table(MODEL, tmp_path, max_batch_size=1, time_slice_tokens=5)
    async with opened(table) as core:
        taken = await asyncio.gather(*(ask(core, PROMPT, one) for one in params))
        num_preemptions = core.snapshot().cache.num_preemptions
    assert num_preemptions > 5
    assert [one.token_ids for one in taken] == [one.token_ids for one in alone]


async def test_suspended_answer_goes_on_in_its_grammar(tmp_path: Path) -> None:
    """By an engine that has never seen it."""
    table = real_table(MODEL, tmp_path, state_dir=tmp_path / "states")
    params = replace(PERSON, seed=3)
    async with opened(table) as core:
        whole = await ask(core, PROMPT, params)
    async with opened(table) as core:
        stream = core.submit(request(PROMPT, params, is_resumable=True, memo="a note"))
        first = await anext(stream)
        await core.drain(10, suspends=True)
        rest = await stream.collect()
    assert rest.finish_reason is FinishReason.SUSPENDED
    async with opened(table) as core:
        resumed = core.resume(rest.resume_id or "", "me", "again")
        assert resumed.resumed == Resumed("a note", first.text + rest.text)
        end = await resumed.collect()
    assert end.finish_reason is FinishReason.STOP
    assert first.text + rest.text + end.text == whole.text


async def test_cut_answer_is_the_beginning_of_the_whole_one(tmp_path: Path) -> None:
    params = replace(PERSON, seed=3)
    async with opened(real_table(MODEL, tmp_path)) as core:
        whole = await ask(core, PROMPT, params)
        cut = await ask(core, PROMPT, replace(params, max_tokens=7))
    assert cut.finish_reason is FinishReason.LENGTH
    assert cut.token_ids == whole.token_ids[:7]


async def test_nothing_left_to_draw_fails_that_request_only(tmp_path: Path) -> None:
    async with opened(real_table(MODEL, tmp_path)) as core:
        tokenizer = core.tokenizer
        y_ids = [i for i in range(1, tokenizer.vocab_size) if b"y" in tokenizer.token_bytes(i)]
        stuck = replace(PERSON, grammar=choice(["xy"]), banned_token_ids=tuple(y_ids))
        failed, other = await asyncio.gather(
            ask(core, PROMPT, stuck), ask(core, PROMPT, replace(PERSON, seed=1))
        )
    assert failed.finish_reason is FinishReason.ERROR
    assert "leave no token to go on with" in (failed.error or "")
    assert_is_person(other.text)


@pytest.mark.parametrize(
    ("params", "field", "reason"),
    [
        (replace(PERSON, grammar=regex("(")), "grammar", "unclosed"),
        (replace(PERSON, stop_token_ids=(5,)), "stop_token_ids", "token 0"),
        (replace(PERSON, min_tokens=3), "min_tokens", "where the text may end"),
    ],
)
async def test_what_cannot_be_followed_is_refused_at_once(
    tmp_path: Path, params: SamplingParams, field: str, reason: str
) -> None:
    async with opened(real_table(MODEL, tmp_path)) as core:
        with pytest.raises(InvalidRequest, match=reason) as caught:
            core.submit(request(PROMPT, params))
        assert core.snapshot().num_waiting == 0
    assert caught.value.field == field


async def test_engine_without_a_compiler_says_so(tmp_path: Path) -> None:
    async with opened(real_table(MODEL, tmp_path)) as core:
        bare = EngineCore(core.info, core.tokenizer, core._pipeline._runner, limits_of(
            real_table(MODEL, tmp_path)))  # fmt: skip
        with pytest.raises(InvalidRequest, match="follows no grammars"):
            await bare.prepare(PERSON.grammar or "")
        with pytest.raises(InvalidRequest, match="follows no grammars"):
            bare.submit(request(PROMPT, PERSON))
