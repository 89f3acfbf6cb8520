"""Simulation: a scheduler driven by a script against the hash model, checked at every step.

Everything the scheduler promises is recomputed here from the plans alone; nothing asks the
sequence what it thinks. Any broken promise is an AssertionError.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from engine.plan import ZERO_SLOT, Row, SlotRef, StepPlan, StepResult
from engine.scheduler import DECODE_INTERVAL, Progress, Scheduler
from engine.sequence import Sequence
from engine.state.cache import StateCache
from engine.state.pool import SlotPool
from engine.state.prefix import link, root
from engine.types import EngineRequest, FinishReason, LiveLimits
from tests.hash_model import Answer, HashModel, feed, oracle

SEED = b"seed of the hash model"


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

    def limits(self, extra_batch_tokens: int, decode_first: bool) -> LiveLimits:
        return LiveLimits(
            decode_first=decode_first,
            max_batch_tokens=self.max_batch_size + self.paragraph_len + extra_batch_tokens,
            max_waiting=1000,
            max_context_len=0,
        )


@dataclass(slots=True, eq=False)
class Tracked:
    """What the simulation itself knows of a sequence."""

    seq: Sequence
    answer: Answer
    num_fed: int = 0  # by the rows planned so far
    num_draws: int = 0
    num_skipped: int = 0
    has_failed_row: bool = False
    tokens: list[int] = field(default_factory=list)
    dst: SlotRef | None = None  # of its newest row
    num_cached: int = 0  # where its first row began
    chain: list[bytes] = field(default_factory=list)  # its paragraphs, filed under `states`

    @property
    def request(self) -> EngineRequest:
        return self.seq.request

    @property
    def is_runnable_decode(self) -> bool:
        is_open = not self.seq.is_finished and self.num_draws > 0
        return is_open and self.num_draws < self.request.sampling.max_tokens


class Simulation:
    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self.pool = SlotPool(setup.num_slots)
        self.cache = StateCache(
            self.pool,
            setup.paragraph_len,
            SEED if setup.has_cache else None,
            min_snapshot_tokens=setup.min_snapshot_tokens,
            max_ghosts=setup.max_ghosts,
        )
        self.scheduler = Scheduler(
            self.cache,
            setup.limits(setup.extra_batch_tokens, setup.decode_first),
            max_batch_size=setup.max_batch_size,
        )
        self.model = HashModel(setup.bad_every)
        self.tracked: dict[int, Tracked] = {}
        self.in_flight: deque[StepPlan] = deque()
        self.writers: dict[SlotRef, Tracked] = {}  # whose rows wrote the slot
        # The state, token count and salt that a page of this digest must have.
        self.states: dict[bytes, tuple[int, int, str]] = {}
        self.num_hits = 0
        self.num_forks = 0  # rows that left the slot they stood on as a snapshot

    def add(self, request: EngineRequest) -> Tracked:
        seq = Sequence(len(self.tracked), request, request.sampling.max_tokens)
        tracked = Tracked(seq, oracle(request, bad_every=self.setup.bad_every))
        self.tracked[seq.seq_id] = tracked
        self._file_states(tracked)
        self.scheduler.add(seq)
        self.check()
        return tracked

    def plan(self) -> StepPlan | None:
        """Plan one step if the pipeline has room, and check the plan."""
        if len(self.in_flight) >= self.setup.depth:
            return None
        waiting = [tracked for tracked in self.tracked.values() if self._is_waiting(tracked)]
        decoding = [tracked for tracked in self.tracked.values() if tracked.is_runnable_decode]
        prefilling = [tracked for tracked in self.tracked.values() if self._is_prefilling(tracked)]
        can_admit = bool(waiting) and self._num_running < self.setup.max_batch_size
        can_admit = can_admit and self._num_running < self.setup.num_slots
        if self.setup.has_cache:
            # A prompt may wait for a snapshot; a slot may be a snapshot that is in flight.
            is_held_up = bool(self.in_flight) or all(map(self._has_companion, waiting))
            can_admit = can_admit and not is_held_up
        num_forks = self.num_forks
        plan = self.scheduler.plan()
        if plan is None:
            assert not decoding, "nothing planned beside a runnable decode row"
            assert not prefilling, "nothing planned beside an unfinished prompt"
            assert not can_admit, "nothing planned though somebody could be admitted"
        else:
            self._check_plan(plan, waiting, decoding)
            has_prefill = any(row.tokens is not None for row in plan.rows)
            assert has_prefill or not (prefilling or can_admit), "prefill starves"
            assert self.setup.has_cache or self.num_forks == 0, "a page moved for nothing"
            if self.num_forks > num_forks and self._num_running < self.setup.max_batch_size:
                passed = [tracked for tracked in waiting if tracked.num_fed == 0]
                assert self.cache.num_available > 0 or all(map(self._has_companion, passed)), (
                    "a snapshot took the slot of somebody who could begin"
                )
            self.in_flight.append(plan)
        self.check()
        return plan

    def commit(self, *, fails: bool = False) -> None:
        """Let the device finish the oldest step in flight, well or (`fails`) badly."""
        if not self.in_flight:
            return
        plan = self.in_flight.popleft()
        result = self.model.fail(plan) if fails else self.model.execute(plan)
        self._take(plan, result, self.scheduler.commit(plan, result))
        self.check()

    def abort(self, index: int) -> None:
        """End one of those alive; its slot must be free at once."""
        alive = [tracked.seq for tracked in self.tracked.values() if not tracked.seq.is_finished]
        if not alive:
            return
        seq = alive[index % len(alive)]
        num_available, num_held = self.cache.num_available, (seq.slot is not None) + len(seq.frozen)
        self.scheduler.finish(seq, FinishReason.ABORT)
        assert self.cache.num_available == num_available + num_held, "an abort left its slot in use"
        self.check()

    def reconfigure(self, extra_batch_tokens: int, decode_first: bool) -> None:
        self.scheduler.reconfigure(self.setup.limits(extra_batch_tokens, decode_first))
        self.check()

    def drain(self) -> None:
        """Run until nobody is left; everything must be free and every answer complete."""
        num_tokens = sum(
            len(tracked.request.prompt_ids) + tracked.request.sampling.max_tokens
            for tracked in self.tracked.values()
        )
        for _ in range(DECODE_INTERVAL * num_tokens + 1):
            while self.plan() is not None:
                pass
            if not self.in_flight:
                break
            self.commit()
        for tracked in self.tracked.values():
            seq = tracked.seq
            assert seq.is_finished, f"{seq.seq_id} never finished"
            if seq.finish_reason is not FinishReason.ABORT and not tracked.has_failed_row:
                found = Answer(tuple(tracked.tokens), seq.finish_reason or FinishReason.ABORT)
                assert found == tracked.answer, f"{seq.seq_id}: {found} is not {tracked.answer}"
        assert self.scheduler.num_running == self.scheduler.num_waiting == 0
        assert self.cache.num_available == self.setup.num_slots, "a slot leaked"
        assert self.scheduler.num_admissible == min(
            self.setup.num_slots, self.setup.max_batch_size
        ), "a seat leaked"
        self.check()

    def check(self) -> None:
        self.scheduler.check()
        alive = [tracked for tracked in self.tracked.values() if not tracked.seq.is_finished]
        for tracked in alive:
            assert tracked.dst is None or self.pool.is_current(tracked.dst), "a slot in use is free"
        pages = list(self.cache.index.victims())
        indexed = {page.slot for page in pages}
        for tracked in self.tracked.values():
            is_kept = not tracked.seq.is_finished or tracked.dst in indexed
            assert tracked.dst is None or is_kept or not self.pool.is_current(tracked.dst), (
                f"{tracked.dst} of {tracked.seq.seq_id}, which has ended, is in use"
            )
        num_pages = len(pages) + sum(len(tracked.seq.frozen) for tracked in alive)
        num_used = self.pool.num_slots - self.pool.num_free
        assert num_used == self._num_running + num_pages, (
            f"{num_used} slots used by {self._num_running} sequences and {num_pages} snapshots"
        )
        for page in pages:
            written = self.model.pages.get(page.slot.slot)
            assert written is not None, f"a page of {page.num_tokens} tokens is not written yet"
            assert written.generation == page.slot.generation, "a stale slot is indexed"
            assert page.digest in self.states, "a page of a text that nobody asked for"
            state, num_tokens, salt = self.states[page.digest]
            assert (written.state, page.num_tokens) == (state, num_tokens), (
                f"the page of {page.num_tokens} tokens holds the state after others"
            )
            writer = self.writers[page.slot]
            assert writer.request.cache_salt == salt, "a page is filed under another's salt"
            assert page.num_tokens % self.setup.paragraph_len == 0, "a page is off the grid"

    def run(self, operations: Iterable[Callable[[Simulation], None]]) -> None:
        for operation in operations:
            operation(self)
        self.drain()

    def _file_states(self, tracked: Tracked) -> None:
        """Note what the pages of this sequence's whole paragraphs must hold, known tokens only."""
        salt, length = tracked.request.cache_salt, self.setup.paragraph_len
        tokens = (*tracked.request.prompt_ids, *tracked.tokens)
        if not tracked.chain:
            tracked.chain.append(root(SEED, salt))
            self.states[tracked.chain[0]] = (0, 0, salt)
        while (end := len(tracked.chain) * length) <= len(tokens):
            paragraph = tokens[end - length : end]
            state = self.states[tracked.chain[-1]][0]
            for token in paragraph:
                state = feed(state, token)
            tracked.chain.append(link(tracked.chain[-1], paragraph))
            expected = (state, end, salt)
            assert self.states.setdefault(tracked.chain[-1], expected) == expected, (
                "two texts have one digest"
            )

    @property
    def _num_running(self) -> int:
        return sum(
            tracked.num_fed > 0 and not tracked.seq.is_finished for tracked in self.tracked.values()
        )

    def _is_waiting(self, tracked: Tracked) -> bool:
        return tracked.num_fed == 0 and not tracked.seq.is_finished

    def _is_prefilling(self, tracked: Tracked) -> bool:
        is_open = not tracked.seq.is_finished
        return is_open and 0 < tracked.num_fed < len(tracked.request.prompt_ids)

    def _check_plan(self, plan: StepPlan, waiting: list[Tracked], decoding: list[Tracked]) -> None:
        rows = plan.rows
        limits = self.scheduler.limits
        assert plan.num_tokens <= limits.max_batch_tokens, f"{plan.num_tokens} tokens over budget"
        for name, values in (
            ("sequence", [row.seq_id for row in rows]),
            ("seat", [row.seat for row in rows]),
            ("dst", [row.dst.slot for row in rows]),
        ):
            assert len(set(values)) == len(values), f"two rows share a {name}: {values}"
        for row in rows:
            self._check_pages(row, {other.src.slot for other in rows if other is not row})
            self._check_row(row)
        planned = {row.seq_id for row in rows}
        for tracked in decoding:
            tracked.num_skipped = 0 if tracked.seq.seq_id in planned else tracked.num_skipped + 1
            most = 0 if limits.decode_first else DECODE_INTERVAL - 1
            assert tracked.num_skipped <= most, f"decode of {tracked.seq.seq_id} starves"
        self._check_admission_order(planned, waiting)

    def _check_pages(self, row: Row, other_srcs: set[int]) -> None:
        """Rows of one plan run in no order; those of different plans do."""
        tracked = self.tracked[row.seq_id]
        assert row.dst.slot != ZERO_SLOT, "a row writes the zero page"
        assert self.pool.is_current(row.dst), f"{row.dst} is not live"
        assert not self.pool.is_frozen(row.dst), f"{row.dst} is frozen"
        assert row.dst.slot not in other_srcs, f"{row.dst} is read by another row"
        if tracked.num_fed == 0:
            self._check_origin(tracked, row)
        else:
            assert row.src == tracked.dst, f"{row.seq_id} reads {row.src}, not what it wrote"
            self._check_fork(tracked, row)
        tracked.dst = row.dst
        self.writers[row.dst] = tracked

    def _check_fork(self, tracked: Tracked, row: Row) -> None:
        if row.src != row.dst:
            assert tracked.num_fed % self.setup.paragraph_len == 0, "a snapshot off the grid"
            assert not self.pool.is_current(row.src) or self.pool.is_frozen(row.src), (
                f"{row.src} was left but can be written"
            )
            self.num_forks += 1

    def _check_origin(self, tracked: Tracked, row: Row) -> None:
        """The first row: from nothing, or from a snapshot of the same tenant on the grid."""
        assert row.position == tracked.seq.num_cached_tokens, "the count of cached tokens is wrong"
        assert row.position < len(tracked.request.prompt_ids), "nothing is left to give logits"
        tracked.num_fed = tracked.num_cached = row.position
        if row.position == 0:
            assert row.src == self.pool.zero, f"{row.seq_id} begins from {row.src}"
            return
        assert self.setup.has_cache, "a hit without a cache"
        assert row.src in self.writers, f"{row.seq_id} begins from {row.src}, which nobody wrote"
        salt = self.writers[row.src].request.cache_salt
        assert salt == tracked.request.cache_salt, "a page of another salt is read"
        is_taken_over = row.src.slot == row.dst.slot
        assert is_taken_over or self.pool.is_frozen(row.src), f"{row.src} can be written"
        self.num_hits += 1

    def _check_row(self, row: Row) -> None:
        tracked = self.tracked[row.seq_id]
        prompt, length = tracked.request.prompt_ids, self.setup.paragraph_len
        assert not tracked.seq.is_finished, f"a row for {row.seq_id}, which has ended"
        assert row.position == tracked.num_fed, f"{row.seq_id} goes on at {row.position}"
        end = tracked.num_fed + row.num_tokens
        assert row.num_tokens > 0, "an empty row"
        if row.tokens is None:
            assert row.num_tokens == 1, f"a decode row of {row.num_tokens} tokens"
            assert tracked.is_runnable_decode, f"{row.seq_id} has nothing to decode"
        else:
            assert row.tokens == prompt[tracked.num_fed : end], f"wrong tokens for {row.seq_id}"
            assert tracked.num_fed % length == 0, f"a chunk begins at {tracked.num_fed}"
            assert end == len(prompt) or end % length == 0, f"a chunk is ragged at {end}"
        assert row.sample == (end >= len(prompt)), f"draw of {row.seq_id} at {end} is wrong"
        tracked.num_fed = end
        tracked.num_draws += row.sample

    def _check_admission_order(self, planned: set[int], waiting: list[Tracked]) -> None:
        """Nobody is passed by but a prompt that begins like one being computed."""
        ranked = sorted(waiting, key=lambda tracked: tracked.seq.waiting_order)
        came_in = [tracked.seq.seq_id in planned for tracked in ranked]
        last = max((place for place, came in enumerate(came_in) if came), default=0)
        for tracked, came in zip(ranked[:last], came_in, strict=False):
            assert came or self._has_companion(tracked), f"{tracked.seq.seq_id} was passed by"

    def _has_companion(self, tracked: Tracked) -> bool:
        return len(tracked.chain) > 1 and any(
            other.num_fed > 0 and not other.seq.is_finished and tracked.chain[1] in other.chain
            for other in self.tracked.values()
        )

    def _take(self, plan: StepPlan, result: StepResult, progress: list[Progress]) -> None:
        if result.error is not None:
            for row in plan.rows:
                self.tracked[row.seq_id].has_failed_row = True
                assert self.tracked[row.seq_id].seq.is_finished, "a failed row goes on"
        for one in progress:
            tracked = self.tracked[one.seq.seq_id]
            assert one.seq is tracked.seq
            if one.token_id is None:
                assert one.seq.finish_reason is FinishReason.ERROR
                assert one.seq.error, "an error without words"
                pages = self.cache.index.victims()
                suspects = [page for page in pages if self.writers[page.slot] is tracked]
                assert result.error is not None or not suspects, (
                    "what led to bad logits can still be begun from"
                )
                continue
            place = len(tracked.tokens)
            tracked.tokens.append(one.token_id)
            self._file_states(tracked)
            expected = tracked.answer.token_ids
            assert place < len(expected), f"{one.seq.seq_id} goes on after its end"
            assert one.token_id == expected[place], f"token {place} of {one.seq.seq_id} is wrong"
