"""Sequence: one token stream being computed, and how far it is. Knows no other sequence.

Two cursors count tokens fed to the model: `num_planned` (given to the device) never falls
behind `num_computed` (committed). Between them lies what is in flight.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, auto

from engine.plan import SlotRef
from engine.types import EngineRequest, FinishReason


class SequenceStatus(Enum):
    WAITING = auto()  # owns nothing on the device
    RUNNING = auto()  # owns a slot and a seat
    FINISHED = auto()  # owns nothing any more; finish_reason says why


@dataclass(slots=True, eq=False)
class Sequence:
    """State of one request in the scheduler, who alone changes it.

    `max_tokens` is the request's, cut to what the context length leaves.
    """

    seq_id: int  # grows with arrival
    request: EngineRequest
    max_tokens: int
    num_prompt_tokens: int = field(init=False)
    output_ids: list[int] = field(default_factory=list)
    status: SequenceStatus = SequenceStatus.WAITING
    num_planned: int = 0
    num_computed: int = 0
    num_skipped_steps: int = 0  # plans made since its last decode row
    slot: SlotRef | None = None
    seat: int | None = None
    admitted_s: float | None = None  # perf_counter
    finish_reason: FinishReason | None = None
    error: str | None = None

    def __post_init__(self) -> None:
        self.num_prompt_tokens = len(self.request.prompt_ids)

    @property
    def is_finished(self) -> bool:
        return self.status is SequenceStatus.FINISHED

    @property
    def needs_prefill(self) -> bool:
        """Some of the prompt has not been planned."""
        return self.num_planned < self.num_prompt_tokens

    @property
    def can_decode(self) -> bool:
        """A decode row may be planned.

        Its input need not be known here: the row that draws it is planned, and rows of one
        seat run in order. The last of `max_tokens` tokens is drawn but never fed.
        """
        num_drawn = self.num_planned - self.num_prompt_tokens + 1
        return 0 < num_drawn < self.max_tokens

    @property
    def waiting_order(self) -> tuple[int, int]:
        """Sort key among the waiting: higher priority first, then first come."""
        return (-self.request.priority, self.seq_id)
