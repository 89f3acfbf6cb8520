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
from dataclasses import dataclass, replace

from engine.plan import (
    BAD_TOKEN,
    ZERO_SLOT,
    MoveKind,
    PageMove,
    Row,
    Scores,
    SeatStart,
    SlotRef,
    StepPlan,
    StepResult,
)
from engine.types import EngineRequest, FinishReason, SamplingParams

MODULUS = 2**61 - 1
BASE = 1_000_003
VOCAB_SIZE = 997


def feed(state: int, token: int) -> int:
    """The state after one more token; the empty state is 0."""
    return (state * BASE + token + 1) % MODULUS


def hidden_of(state: int) -> bytes:
    """What stands for the row of the last token."""
    return state.to_bytes(8, "little")


def draw(state: int, history: int, seed: int, position: int, bad_every: int) -> int:
    """The token at `position`. One state in `bad_every` gives BAD_TOKEN, none when that is 0:
    whether logits are finite is a matter of the state alone."""
    if bad_every and (state * 0xD6E8FEB86659FD93 % MODULUS >> 20) % bad_every == 0:
        return BAD_TOKEN
    mixed = (state * 0x9E3779B97F4A7C15 + history * 0xBF58476D1CE4E5B9) % MODULUS
    mixed = ((mixed ^ seed) * 0x94D049BB133111EB + position * 0xD6E8FEB86659FD93) % MODULUS
    return (mixed ^ (mixed >> 29)) * BASE % MODULUS % VOCAB_SIZE


def logprob_of(state: int, token: int) -> float:
    """What the model says of `token` as the next one."""
    return -(feed(state, token) % 4093) / 256


def scores_of(request: EngineRequest, state: int = 0) -> list[float]:
    """The log probabilities of the prompt that the request asks for, by a plain loop."""
    found = []
    for place, token in enumerate(request.prompt_ids):
        if request.scores_from is not None and place >= max(request.scores_from, 1):
            found.append(logprob_of(state, token))
        state = feed(state, token)
    return found


@dataclass(frozen=True, slots=True)
class Answer:
    token_ids: tuple[int, ...]
    finish_reason: FinishReason


def oracle(
    request: EngineRequest,
    max_tokens: int | None = None,
    bad_every: int = 0,
    base: tuple[int, int] = (0, 0),
) -> Answer:
    """What the request gives when it runs alone: a plain loop, no slots, seats or steps.

    `base` is the state that the prompt goes on from and the number of tokens in it.
    """
    sampling = request.sampling
    limit = sampling.max_tokens if max_tokens is None else max_tokens
    state, num_base_tokens = base
    history = 0
    for token in request.prompt_ids:
        state = feed(state, token)
    output: list[int] = []
    while True:
        position = num_base_tokens + len(request.prompt_ids) + len(output)
        token = draw(state, history, sampling.seed, position, bad_every)
        if token == BAD_TOKEN:
            return Answer(tuple(output), FinishReason.ERROR)
        if limit == 0:
            return Answer((), FinishReason.LENGTH)
        output.append(token)
        if token in sampling.stop_token_ids:
            return Answer(tuple(output), FinishReason.STOP)
        if len(output) == limit:
            return Answer(tuple(output), FinishReason.LENGTH)
        state, history = feed(state, token), feed(history, token)


@dataclass(slots=True)
class Page:
    """What a slot or a frame holds. The logits of a state are the state, if they were kept."""

    state: int
    generation: int
    logits: int = 0xBAD


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
        self.frames: dict[int, Page] = {}
        self.seats: dict[int, Seat] = {}
        self._next_step = 0

    def execute(self, plan: StepPlan) -> StepResult:
        """Run one step. All rows read before any writes, as in one kernel launch."""
        self._take_turn(plan)
        for move in plan.moves:
            self._move(move)
        for start in plan.starts:
            self.seats[start.seat] = _seat(start)
        scores = tuple(self._score(row) for row in plan.rows if row.targets)
        states = [self._advance(row) for row in plan.rows]
        for row, state in zip(plan.rows, states, strict=True):
            if row.num_tokens > 0:
                self._write(row.dst, state, has_logits=row.keep_logits)
        pairs = [*zip(plan.rows, states, strict=True)]
        tokens = tuple(self._sample(row, state) for row, state in pairs if row.sample)
        hidden = tuple(hidden_of(state) for row, state in pairs if row.returns_hidden)
        return StepResult(plan.step_id, tokens, scores=scores, hidden=hidden)

    def fail(self, plan: StepPlan, *, is_fatal: bool = False) -> StepResult:
        """A step that broke half way: every seat and page it was to set holds garbage."""
        self._take_turn(plan)
        for move in plan.moves:
            garbage = Page(0xDEAD + plan.step_id, 0, logits=0xDEAD)
            if move.kind is MoveKind.STORE:
                self.frames[move.frame.slot] = replace(garbage, generation=move.frame.generation)
            else:
                self._write(move.slot, garbage.state)
        for start in plan.starts:
            self.seats[start.seat] = Seat(SamplingParams(seed=0xBAD), history=plan.step_id)
        for row in plan.rows:
            if row.num_tokens > 0:
                self._write(row.dst, 0xDEAD + plan.step_id)
        return StepResult(plan.step_id, (), error="injected failure", is_fatal=is_fatal)

    def _take_turn(self, plan: StepPlan) -> None:
        assert plan.step_id == self._next_step, f"step {plan.step_id}, due was {self._next_step}"
        self._next_step += 1

    def _move(self, move: PageMove) -> None:
        """Copy a page as it is; logits that are not moved stay what the place had before."""
        if move.kind is MoveKind.STORE:
            source, places, target = self._page(move.slot), self.frames, move.frame
        else:
            source, places, target = self.frames[move.frame.slot], self.pages, move.slot
            assert source.generation == move.frame.generation, f"stale {move.frame} is loaded"
        old = places.get(target.slot)
        assert old is None or old.generation <= target.generation, f"stale {target} is written"
        stale_logits = 0xBAD if old is None else old.logits
        logits = source.logits if move.has_logits else stale_logits
        places[target.slot] = Page(source.state, target.generation, logits)

    def _advance(self, row: Row) -> int:
        if row.num_tokens == 0:
            return self._page(row.src).logits
        state = self._read(row.src)
        for token in self._tokens(row):
            state = feed(state, token)
        return state

    def _score(self, row: Row) -> Scores:
        assert row.targets is not None, "a row without targets"
        state, states = self._read(row.src), list[int]()
        for token in self._tokens(row):
            state = feed(state, token)
            states.append(state)
        begin, token_ids = row.targets
        return Scores(
            tuple(logprob_of(states[begin + i], token) for i, token in enumerate(token_ids))
        )

    def _tokens(self, row: Row) -> tuple[int, ...]:
        if row.tokens is not None:
            return row.tokens
        assert row.seat in self.seats, f"seat {row.seat} decodes before its start"
        return (self.seats[row.seat].newest,)

    def _read(self, src: SlotRef) -> int:
        return self._page(src).state

    def _page(self, src: SlotRef) -> Page:
        assert src.slot in self.pages, f"{src} is read before it was written"
        page = self.pages[src.slot]
        assert page.generation == src.generation, f"stale {src}: generation {page.generation}"
        return page

    def _write(self, dst: SlotRef, state: int, *, has_logits: bool = False) -> None:
        assert dst.slot != ZERO_SLOT, "the zero page is written"
        old = self.pages.get(dst.slot)
        assert old is None or old.generation <= dst.generation, f"stale {dst} is written"
        stale_logits = 0xBAD if old is None else old.logits
        logits = state if has_logits else stale_logits
        self.pages[dst.slot] = Page(state, dst.generation, logits)

    def _sample(self, row: Row, state: int) -> int:
        assert row.seat in self.seats, f"seat {row.seat} draws before its start"
        seat = self.seats[row.seat]
        position = row.position + row.num_tokens
        token = draw(state, seat.history, seat.sampling.seed, position, self.bad_every)
        seat.newest, seat.history = token, feed(seat.history, token)
        return token


def _seat(start: SeatStart) -> Seat:
    """As if the tokens it brings had been drawn here."""
    seat = Seat(start.sampling)
    for token in start.output_ids:
        seat.newest, seat.history = token, feed(seat.history, token)
    return seat


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
