"""The only language between the event loop and the device: plans go down, results come up.

A plan holds integers; tensors never leave the device thread.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum
from math import nan
from typing import NamedTuple, Protocol

from engine.types import SamplingParams, TopLogprobs

ZERO_SLOT = 0  # the zero page: frozen for ever, every new sequence reads it


class SlotRef(NamedTuple):
    """A slot and the generation its holder was given; a stale pair means use after release."""

    slot: int
    generation: int


class MoveKind(Enum):
    STORE = "store"  # slot to frame
    LOAD = "load"  # frame to slot


@dataclass(frozen=True, slots=True)
class PageMove:
    """Copy one page between device and host: the state, and its logits where it has some.

    A frame is a place for a page in host memory, numbered like slots.
    """

    kind: MoveKind
    slot: SlotRef
    frame: SlotRef
    has_logits: bool


@dataclass(frozen=True, slots=True)
class SeatStart:
    """A sequence takes a seat: the runner resets the seat's penalties and sampling.

    A seat is the place of a running sequence's sampler state on the device (next token,
    penalties, parameters). It is not a slot: the state of a sequence may move between slots
    while it keeps its seat. A sequence that comes back brings the tokens it has drawn: penalties
    are made from them, and the last one is what its first row feeds.
    """

    seat: int
    sampling: SamplingParams
    output_ids: tuple[int, ...] = ()


class Targets(NamedTuple):
    """Known tokens: the logits after the row's token number `begin` are to say how probable the
    first of `token_ids` was, those after the next one the second, and so on."""

    begin: int
    token_ids: tuple[int, ...]


class Scores(NamedTuple):
    """Log probabilities of known tokens; `tops` for each, if its sampling asks, else empty."""

    logprobs: tuple[float, ...]
    tops: tuple[TopLogprobs, ...] = ()


class Row(NamedTuple):
    """One sequence's part in a step: feed `num_tokens` tokens, from state `src` to state `dst`.

    `tokens` is None for a decode row: its one token is the seat's newest sampled token, which
    may still be on the device. `position` is the index of the first token fed; the token that
    a sampling row draws gets index `position + num_tokens`.

    A row of no tokens (`tokens == ()`) draws from the logits kept with `src`, a frozen page; it
    writes nothing, and its sequence goes on from `src`.
    """

    seq_id: int
    seat: int
    tokens: tuple[int, ...] | None
    num_tokens: int
    position: int
    src: SlotRef
    dst: SlotRef
    sample: bool  # the last token of the row gives logits and a draw
    keep_logits: bool = False  # leave the logits after the last token with `dst`
    targets: Targets | None = None  # tokens of the prompt whose log probabilities are wanted
    returns_hidden: bool = False  # of a sampling row: hand out the last token's row after ln_out


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One forward of the model: moves in order, then starts, then rows at once.

    No two rows share a `dst`, and none writes what another one reads. Rows may be none.
    """

    step_id: int
    rows: tuple[Row, ...]
    starts: tuple[SeatStart, ...] = ()
    moves: tuple[PageMove, ...] = ()

    @property
    def num_tokens(self) -> int:
        return sum(row.num_tokens for row in self.rows)


BAD_TOKEN = -1  # the logits of that row were not finite, or would not be
NO_TOKEN = -2  # the request's own rules left nothing to draw


class Draw(NamedTuple):
    """A token that a row has drawn, or BAD_TOKEN or NO_TOKEN; the rest as in `StepResult`."""

    token_id: int
    logprob: float
    top: TopLogprobs


class RowResult(NamedTuple):
    """What came of a row; `hidden` is empty where it returns none."""

    row: Row
    draw: Draw | None
    scores: Scores | None
    hidden: bytes


@dataclass(frozen=True, slots=True)
class StepResult:
    """What came back: one token per sampling row, in plan order.

    `logprobs` are natural logarithms of the probabilities that the model itself gave those
    tokens, before penalties, temperature and limits: as many as tokens (NaN where the row's
    sampling did not ask), or empty if nobody asked. `tops` likewise, () where it did not ask.
    `scores` has one entry for each row with `targets`, `hidden` one for each row that returns it
    (of the model after ln_out, native float32), in plan order. `unsound` are the sequences whose
    row drew nothing and left a state that is not finite. `error` fails the rows of this step and
    whatever it moved; with `is_fatal` the device cannot be used any more.
    """

    step_id: int
    tokens: tuple[int, ...]
    duration_s: float = 0.0
    error: str | None = None
    is_fatal: bool = False
    logprobs: tuple[float, ...] = ()
    tops: tuple[TopLogprobs, ...] = ()
    scores: tuple[Scores, ...] = ()
    hidden: tuple[bytes, ...] = ()
    unsound: tuple[int, ...] = ()

    def by_row(self, plan: StepPlan) -> Iterator[RowResult]:
        """What each row drew, found out about the prompt, and returns."""
        num_draws, num_scores = len(self.tokens), len(self.scores)
        assert num_draws == sum(row.sample for row in plan.rows), f"{num_draws} draws"
        assert num_scores == sum(bool(row.targets) for row in plan.rows), f"{num_scores} scores"
        logprobs, tops = self.logprobs or (nan,) * num_draws, self.tops or ((),) * num_draws
        draws = map(Draw, self.tokens, logprobs, tops)
        scores, hidden = iter(self.scores), iter(self.hidden)
        for row in plan.rows:
            bad = Draw(BAD_TOKEN, nan, ()) if row.seq_id in self.unsound else None
            yield RowResult(
                row,
                next(draws) if row.sample else bad,
                next(scores) if row.targets else None,
                next(hidden) if row.returns_hidden else b"",
            )


class Runner(Protocol):
    """Executes plans strictly in the order of submission (one FIFO per device)."""

    def start(self, on_result: Callable[[StepResult], None]) -> None:
        """`on_result` may be called from any thread, once per plan, in order."""
        ...

    def submit(self, plan: StepPlan) -> None: ...

    def close(self) -> None:
        """Finish what was submitted, then stop. Results may still arrive before it returns."""
        ...
