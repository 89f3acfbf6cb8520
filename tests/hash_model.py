"""A recurrent model in one line, and a runner for it: the oracle of the engine's bookkeeping.

state = (state * BASE + token + 1) mod (2**61 - 1). Order, length and every token change it, so
a wrong slot, a stale page, a double writer, a lost reset or a late release end in a wrong token.
A draw depends on the state, the seat's history, the seed and the position, so a mix-up of seats
or positions shows as well. Knows `engine.plan`; knows no scheduler.
"""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from engine.plan import BAD_TOKEN, ZERO_SLOT, Row, SlotRef, StepPlan, StepResult
from engine.types import EngineRequest, FinishReason, SamplingParams

MODULUS = 2**61 - 1
BASE = 1_000_003
VOCAB_SIZE = 997


def feed(state: int, token: int) -> int:
    """The state after one more token; the empty state is 0."""
    return (state * BASE + token + 1) % MODULUS


def draw(state: int, history: int, seed: int, position: int, bad_every: int) -> int:
    """The token at `position`. One in `bad_every` is BAD_TOKEN, none when that is 0."""
    mixed = (state * 0x9E3779B97F4A7C15 + history * 0xBF58476D1CE4E5B9) % MODULUS
    mixed = ((mixed ^ seed) * 0x94D049BB133111EB + position * 0xD6E8FEB86659FD93) % MODULUS
    mixed = (mixed ^ (mixed >> 29)) * BASE % MODULUS
    if bad_every and (mixed >> 20) % bad_every == 0:
        return BAD_TOKEN
    return mixed % VOCAB_SIZE


@dataclass(frozen=True, slots=True)
class Answer:
    token_ids: tuple[int, ...]
    finish_reason: FinishReason


def oracle(request: EngineRequest, max_tokens: int | None = None, bad_every: int = 0) -> Answer:
    """What the request gives when it runs alone: a plain loop, no slots, seats or steps."""
    sampling = request.sampling
    limit = sampling.max_tokens if max_tokens is None else max_tokens
    state = history = 0
    for token in request.prompt_ids:
        state = feed(state, token)
    output: list[int] = []
    while True:
        position = len(request.prompt_ids) + len(output)
        token = draw(state, history, sampling.seed, position, bad_every)
        if token == BAD_TOKEN:
            return Answer(tuple(output), FinishReason.ERROR)
        output.append(token)
        if token in sampling.stop_token_ids:
            return Answer(tuple(output), FinishReason.STOP)
        if len(output) == limit:
            return Answer(tuple(output), FinishReason.LENGTH)
        state, history = feed(state, token), feed(history, token)


@dataclass(slots=True)
class Page:
    state: int
    generation: int


@dataclass(slots=True)
class Seat:
    sampling: SamplingParams
    newest: int = 0
    history: int = 0  # what the penalties of a real sampler are made of


class HashModel:
    """Executes plans like a device: pages by slot, sampler state by seat, nothing else."""

    def __init__(self, bad_every: int = 0) -> None:
        self.bad_every = bad_every
        self.pages: dict[int, Page] = {ZERO_SLOT: Page(0, 0)}
        self.seats: dict[int, Seat] = {}
        self._next_step = 0

    def execute(self, plan: StepPlan) -> StepResult:
        """Run one step. All rows read before any writes, as in one kernel launch."""
        self._take_turn(plan)
        for start in plan.starts:
            self.seats[start.seat] = Seat(start.sampling)
        states = [self._advance(row) for row in plan.rows]
        for row, state in zip(plan.rows, states, strict=True):
            self._write(row.dst, state)
        pairs = zip(plan.rows, states, strict=True)
        return StepResult(
            plan.step_id, tuple(self._sample(row, state) for row, state in pairs if row.sample)
        )

    def fail(self, plan: StepPlan, *, is_fatal: bool = False) -> StepResult:
        """A step that broke half way: every seat and page it was to set holds garbage."""
        self._take_turn(plan)
        for start in plan.starts:
            self.seats[start.seat] = Seat(SamplingParams(seed=0xBAD), history=plan.step_id)
        for row in plan.rows:
            self._write(row.dst, 0xDEAD + plan.step_id)
        return StepResult(plan.step_id, (), error="injected failure", is_fatal=is_fatal)

    def _take_turn(self, plan: StepPlan) -> None:
        assert plan.step_id == self._next_step, f"step {plan.step_id}, due was {self._next_step}"
        self._next_step += 1

    def _advance(self, row: Row) -> int:
        state = self._read(row.src)
        for token in self._tokens(row):
            state = feed(state, token)
        return state

    def _tokens(self, row: Row) -> tuple[int, ...]:
        if row.tokens is not None:
            return row.tokens
        assert row.seat in self.seats, f"seat {row.seat} decodes before its start"
        return (self.seats[row.seat].newest,)

    def _read(self, src: SlotRef) -> int:
        assert src.slot in self.pages, f"{src} is read before it was written"
        page = self.pages[src.slot]
        assert page.generation == src.generation, f"stale {src}: generation {page.generation}"
        return page.state

    def _write(self, dst: SlotRef, state: int) -> None:
        assert dst.slot != ZERO_SLOT, "the zero page is written"
        old = self.pages.get(dst.slot)
        assert old is None or old.generation <= dst.generation, f"stale {dst} is written"
        self.pages[dst.slot] = Page(state, dst.generation)

    def _sample(self, row: Row, state: int) -> int:
        assert row.seat in self.seats, f"seat {row.seat} draws before its start"
        seat = self.seats[row.seat]
        position = row.position + row.num_tokens
        token = draw(state, seat.history, seat.sampling.seed, position, self.bad_every)
        seat.newest, seat.history = token, feed(seat.history, token)
        return token


class HashRunner:
    """A Runner whose results the test delivers, one by one, when it likes."""

    def __init__(self, bad_every: int = 0) -> None:
        self.model = HashModel(bad_every)
        self.plans: deque[StepPlan] = deque()
        self.is_closed = False
        self._on_result: Callable[[StepResult], None] | None = None

    def start(self, on_result: Callable[[StepResult], None]) -> None:
        self._on_result = on_result

    def submit(self, plan: StepPlan) -> None:
        assert not self.is_closed, "a plan after close"
        self.plans.append(plan)

    def deliver(self) -> None:
        """Run the oldest plan and report it."""
        self._report(self.model.execute(self.plans.popleft()))

    def deliver_failure(self, *, is_fatal: bool = False) -> None:
        """Break the oldest plan and report that."""
        self._report(self.model.fail(self.plans.popleft(), is_fatal=is_fatal))

    def close(self) -> None:
        self.is_closed = True

    def _report(self, result: StepResult) -> None:
        assert self._on_result is not None, "deliver before start"
        self._on_result(result)


class ThreadedHashRunner:
    """The same on a thread of its own, like a device. `die_at` kills the thread at that step."""

    def __init__(self, bad_every: int = 0, die_at: int | None = None) -> None:
        self.model = HashModel(bad_every)
        self.die_at = die_at
        self._plans: queue.SimpleQueue[StepPlan | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def start(self, on_result: Callable[[StepResult], None]) -> None:
        self._thread = threading.Thread(target=self._run, args=(on_result,), daemon=True)
        self._thread.start()

    def submit(self, plan: StepPlan) -> None:
        self._plans.put(plan)

    def close(self) -> None:
        self._plans.put(None)
        if self._thread is not None:
            self._thread.join()

    def _run(self, on_result: Callable[[StepResult], None]) -> None:
        while (plan := self._plans.get()) is not None:
            if plan.step_id == self.die_at:
                return
            on_result(self.model.execute(plan))
