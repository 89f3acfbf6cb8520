"""A real EngineCore on a runner that recites a text, with a pace that tests choose. No torch.

Token number i of every sequence (prompt included) is the i-th character of SCRIPT, so what a
request must answer follows from the number of its prompt tokens alone. With `reads_seed` it is
the character number i + seed, so that answers to one prompt differ. NUL is the end of a text.

The log probability of a token that is drawn is -(seed % 5), that of a token of a prompt minus
an eighth of its place; other tokens are each one less probable than the one before.
"""

from __future__ import annotations

import asyncio
import struct
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from config import ModelTable
from engine.grammar import GrammarCompiler
from engine.limits import limits_of
from engine.plan import Row, Scores, StepPlan, StepResult
from engine.tokenizer import Tokenizer
from engine.types import ModelInfo, SamplingParams, StatsSink, TopLogprobs
from tests.api.scripted_engine import Disk, ScriptedEngine

SCRIPT = "Far out in the ocean, where the water is as blue as cornflowers, it is very deep. "
VOCAB_SIZE = 300
EMBEDDED_DIM = 64


def write_vocab(path: Path) -> None:
    """256 single bytes: id = byte + 1."""
    lines = [f"{byte + 1} {bytes([byte])!r} 1" for byte in range(256)]
    path.write_text("\n".join(lines) + "\n")


def recited(num_prompt_tokens: int, num_tokens: int) -> str:
    """What a greedy (or any) request is answered."""
    return "".join(SCRIPT[(num_prompt_tokens + index) % len(SCRIPT)] for index in range(num_tokens))


def spelled(ids: Sequence[int]) -> str:
    """The text of tokens of that vocabulary."""
    return bytes(token_id - 1 for token_id in ids if token_id).decode()


def hidden_of(row: Row) -> bytes:
    """What stands for the row of the last token: the number of tokens up to it, 3, 3, 3, ..."""
    values = [row.position + row.num_tokens, *[3] * (EMBEDDED_DIM - 1)]
    return struct.pack(f"={EMBEDDED_DIM}f", *values)


class ScriptedRunner:
    """Answers each plan `delay_s` after the one before; never while `gate` is cleared."""

    def __init__(self, delay_s: float = 0.0) -> None:
        self.delay_s = delay_s
        self.gate = asyncio.Event()
        self.gate.set()
        self.is_closed = False
        self.fail_next: str | None = None  # the next step fails its rows with this
        self.die_next: str | None = None  # the next step kills the engine
        self.reads_seed = False
        self._sampling: dict[int, SamplingParams] = {}  # by seat
        self._plans: asyncio.Queue[StepPlan] = asyncio.Queue()
        self._task: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    def start(self, on_result: Callable[[StepResult], None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._task = asyncio.create_task(self._work(on_result))

    def submit(self, plan: StepPlan) -> None:
        self._plans.put_nowait(plan)

    def close(self) -> None:
        """The core calls this from a thread of its own."""
        task = self._task
        assert task is not None
        assert self._loop is not None
        stopped = threading.Event()

        def stop() -> None:
            task.cancel()
            stopped.set()

        self._loop.call_soon_threadsafe(stop)
        stopped.wait(5)
        self.is_closed = True

    async def _work(self, on_result: Callable[[StepResult], None]) -> None:
        while True:
            plan = await self._plans.get()
            await asyncio.sleep(self.delay_s)
            await self.gate.wait()
            on_result(self._result(plan))

    def _result(self, plan: StepPlan) -> StepResult:
        rows = [row for row in plan.rows if row.sample]
        self._sampling |= {start.seat: start.sampling for start in plan.starts}
        tokens = tuple(self._token(row) for row in rows)
        failed, self.fail_next = self.fail_next, None
        died, self.die_next = self.die_next, None
        return StepResult(
            step_id=plan.step_id,
            tokens=tokens,
            duration_s=self.delay_s,
            error=died or failed,
            is_fatal=died is not None,
            logprobs=tuple(-float(self._sampling[row.seat].seed % 5) for row in rows),
            tops=tuple(
                tops_of(self._sampling[row.seat], token, -float(self._sampling[row.seat].seed % 5))
                for row, token in zip(rows, tokens, strict=True)
            ),
            scores=() if died or failed else tuple(map(self._scores, filter(_targets, plan.rows))),
            hidden=tuple(hidden_of(row) for row in plan.rows if row.returns_hidden),
        )

    def _scores(self, row: Row) -> Scores:
        assert row.targets is not None
        begin, token_ids = row.targets
        places = range(row.position + begin + 1, row.position + begin + 1 + len(token_ids))
        logprobs = tuple(-place / 8 for place in places)
        tops = map(tops_of, [self._sampling[row.seat]] * len(token_ids), token_ids, logprobs)
        return Scores(logprobs, tuple(tops))

    def _token(self, row: Row) -> int:
        seed = self._sampling[row.seat].seed if self.reads_seed else 0
        char = SCRIPT[(row.position + row.num_tokens + seed) % len(SCRIPT)]
        return 0 if char == "\0" else 1 + ord(char)


def _targets(row: Row) -> bool:
    return row.targets is not None


def tops_of(params: SamplingParams, token: int, logprob: float) -> TopLogprobs:
    """The token, then its neighbours in the vocabulary, then the candidates."""
    ids = [(token + i - 1) % 256 + 1 for i in range(params.num_top_logprobs)]
    most = [(other, logprob - i) for i, other in enumerate(ids)]
    return (*most, *((other, -50.0) for other in params.candidate_token_ids))


class ScriptedBuilder:
    """What the server calls to get an engine; remembers what it made."""

    def __init__(self, delay_s: float = 0.0) -> None:
        self.delay_s = delay_s
        self.build_s = 0.0  # how long loading seems to take
        self.error: Exception | None = None  # raised instead of building
        self.runners: list[ScriptedRunner] = []
        self.tables: list[ModelTable] = []
        self.engines: list[ScriptedEngine] = []
        self.disks: dict[str, Disk] = {}  # by model name

    def __call__(self, table: ModelTable, stats: StatsSink) -> ScriptedEngine:
        """In a thread, as weights are loaded."""
        if self.build_s:
            threading.Event().wait(self.build_s)
        if self.error is not None:
            raise self.error
        runner = ScriptedRunner(self.delay_s)
        self.runners.append(runner)
        self.tables.append(table)
        info = ModelInfo(
            model_name=table.model_name,
            num_parameters=0,
            device="script",
            dtype="float32",
            state_dtype="float32",
            num_slots=table.max_batch_size,
            page_bytes=8,
            vocab_size=VOCAB_SIZE,
            fingerprint=f"script-{len(self.runners)}",
            max_batch_size=table.max_batch_size,
            max_batch_tokens=table.resolved_max_batch_tokens,
            paragraph_len=table.paragraph_len,
            max_context_len=table.max_context_len,
            num_frames=64,
            initial_states=tuple(path.stem for path in table.initial_states),
        )
        tokenizer = Tokenizer.load(table.tokenizer_vocab_path)
        disk = self.disks.setdefault(table.model_name, Disk())
        limits = limits_of(table)
        if not limits.rejects_long_context:
            limits = replace(limits, max_context_len=0)
        grammars = GrammarCompiler(tokenizer, VOCAB_SIZE)  # the script need not follow them
        engine = ScriptedEngine(disk, info, tokenizer, runner, limits, stats, grammars=grammars)
        self.engines.append(engine)
        return engine
