"""Time to first token with and without reuse of states, through the engine, without HTTP.

    python -m benchmarks.cache [--infer-cfg rwkv-lm-tiny] [--set key=value] [--save]

Shared system prompt: users who arrive one after the other, each with the same N tokens and an
own question; the first two are not counted, since the second shows where prompts part. Chat:
ten turns, each prompt being all that was said. Both engines run in one process with the same
weights, a case on one straight after the same case on the other, so that the ratio holds on a
machine whose speed drifts.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.record import finish
from config import load_infer
from engine.engine import Engine, build
from engine.types import SamplingParams

SYSTEM_LENS = (64, 128, 256, 512, 1024, 2048)
QUESTION_LEN, ANSWER_LEN, NUM_TURNS, NUM_USERS = 32, 32, 10, 5
NUM_FIRST_USERS = 2  # not counted


@dataclass(frozen=True, slots=True)
class Answer:
    token_ids: tuple[int, ...]
    num_cached_tokens: int
    time_to_first_token_s: float


def text(seed: int, num_tokens: int) -> list[int]:
    """Tokens that other seeds do not give; ids of single bytes, which every vocabulary has."""
    return [1 + (seed * 7919 + i * i * 31 + i * seed) % 256 for i in range(num_tokens)]


async def ask(engine: Engine, prompt: Sequence[int], num_tokens: int) -> Answer:
    params = SamplingParams(temperature=0.0, max_tokens=num_tokens, stop_token_ids=())
    started = time.perf_counter()
    first_s, ids, num_cached = None, list[int](), 0
    async for delta in engine.generate(prompt, params):
        first_s = first_s or time.perf_counter() - started
        ids += delta.token_ids
        num_cached = delta.num_cached_tokens
    assert first_s is not None, "an answer has at least one delta"
    return Answer(tuple(ids), num_cached, first_s)


async def shared_system_prompt(engine: Engine, num_tokens: int, seed: int) -> list[Answer]:
    """The answers to the users who are counted."""
    system = text(seed, num_tokens)
    answers = []
    for user in range(NUM_USERS + NUM_FIRST_USERS):
        question = text(1000 + seed * 100 + user, QUESTION_LEN)
        # One token, so that its text, and with it the first delta, is there when it is drawn.
        answers.append(await ask(engine, [0, *system, *question], 1))
    return answers[NUM_FIRST_USERS:]


async def chat(engine: Engine, num_tokens: int, seed: int) -> list[Answer]:
    """The answers of ten turns behind a system prompt; the time is that of a first token alone."""
    prompt, answers = [0, *text(seed, num_tokens)], []
    for turn in range(NUM_TURNS):
        prompt += text(5000 + seed * 100 + turn, QUESTION_LEN)
        first = await ask(engine, prompt, 1)
        said = await ask(engine, prompt, ANSWER_LEN)
        answers.append(first)
        prompt += said.token_ids
    return answers


def report(name: str, cached: list[Answer], plain: list[Answer]) -> dict[str, object]:
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
        "ratio": without_s / with_s,
        "median_cached_tokens": num_cached,
        "num_different_answers": num_different,
    }


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--config-dir", type=Path, default=Path("config"))
    parser.add_argument("--infer-cfg", default="rwkv-lm-tiny")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="sets")
    parser.add_argument("--system-lens", type=int, nargs="+", default=SYSTEM_LENS)
    parser.add_argument("--chat-lens", type=int, nargs="+", default=[0, 1024])
    parser.add_argument("--save", action="store_true", help="append to benchmarks/results/")
    args = parser.parse_args()

    sets = [*args.sets, "max_context_len=0"]
    configs = [
        load_infer(args.config_dir, args.infer_cfg, [*sets, f"enable_prefix_cache={value}"])
        for value in ("true", "false")
    ]
    table, plain_table = (cfg.models[0] for cfg in configs)
    rows: dict[str, object] = {
        "model": table.model_name,
        "paragraph_len": table.paragraph_len,
        "num_state_slots": table.resolved_num_state_slots,
    }
    print(f"{'time to first token, ms':28}{'without':>12}{'with':>12}{'ratio':>8}{'cached':>10}")
    async with Engine(build(table)) as cached, Engine(build(plain_table)) as plain:
        for seed, length in enumerate(args.system_lens, start=1):
            name = f"system prompt, {length}"
            pair = [await shared_system_prompt(engine, length, seed) for engine in (cached, plain)]
            rows[name] = report(name, pair[0], pair[1])
        for seed, length in enumerate(args.chat_lens, start=50):
            pair = [await chat(engine, length, seed) for engine in (cached, plain)]
            for turn in (2, NUM_TURNS):
                name = f"chat behind {length}, turn {turn}"
                rows[name] = report(name, pair[0][turn - 1 : turn], pair[1][turn - 1 : turn])
    finish("cache", rows, save=args.save)


if __name__ == "__main__":
    asyncio.run(main())
