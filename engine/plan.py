"""The only language between the event loop and the device: plans go down, results come up.

A plan holds integers; tensors never leave the device thread.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from engine.types import SamplingParams

ZERO_SLOT = 0  # the zero page: frozen for ever, every new sequence reads it


class SlotRef(NamedTuple):
    """A slot and the generation its holder was given; a stale pair means use after release."""

    slot: int
    generation: int


@dataclass(frozen=True, slots=True)
class SeatStart:
    """A sequence takes a seat: the runner resets the seat's penalties and sampling.

    A seat is the place of a running sequence's sampler state on the device (next token,
    penalties, parameters). It is not a slot: the state of a sequence may move between slots
    while it keeps its seat.
    """

    seat: int
    sampling: SamplingParams


@dataclass(frozen=True, slots=True)
class Row:
    """One sequence's part in a step: feed `num_tokens` tokens, from state `src` to state `dst`.

    `tokens` is None for a decode row: its one token is the seat's newest sampled token, which
    may still be on the device. `position` is the index of the first token fed; the token that
    a sampling row draws gets index `position + num_tokens`.
    """

    seq_id: int
    seat: int
    tokens: tuple[int, ...] | None
    num_tokens: int
    position: int
    src: SlotRef
    dst: SlotRef
    sample: bool  # the last token of the row gives logits and a draw


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One forward of the model. Starts are applied before rows; no two rows share a `dst`."""

    step_id: int
    rows: tuple[Row, ...]
    starts: tuple[SeatStart, ...] = ()

    @property
    def num_tokens(self) -> int:
        return sum(row.num_tokens for row in self.rows)


BAD_TOKEN = -1  # the logits of that row were not finite


@dataclass(frozen=True, slots=True)
class StepResult:
    """What came back: one token per sampling row, in plan order.

    `error` fails the rows of this step; with `is_fatal` the device cannot be used any more.
    """

    step_id: int
    tokens: tuple[int, ...]
    duration_s: float = 0.0
    error: str | None = None
    is_fatal: bool = False


class Runner(Protocol):
    """Executes plans strictly in the order of submission (one FIFO per device)."""

    def start(self, on_result: Callable[[StepResult], None]) -> None:
        """`on_result` may be called from any thread, once per plan, in order."""
        ...

    def submit(self, plan: StepPlan) -> None: ...

    def close(self) -> None:
        """Finish what was submitted, then stop. Results may still arrive before it returns."""
        ...
