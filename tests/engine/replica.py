"""Replica: an EngineCore over the hash model, with small helpers for async tests."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import cache
from pathlib import Path

from engine.client import RequestStream
from engine.core import EngineCore
from engine.plan import Runner
from engine.state.parts import StateParts
from engine.tokenizer import Tokenizer
from engine.types import (
    EngineRequest,
    FinishReason,
    LiveLimits,
    ModelInfo,
    OutputDelta,
    RequestStats,
    SamplingParams,
    StateOptions,
    StepStats,
)
from tests.hash_model import VOCAB_SIZE, HashRunner, oracle


class Recorder:
    """A StatsSink that keeps everything."""

    def __init__(self) -> None:
        self.steps: list[StepStats] = []
        self.requests: list[RequestStats] = []

    def on_step(self, stats: StepStats) -> None:
        self.steps.append(stats)

    def on_request(self, stats: RequestStats) -> None:
        self.requests.append(stats)


@cache
def hash_tokenizer() -> Tokenizer:
    """A text for each id of the hash model: all bytes, then words of several scripts."""
    words = [f"{sign}{i}" for i, sign in zip(range(257, VOCAB_SIZE), "aé語😀 " * 200, strict=False)]
    entries: list[bytes | str] = [bytes([byte]) for byte in range(256)]
    entries += words
    lines = [
        f"{i} {entry!r} {len(entry if isinstance(entry, bytes) else entry.encode())}"
        for i, entry in enumerate(entries, start=1)
    ]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "vocab.txt")
        path.write_text("\n".join(lines), encoding="utf-8")
        return Tokenizer.load(path)


def limits(
    *,
    decode_first: bool = True,
    max_batch_tokens: int = 32,
    max_waiting: int = 100,
    max_context_len: int = 0,
    time_slice_tokens: int = 0,
) -> LiveLimits:
    return LiveLimits(
        decode_first=decode_first,
        max_batch_tokens=max_batch_tokens,
        max_waiting=max_waiting,
        max_context_len=max_context_len,
        time_slice_tokens=time_slice_tokens,
    )


def make_core(
    runner: Runner,
    live: LiveLimits | None = None,
    *,
    stats: Recorder | None = None,
    num_slots: int = 4,
    max_batch_size: int = 4,
    depth: int = 2,
    num_frames: int = 0,
    num_files: int = 0,
    parts: StateParts | None = None,
) -> EngineCore:
    """Without `parts` nothing is reused."""
    live = live or limits()
    info = ModelInfo(
        model_name="hash",
        num_parameters=1,
        device="cpu",
        dtype="int",
        state_dtype="int",
        num_slots=num_slots,
        page_bytes=8,
        vocab_size=VOCAB_SIZE,
        fingerprint="0",
        max_batch_size=max_batch_size,
        max_batch_tokens=live.max_batch_tokens,
        paragraph_len=4,
        max_context_len=live.max_context_len,
        num_frames=num_frames,
        num_files=num_files,
    )
    return EngineCore(info, hash_tokenizer(), runner, live, stats, depth, parts)


@asynccontextmanager
async def running(core: EngineCore, *, dies: bool = False) -> AsyncIterator[EngineCore]:
    """Start and close an engine; it must (`dies`) or must not have died in between."""
    core.start()
    try:
        yield core
        assert core.snapshot().is_dead == dies, core._death
    finally:
        await core.close()


def ask(
    request_id: str = "r",
    prompt_ids: tuple[int, ...] = (5, 6, 7),
    *,
    max_tokens: int = 6,
    seed: int = 0,
    stop: tuple[str, ...] = (),
    stop_token_ids: tuple[int, ...] = (),
    priority: int = 0,
    timeout_s: float | None = None,
    cache_salt: str = "",
    owner: str = "",
    state_id: str | None = None,
    initial_state: str | None = None,
    keep_state: StateOptions | None = None,
    is_resumable: bool = False,
) -> EngineRequest:
    return EngineRequest(
        request_id=request_id,
        prompt_ids=prompt_ids,
        sampling=SamplingParams(
            max_tokens=max_tokens, seed=seed, stop=stop, stop_token_ids=stop_token_ids
        ),
        priority=priority,
        timeout_s=timeout_s,
        cache_salt=cache_salt,
        owner=owner,
        state_id=state_id,
        initial_state=initial_state,
        keep_state=keep_state,
        is_resumable=is_resumable,
    )


async def turn(times: int = 4) -> None:
    """Let the loop do what is due now."""
    for _ in range(times):
        await asyncio.sleep(0)


async def deliver_all(runner: HashRunner) -> None:
    """Run every plan, and those that follow from the results, until there are none."""
    await turn()
    while runner.plans:
        runner.deliver()
        await turn()


async def read_all(stream: RequestStream) -> OutputDelta:
    """The whole answer; fails instead of waiting for ever."""
    async with asyncio.timeout(20):
        return await stream.collect()


def assert_is_whole(delta: OutputDelta, request: EngineRequest) -> None:
    """The answer is that of the request run alone."""
    answer = oracle(request)
    assert delta.token_ids == answer.token_ids
    assert delta.finish_reason is answer.finish_reason
    assert delta.num_output_tokens == len(answer.token_ids)
    assert delta.num_prompt_tokens == len(request.prompt_ids)
    is_stopped = answer.finish_reason is FinishReason.STOP
    shown = answer.token_ids[:-1] if is_stopped else answer.token_ids
    assert delta.text == hash_tokenizer().decode(shown)


def assert_is_free(core: EngineCore) -> None:
    snapshot = core.snapshot()
    assert snapshot.num_running == snapshot.num_waiting == 0
    assert snapshot.num_free_slots == snapshot.num_slots
