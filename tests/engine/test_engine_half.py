"""States stored in float16: where one has been adds nothing to what rounding it once cost.

The model computes in float64, so that rounding is all that could differ; prompts are cut on the
paragraph grid, since a step has room for one paragraph.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load

from engine.client import merge
from engine.core import EngineCore
from engine.engine import build
from engine.errors import StateMismatch, StateNotFound
from engine.model.rwkv7 import RWKV7, Batch, State
from engine.model.weights import dummy_model
from engine.sampler import Sampler
from engine.types import FinishReason, OutputDelta, SamplingParams, StateOptions
from tests.engine.real_engines import ask, request
from tests.engine.test_engine import CFG, table, vocab

__all__ = ["vocab"]  # a fixture

PARAGRAPH, BATCH = 8, 3
KEPT = StateOptions(label="kept", is_pinned=True)
EMPTY = SamplingParams(max_tokens=0, stop_token_ids=())


def params(number: int) -> SamplingParams:
    return SamplingParams(
        temperature=(0.0, 0.8, 1.3)[number % 3], seed=number, max_tokens=12 + number % 5,
        presence_penalty=0.3, penalty_decay=0.98, stop_token_ids=(), has_logprobs=True,
    )  # fmt: skip


def text_ids(seed: int, num_tokens: int) -> list[int]:
    rng = random.Random(seed)
    return [0, *(rng.randint(1, 256) for _ in range(num_tokens - 1))]


@asynccontextmanager
async def opened(vocab: Path, **keys: object) -> AsyncIterator[EngineCore]:
    defaults: dict[str, object] = dict(
        state_dtype="float16", paragraph_len=PARAGRAPH, max_batch_size=BATCH,
        max_batch_tokens=PARAGRAPH + BATCH, host_state_mib=16,
    )  # fmt: skip
    core = build(table(vocab, **(defaults | keys)))
    core.start()
    try:
        yield core
        core._scheduler.check()
    finally:
        await core.close()


@cache
def model() -> RWKV7:
    return dummy_model(CFG, "cpu", torch.float64)


def plain(
    prompt: list[int],
    sampling: SamplingParams,
    *parts: list[int],
    wkv_dtype: torch.dtype = torch.float16,
) -> tuple[list[int], list[float]]:
    """Tokens and log probabilities by the model alone, paragraph by paragraph, then token by token.

    `parts` follow the prompt, each in one piece.
    """
    state, slot = model().new_state(1, "cpu"), torch.tensor([0])
    state = State(wkv=state.wkv.to(wkv_dtype), shift=state.shift)
    sampler = Sampler(1, list(range(257, 300)), torch.device("cpu"))
    sampler.start(0, sampling)
    tokens, logprobs = list[int](), list[float]()
    num_fed = len(prompt) + sum(map(len, parts))
    paragraphs = [prompt[i : i + PARAGRAPH] for i in range(0, len(prompt), PARAGRAPH)]
    with torch.inference_mode():
        for piece in [*paragraphs, *parts]:
            hidden = model()(torch.tensor(piece), Batch((len(piece),), slot, slot), state)[-1:]
        while len(tokens) < sampling.max_tokens:
            draws = sampler.sample(model().head(hidden), [0], [num_fed + len(tokens)])
            tokens += draws.tokens
            logprobs += draws.logprobs
            hidden = model()(torch.tensor(draws.tokens), Batch((1,), slot, slot), state)
    return tokens, logprobs


def check(answer: OutputDelta, expected: tuple[list[int], list[float]]) -> None:
    assert answer.error is None
    assert list(answer.token_ids) == expected[0]
    assert list(answer.logprobs) == pytest.approx(expected[1], abs=1e-10)


def test_rounding_is_seen_by_these_tests() -> None:
    rounded, exact = (
        plain(text_ids(1, 40), params(0), wkv_dtype=dtype)
        for dtype in (torch.float16, torch.float64)
    )
    assert rounded[1] != pytest.approx(exact[1], abs=1e-8)
    assert rounded[1] == pytest.approx(exact[1], abs=1e-2)


async def test_what_is_cached_equals_what_is_computed(vocab: Path) -> None:
    base = text_ids(2, 32)
    prompts = [base[:keep] + text_ids(keep, 14)[1:] for keep in (8, 16, 24, 32)]
    prompts += [base, base[:16]]
    async with opened(vocab, num_state_slots=9) as core:
        assert core.info.state_dtype == "float16"
        together = [ask(core, prompt, params(i)) for i, prompt in enumerate(prompts)]
        answers = await asyncio.gather(*together)
        answers += [await ask(core, prompt, params(i)) for i, prompt in enumerate(prompts)]
        stats = core.snapshot().cache
    expected = [plain(prompt, params(i)) for i, prompt in enumerate(prompts)]
    for answer, right in zip(answers, expected * 2, strict=True):
        check(answer, right)
    assert stats.num_hit_tokens == sum(answer.num_cached_tokens for answer in answers) > 150


@pytest.mark.parametrize("enable_prefix_cache", [True, False])
async def test_preempted_answers_go_on_with_the_same_tokens(
    vocab: Path, enable_prefix_cache: bool
) -> None:
    prompts = [text_ids(i, 12 + i % 4 + 8 * (i % 2)) for i in range(7)]
    keys = dict(time_slice_tokens=3, enable_prefix_cache=enable_prefix_cache)
    async with opened(vocab, **keys) as core:
        together = [ask(core, prompt, params(i)) for i, prompt in enumerate(prompts)]
        answers = await asyncio.gather(*together)
        stats = core.snapshot().cache
    assert stats.num_preemptions > 7
    assert stats.num_loads > 7
    for i, (answer, prompt) in enumerate(zip(answers, prompts, strict=True)):
        check(answer, plain(prompt, params(i)))


async def test_forks_of_a_state_and_its_file_in_another_engine_go_on_alike(vocab: Path) -> None:
    prompt, more = text_ids(5, 29), [7, 8, 9]
    ways = [([], params(0)), ([], params(1)), (more, params(2)), (more, params(3))]

    async def go_on(core: EngineCore, ids: list[str]) -> None:
        answers = await asyncio.gather(
            *(
                ask(core, rest, way, state_id=ids[i % len(ids)])
                for i, (rest, way) in enumerate(ways)
            )
        )
        for answer, (rest, way) in zip(answers, ways, strict=True):
            check(answer, plain(prompt, way, *([rest] if rest else [])))

    async with opened(vocab) as core:
        state = (await ask(core, prompt, EMPTY, keep_state=KEPT)).state
        assert state is not None
        fork = core.states.fork("me", state.state_id, KEPT)
        await go_on(core, [state.state_id, fork.state_id])
        data = await core.states.export_file("me", fork.state_id)
    tensors = load(data)
    assert (tensors["wkv"].dtype, tensors["shift"].dtype) == (torch.float16, torch.float64)
    async with opened(vocab) as core:
        imported = await core.states.import_file("me", data, KEPT)
        await go_on(core, [imported.state_id])


@pytest.mark.parametrize(("made_in", "wanted"), [("float16", "float32"), ("auto", "float16")])
async def test_a_file_of_another_state_dtype_is_refused_by_name(
    vocab: Path, made_in: str, wanted: str
) -> None:
    async with opened(vocab, state_dtype=made_in) as core:
        state = (await ask(core, text_ids(6, 12), EMPTY, keep_state=KEPT)).state
        assert state is not None
        data = await core.states.export_file("me", state.state_id)
    found = "float64" if made_in == "auto" else made_in
    message = f"wkv_dtype: expected '{wanted}', found '{found}'.*in the dtype and state_dtype"
    async with opened(vocab, state_dtype=wanted) as core:
        with pytest.raises(StateMismatch, match=message):
            await core.states.import_file("me", data, KEPT)
        assert core.states.list("me") == []


async def test_states_and_snapshots_on_disk_go_on_after_a_restart_in_their_own_type(
    vocab: Path, tmp_path: Path
) -> None:
    prompt = text_ids(7, 29)
    async with opened(vocab, state_dir=tmp_path) as core:
        state = (await ask(core, prompt, EMPTY, keep_state=KEPT)).state
        assert state is not None
        check(await ask(core, prompt, params(0)), plain(prompt, params(0)))
    async with opened(vocab, state_dir=tmp_path, state_dtype="auto") as core:
        with pytest.raises(StateNotFound):
            await ask(core, [], params(1), state_id=state.state_id)
        other = await ask(core, prompt, params(1))
        assert other.num_cached_tokens == 0
        check(other, plain(prompt, params(1), wkv_dtype=torch.float64))
    async with opened(vocab, state_dir=tmp_path) as core:
        check(await ask(core, [], params(1), state_id=state.state_id), plain(prompt, params(1)))
        cached = await ask(core, prompt, params(2))
        assert cached.num_cached_tokens >= 24
        check(cached, plain(prompt, params(2)))


async def test_a_suspended_answer_goes_on_after_a_restart(vocab: Path, tmp_path: Path) -> None:
    prompt, sampling = text_ids(8, 29), replace(params(1), max_tokens=150)
    async with opened(vocab, state_dir=tmp_path) as core:
        stream = core.submit(request(prompt, sampling, is_resumable=True))
        first = await anext(aiter(stream))
        assert await core.drain(30.0, suspends=True)
        before = merge(first, await stream.collect())
    assert before.finish_reason is FinishReason.SUSPENDED
    assert before.resume_id is not None
    assert 0 < before.num_output_tokens < 150
    async with opened(vocab, state_dir=tmp_path) as core:
        after = await core.resume(before.resume_id, "me", "again").collect()
    check(merge(before, after), plain(prompt, sampling))
