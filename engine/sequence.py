"""Sequence: one token stream being computed, and how far it is. Knows no other sequence.

Two cursors count tokens fed to the model: `num_planned` (given to the device) never falls
behind `num_computed` (committed). Between them lies what is in flight. Positions count from
where the prompt begins; `num_base_tokens` more came before it, in the state it went on from.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, auto
from typing import NamedTuple

from engine.plan import Draw, Scores, SlotRef, Targets
from engine.state.page import Page
from engine.types import EngineRequest, FinishReason, TopLogprobs


class SequenceStatus(Enum):
    WAITING = auto()  # owns nothing on the device
    RUNNING = auto()  # owns a slot and a seat
    SWAPPED = auto()  # gave both up to others, its state being in a page of its own; waits as well
    FINISHED = auto()  # owns nothing any more; finish_reason says why


class FrozenSlot(NamedTuple):
    """A snapshot that the device may not have written yet: the state after `num_tokens` tokens."""

    num_tokens: int
    slot: SlotRef
    is_end: bool = False  # of the prompt, with its logits


class Awaited(NamedTuple):
    """A snapshot that `owner` is going to leave after `num_tokens` tokens."""

    owner: Sequence
    num_tokens: int


@dataclass(slots=True, eq=False)
class Sequence:
    """State of one request in the scheduler and the state cache, who alone change it.

    `max_tokens` is the request's, cut to what the context length leaves; 0 = only the prompt is
    computed. `base` is the page that the prompt goes on from; it is held for as long as the
    sequence lives.
    """

    seq_id: int  # grows with arrival
    request: EngineRequest
    max_tokens: int
    base: Page | None = None
    num_prompt_tokens: int = field(init=False)
    num_base_tokens: int = field(init=False)
    output_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)  # of output_ids, if they were asked for
    tops: list[TopLogprobs] = field(default_factory=list)  # likewise
    prompt_logprobs: list[float] = field(default_factory=list)  # likewise, from scores_from on
    prompt_tops: list[TopLogprobs] = field(default_factory=list)
    hidden: bytes = b""  # if it was asked for: the last prompt token's row, when it is computed
    status: SequenceStatus = SequenceStatus.WAITING
    num_planned: int = 0
    num_computed: int = 0
    num_skipped_steps: int = 0  # plans made since its last decode row
    turn_number: int = field(init=False)  # its place in the line
    num_slice_tokens: int = 0  # decode rows since it last got a seat
    num_rows_in_flight: int = 0
    owes_draw: bool = False  # the row in flight that draws from kept logits feeds no token
    seat: int | None = None
    admitted_s: float | None = None  # perf_counter
    finish_reason: FinishReason | None = None
    error: str | None = None
    # The state cache's:
    slot: SlotRef | None = None  # its live page
    is_loading: bool = False  # that page is being loaded by the plan in the making
    parked: Page | None = None  # while SWAPPED: its state after num_planned tokens
    frame: SlotRef | None = None  # with keeps_prompt: where its state will be brought
    kept: Page | None = None  # with keeps_prompt, at the end: its state, held
    num_cached_tokens: int = 0  # of the prompt, taken from a snapshot
    chain: list[bytes] = field(default_factory=list)  # links of its paragraphs, as far as needed
    end_digest: bytes = b""  # of the whole prompt
    branch_digest: bytes = b""  # of its beginning up to branch_at
    origin: SlotRef | None = None  # what its first row reads; None once that is planned
    has_origin: bool = False  # and it holds a reference to that
    stops: set[int] = field(default_factory=set)  # where its prefill is to leave snapshots
    expects_end: bool = False  # the same prompt has come before, or waits
    frozen: list[FrozenSlot] = field(default_factory=list)  # left, but not committed; ascending
    turn: Page | None = None  # its newest snapshot from decoding
    awaited: Awaited | None = None  # while waiting: what it (has) waited to begin from
    has_fetched: bool = False  # while waiting: it has asked the disk for a page once

    def __post_init__(self) -> None:
        self.num_prompt_tokens = len(self.request.prompt_ids)
        self.num_base_tokens = 0 if self.base is None else self.base.num_tokens
        self.turn_number = self.seq_id

    @property
    def is_finished(self) -> bool:
        return self.status is SequenceStatus.FINISHED

    @property
    def is_settled(self) -> bool:
        """Nothing of it is in flight."""
        return self.num_rows_in_flight == 0

    @property
    def is_portable(self) -> bool:
        """It has not begun, and another engine may do it instead."""
        return self.status is SequenceStatus.WAITING and not self.request.is_bound

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
    def keeps_prompt(self) -> bool:
        """The state after its prompt is all that is wanted, and is to be brought to the host."""
        return self.max_tokens == 0 and self.request.keep_state is not None

    @property
    def max_reused_tokens(self) -> int:
        """Tokens of the prompt that need not be computed if there is a state after them."""
        if self.first_scored is not None:
            return self.first_scored - 1
        return self.num_prompt_tokens - self.request.returns_hidden

    @property
    def first_scored(self) -> int | None:
        """The first prompt token that gets a log probability; there may be none."""
        scores_from = self.request.scores_from
        if scores_from is None or max(scores_from, 1) >= self.num_prompt_tokens:
            return None
        return max(scores_from, 1)

    @property
    def waiting_order(self) -> tuple[int, int]:
        """Sort key among the waiting: higher priority first, then by turn."""
        return (-self.request.priority, self.turn_number)

    def targets(self, begin: int, end: int) -> Targets | None:
        """What a row that feeds positions `begin` to `end` can say about tokens to be scored: each
        token fed says something about the next one of the prompt."""
        if self.first_scored is None or begin >= end:
            return None
        first = max(self.first_scored, begin + 1)
        token_ids = self.request.prompt_ids[first : end + 1]
        return Targets(first - 1 - begin, token_ids) if token_ids else None

    def take_draw(self, draw: Draw) -> None:
        self.output_ids.append(draw.token_id)
        if self.request.sampling.has_logprobs:
            self.logprobs.append(draw.logprob)
            if self.request.sampling.has_top_logprobs:
                self.tops.append(draw.top)

    def take_scores(self, scores: Scores) -> None:
        self.prompt_logprobs += scores.logprobs
        self.prompt_tops += scores.tops

    def tokens(self, begin: int, end: int) -> tuple[int, ...]:
        """Tokens fed at positions `begin` to `end`, all of which must be known."""
        num_prompt = self.num_prompt_tokens
        outputs = self.output_ids[max(begin - num_prompt, 0) : max(end - num_prompt, 0)]
        tokens = (*self.request.prompt_ids[begin:end], *outputs)
        assert len(tokens) == end - begin, f"{self.seq_id} has no {end} tokens"
        return tokens
