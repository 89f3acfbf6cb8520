"""Reuse of states on a real model in float64: what is taken from a snapshot changes no token."""

from __future__ import annotations

import asyncio
import random
from dataclasses import replace
from pathlib import Path

import pytest

from engine.engine import Engine, build, seed_of
from engine.state.layout import PageLayout
from engine.tokenizer import Tokenizer
from engine.types import EngineRequest, OutputDelta, SamplingParams
from tests.engine.test_engine import plain, random_request, table, vocab

__all__ = ["vocab"]  # a fixture

PARAMS = SamplingParams(temperature=0.8, seed=5, max_tokens=20, stop_token_ids=())


async def answer(
    engine: Engine, prompt: list[int], params: SamplingParams = PARAMS, salt: str = ""
) -> OutputDelta:
    request = EngineRequest(
        request_id=f"{random.random()}",
        prompt_ids=tuple(prompt),
        sampling=params,
        cache_salt=salt,
    )
    return await engine.core.submit(request).collect()


def text_ids(seed: int, num_tokens: int) -> list[int]:
    rng = random.Random(seed)
    return [0, *(rng.randint(1, 256) for _ in range(num_tokens - 1))]


async def test_what_is_cached_equals_what_is_computed(vocab: Path) -> None:
    """Prompts that share beginnings of many lengths, twice, many at once, in few slots."""
    rng = random.Random(9)
    base = text_ids(1, 150)
    requests = []
    for _ in range(30):
        prompt, params = random_request(rng)
        requests.append((base[: rng.choice([0, 40, 100, 150])] + prompt, params))
    async with Engine(build(table(vocab, num_state_slots=7))) as engine:
        deltas = await asyncio.gather(*(answer(engine, *request) for request in requests * 2))
        stats = engine.core.snapshot().cache
    assert stats.num_hit_tokens == sum(delta.num_cached_tokens for delta in deltas) > 2000
    assert stats.num_evictions + stats.num_stores > 20  # which of them depends on time
    expected = [plain(*request) for request in requests]
    assert [list(delta.token_ids) for delta in deltas] == expected * 2


async def test_every_further_turn_of_a_chat_begins_from_what_was_generated(vocab: Path) -> None:
    async with Engine(build(table(vocab))) as engine:
        prompt = text_ids(2, 13)
        for turn in range(5):
            num_known = len(prompt) - 5 if turn else 0  # the turn before, its last token not fed
            delta = await answer(engine, prompt)
            assert list(delta.token_ids) == plain(prompt, PARAMS)
            expected = 8 * ((num_known - 1) // 8) if turn else 0
            assert delta.num_cached_tokens == expected
            prompt = [*prompt, *delta.token_ids, *text_ids(turn, 5)]


async def test_an_equal_prompt_computes_nothing_and_a_longer_one_the_rest(vocab: Path) -> None:
    params = replace(PARAMS, max_tokens=1)
    async with Engine(build(table(vocab))) as engine:
        cached = [
            (await answer(engine, text_ids(3, length), params)).num_cached_tokens
            for length in (24, 24, 25, 25, 8, 9)
        ]
    assert cached == [0, 24, 24, 25, 0, 8]


async def test_tenants_share_nothing(vocab: Path) -> None:
    async with Engine(build(table(vocab))) as engine:
        cached = [
            (await answer(engine, text_ids(4, 30), PARAMS, salt)).num_cached_tokens
            for salt in ("a", "b", "a", "")
        ]
    assert cached == [0, 0, 30, 0]


async def test_without_a_prefix_cache_nothing_is_reused(vocab: Path) -> None:
    async with Engine(build(table(vocab, enable_prefix_cache=False))) as engine:
        assert engine.core.info.num_slots == 3
        first, again = [await answer(engine, text_ids(5, 30)) for _ in range(2)]
    assert first.token_ids == again.token_ids
    assert first.num_cached_tokens == again.num_cached_tokens == 0


@pytest.mark.parametrize("changed", ["model", "layout", "tokenizer"])
def test_a_seed_depends_on_weights_layout_and_tokenizer(
    changed: str, vocab: Path, tmp_path: Path
) -> None:
    layout = PageLayout(
        num_cells=2,
        num_heads=2,
        head_size=16,
        vocab_size=300,
        wkv_dtype="float32",
        shift_dtype="float32",
    )
    other = tmp_path / "other.txt"
    other.write_text(vocab.read_text() + "257 'ab' 2\n")
    before = seed_of("0123", layout, Tokenizer.load(vocab))
    after = seed_of(
        "0124" if changed == "model" else "0123",
        replace(layout, wkv_dtype="float64") if changed == "layout" else layout,
        Tokenizer.load(other if changed == "tokenizer" else vocab),
    )
    assert before != after
    assert before == seed_of("0123", layout, Tokenizer.load(vocab))
