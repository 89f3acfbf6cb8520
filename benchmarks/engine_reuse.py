"""Time to first token with and without reuse of states, in one process, without HTTP.

Shared system prompt: users who arrive one after the other, each with the same N tokens and an
own question; the first two are not counted, since the second shows where prompts part. Chat:
ten turns, each prompt being all that was said. A case runs on one engine straight after the same
case on the other, with the same weights, so that the ratio holds on a machine whose speed drifts.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from benchmarks.words import BEGIN_OF_DOCUMENT, Words
from config import ModelTable
from engine.engine import Engine, build
from engine.types import SamplingParams

QUESTION_LEN, ANSWER_LEN, NUM_TURNS, NUM_USERS = 32, 32, 10, 5
NUM_FIRST_USERS = 2  # not counted


@dataclass(frozen=True, slots=True)
class Answer:
    token_ids: tuple[int, ...]
    num_cached_tokens: int
    time_to_first_token_s: float


async def measure(
    table: ModelTable, words: Words, system_lens: Sequence[int], chat_lens: Sequence[int]
) -> dict[str, object]:
    """Medians by case. The engines keep nothing on disk."""
    with_reuse = replace(table, enable_prefix_cache=True, state_dir=None)
    without = replace(with_reuse, enable_prefix_cache=False)
    figures: dict[str, object] = {}
    print(f"\n{'time to first token, ms':28}{'without':>12}{'with':>12}{'ratio':>8}{'cached':>10}")
    async with Engine(build(with_reuse)) as cached, Engine(build(without)) as plain:
        engines = (cached, plain)
        for length in system_lens:
            name = f"system prompt, {length}"
            pair = [await _shared_system_prompt(engine, words, length) for engine in engines]
            figures[name] = _report(name, pair[0], pair[1])
        for length in chat_lens:
            pair = [await _chat(engine, words, length) for engine in engines]
            for turn in (2, NUM_TURNS):
                name = f"chat behind {length}, turn {turn}"
                figures[name] = _report(name, pair[0][turn - 1 : turn], pair[1][turn - 1 : turn])
    return figures


async def _ask(engine: Engine, prompt: Sequence[int], num_tokens: int) -> Answer:
    params = SamplingParams(temperature=0.0, max_tokens=num_tokens, stop_token_ids=())
    started = time.perf_counter()
    first_s, ids, num_cached = None, list[int](), 0
    async for delta in engine.generate(prompt, params):
        first_s = first_s or time.perf_counter() - started
        ids += delta.token_ids
        num_cached = delta.num_cached_tokens
    assert first_s is not None, "an answer has at least one delta"
    return Answer(tuple(ids), num_cached, first_s)


async def _shared_system_prompt(engine: Engine, words: Words, num_tokens: int) -> list[Answer]:
    """The answers to the users who are counted."""
    system = words.ids(f"system {num_tokens}", num_tokens)
    answers = []
    for user in range(NUM_USERS + NUM_FIRST_USERS):
        question = words.ids(f"user {user} behind {num_tokens}", QUESTION_LEN)
        # One token, so that its text, and with it the first delta, is there when it is drawn.
        answers.append(await _ask(engine, [BEGIN_OF_DOCUMENT, *system, *question], 1))
    return answers[NUM_FIRST_USERS:]


async def _chat(engine: Engine, words: Words, num_tokens: int) -> list[Answer]:
    """The answers of ten turns behind a system prompt; the time is that of a first token alone."""
    prompt, answers = words.document(f"chat behind {num_tokens}", num_tokens + 1), []
    for turn in range(NUM_TURNS):
        prompt += words.ids(f"turn {turn} of {num_tokens}", QUESTION_LEN)
        first = await _ask(engine, prompt, 1)
        said = await _ask(engine, prompt, ANSWER_LEN)
        answers.append(first)
        prompt += said.token_ids
    return answers


def _report(name: str, cached: list[Answer], plain: list[Answer]) -> dict[str, object]:
    """Print one line and give it as figures.

    Answers that differ are counted, not refused: other chunks of a prompt round differently, and
    in a small format that may turn a draw.
    """
    pairs = zip(cached, plain, strict=True)
    num_different = sum(one.token_ids != other.token_ids for one, other in pairs)
    with_s = statistics.median(one.time_to_first_token_s for one in cached)
    without_s = statistics.median(one.time_to_first_token_s for one in plain)
    num_cached = statistics.median(one.num_cached_tokens for one in cached)
    print(
        f"{name:28}{without_s * 1e3:12.1f}{with_s * 1e3:12.1f}{without_s / with_s:8.1f}"
        f"{num_cached:10.0f}"
    )
    return {
        "without_reuse_s": round(without_s, 5),
        "with_reuse_s": round(with_s, 5),
        "ratio": round(without_s / with_s, 2),
        "median_cached_tokens": num_cached,
        "num_different_answers": num_different,
    }
