"""What a simulation is set up with, and what it knows of each sequence without asking it."""

from __future__ import annotations

from dataclasses import dataclass, field

from engine.plan import SlotRef
from engine.sequence import Sequence
from engine.state.page import Page
from engine.types import EngineRequest, LiveLimits
from tests.hash_model import Answer, feed


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """The fixed numbers of one replica."""

    num_slots: int = 4
    max_batch_size: int = 4
    paragraph_len: int = 4
    extra_batch_tokens: int = 0  # beyond the least that is allowed
    depth: int = 2
    decode_first: bool = True
    bad_every: int = 0
    has_cache: bool = False
    min_snapshot_tokens: int = 0
    max_ghosts: int = 1000
    num_frames: int = 0
    max_files: int = 0
    min_file_tokens: int = 0
    time_slice_tokens: int = 0

    def limits(self, extra_batch_tokens: int, decode_first: bool) -> LiveLimits:
        return LiveLimits(
            decode_first=decode_first,
            max_batch_tokens=self.max_batch_size + self.paragraph_len + extra_batch_tokens,
            max_waiting=1000,
            max_context_len=0,
            time_slice_tokens=self.time_slice_tokens,
        )


@dataclass(slots=True, eq=False)
class Kept:
    """A state that a user holds, and what must be in it."""

    page: Page
    state: int
    num_tokens: int


@dataclass(slots=True, eq=False)
class Tracked:
    """One sequence."""

    seq: Sequence
    answer: Answer
    base: Kept | None = None
    num_fed: int = 0  # by the rows planned so far
    num_draws: int = 0
    num_skipped: int = 0
    has_begun: bool = False  # a row of it was planned
    has_failed_row: bool = False
    has_only_drawn: bool = False  # from kept logits; the page is still to be read
    is_away: bool = False  # swapped out
    parked: Page | None = None  # its state, when it was swapped out last
    num_slice_rows: int = 0  # decode rows since it last came in
    turn_number: int = 0  # its place in the line, before the plan in question
    tokens: list[int] = field(default_factory=list)
    dst: SlotRef | None = None  # where its state is, by its newest row
    chain: list[bytes] = field(default_factory=list)  # its paragraphs, filed under `states`

    @property
    def request(self) -> EngineRequest:
        return self.seq.request

    @property
    def num_prompt(self) -> int:
        return len(self.request.prompt_ids)

    @property
    def num_base(self) -> int:
        return 0 if self.base is None else self.base.num_tokens

    @property
    def prompt_state(self) -> int:
        """The state after its prompt, by a plain loop."""
        state = 0 if self.base is None else self.base.state
        for token in self.request.prompt_ids:
            state = feed(state, token)
        return state

    @property
    def num_cached(self) -> int:
        """Of the prompt. Where its first row begins, or all of it if there was none."""
        return self.seq.num_cached_tokens

    @property
    def is_waiting(self) -> bool:
        return not self.has_begun and not self.seq.is_finished

    @property
    def is_running(self) -> bool:
        return self.has_begun and not self.is_away and not self.seq.is_finished

    @property
    def is_prefilling(self) -> bool:
        return self.is_running and self.num_fed < self.num_prompt

    @property
    def is_runnable_decode(self) -> bool:
        return self.is_running and 0 < self.num_draws < self.request.sampling.max_tokens
