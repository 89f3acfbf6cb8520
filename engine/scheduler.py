"""Scheduler: which sequences run, and what each step computes. Knows no tensor, clock or text.

Pages: a sequence is admitted when a slot and a seat can be had; nothing it does later needs more
memory. Which slots a row reads and writes is the state cache's affair. A running sequence may give
way to one that waits, at the cost of one copy, and goes on later as if nothing had been.
Release is immediate, also with rows in flight: the device runs plans in order, so whoever gets
the slot or seat next comes after them, and their results are ignored at commit.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Collection
from itertools import count, islice
from time import perf_counter
from typing import NamedTuple

from engine.plan import BAD_TOKEN, NO_TOKEN, Draw, Row, SeatStart, StepPlan, StepResult
from engine.sequence import Sequence, SequenceStatus
from engine.state.cache import StateCache
from engine.state.owners import is_awaiting
from engine.turns import choose_victim
from engine.types import FinishReason, LiveLimits

# With decode_first = false a decode row runs at least in each such step, however much prefill
# waits: throughput for new requests costs running ones at most this factor.
DECODE_INTERVAL = 4
NO_TOKEN_LEFT = "the limits of its grammar, or what it forbids, leave no token to go on with"


class Progress(NamedTuple):
    """What a step means to a reader: a further token, or None: the sequence has ended without."""

    seq: Sequence
    token_id: int | None


class Scheduler:
    """Plans steps and commits their results, strictly in order.

    `max_batch_size` seats bound how many sequences run, the cache's slots likewise. Prefill goes
    in chunks of whole paragraphs counted from the left, only the last chunk is ragged, and chunks
    end where the cache asks for a snapshot; together with
    `max_batch_tokens >= max_batch_size + paragraph_len` this lets every step with prefill
    work advance some prompt by a paragraph at least, whatever is decoding.
    """

    def __init__(self, cache: StateCache, limits: LiveLimits, *, max_batch_size: int) -> None:
        if max_batch_size < 1:
            raise ValueError(f"max_batch_size = {max_batch_size}: must be at least 1")
        self.cache = cache
        self.max_batch_size = max_batch_size
        self.limits = self._checked(limits)
        self._waiting: list[Sequence] = []  # sorted by waiting_order; WAITING and SWAPPED ones
        self._running: dict[int, Sequence] = {}  # by seq_id, in order of admission
        self._swapped: dict[int, Sequence] = {}  # by seq_id
        self._ended: list[Progress] = []  # those that ended without a row
        self._free_seats = list(range(max_batch_size - 1, -1, -1))
        self._turns = count()
        self._num_planned_steps = 0
        self._num_committed_steps = 0

    @property
    def num_waiting(self) -> int:
        """Sequences that have not begun."""
        return len(self._waiting) - len(self._swapped)

    @property
    def num_running(self) -> int:
        """Sequences that have begun, those that gave way included."""
        return len(self._running) + len(self._swapped)

    @property
    def num_admissible(self) -> int:
        """How many sequences could be admitted now, memory and seats counted."""
        return min(len(self._free_seats), self.cache.tiers.num_available)

    def reconfigure(self, limits: LiveLimits) -> None:
        """Use new limits from the next plan on. Raises ValueError and keeps the old ones."""
        self.limits = self._checked(limits)

    def add(self, seq: Sequence) -> None:
        """Queue a sequence that has not begun, or one that was swapped out elsewhere."""
        assert seq.status in (SequenceStatus.WAITING, SequenceStatus.SWAPPED), f"{seq.status}"
        if seq.status is SequenceStatus.SWAPPED:
            self._swapped[seq.seq_id] = seq
        self._enqueue(seq)

    def take_waiting(self, staying: Collection[Sequence] = ()) -> list[Sequence]:
        """Hand over who has not begun and may leave, in order, but those who are `staying`; this
        scheduler forgets them."""
        taken = [seq for seq in self._waiting if seq.is_portable and seq not in staying]
        self._waiting = [seq for seq in self._waiting if seq not in taken]
        for seq in taken:
            self.cache.release(seq)
        return taken

    def swap_out(self, seq: Sequence) -> bool:
        """Take slot and seat from a running sequence; it waits to go on. False if it cannot be.

        For before a plan: the copy is a move of the next one.
        """
        if seq.status is not SequenceStatus.RUNNING or not self.cache.can_swap_out(seq):
            return False
        if not self.cache.swap_out(seq):
            return False
        self._leave_seat(seq)
        seq.status = SequenceStatus.SWAPPED
        self._swapped[seq.seq_id] = seq
        return True

    def set_aside(self, seq: Sequence) -> bool:
        """Keep a sequence from going on: it waits no more, and what runs is swapped out first.

        False if that is not possible just now. Then `add` puts it back, `finish` ends it.
        """
        if seq.status is SequenceStatus.RUNNING:
            return self.swap_out(seq)
        if seq in self._waiting:
            self._waiting.remove(seq)
        return not seq.is_finished

    def finish(self, seq: Sequence, reason: FinishReason, error: str | None = None) -> None:
        """End a sequence now. Its slot and seat are free when this returns."""
        assert not seq.is_finished, f"sequence {seq.seq_id} finished twice"
        was_running = seq.status is SequenceStatus.RUNNING
        seq.status, seq.finish_reason, seq.error = SequenceStatus.FINISHED, reason, error
        if was_running:
            self._leave_seat(seq)
        else:
            self._swapped.pop(seq.seq_id, None)
            if seq in self._waiting:  # not while it is being suspended
                self._waiting.remove(seq)
        self.cache.release(seq)

    def plan(self) -> StepPlan | None:
        """The next step, or None when nobody can be given a row now and nothing is to be moved."""
        budget = self.limits.max_batch_tokens
        self.cache.begin_plan()
        self._give_way()
        self.cache.reserve(self._num_next())
        decoding = [seq for seq in self._running.values() if seq.can_decode]
        due = [seq for seq in decoding if self._is_due(seq)]
        others = [seq for seq in decoding if not self._is_due(seq)]
        rows = self._decode_rows(due)
        prefill_rows, starts = self._prefill_rows(budget - len(rows))
        rows += prefill_rows
        num_left = budget - sum(row.num_tokens for row in rows)
        rows += self._decode_rows(others[:num_left])
        for seq in others[num_left:]:
            seq.num_skipped_steps += 1
        moves = self.cache.end_plan()
        if not rows and not moves:
            return None
        plan = StepPlan(self._num_planned_steps, tuple(rows), tuple(starts), moves)
        self._num_planned_steps += 1
        return plan

    def take_ended(self) -> list[Progress]:
        """Those that have ended in a plan without a row: nothing was to be computed, or their
        state was lost."""
        ended, self._ended = self._ended, []
        return ended

    def commit(self, plan: StepPlan, result: StepResult) -> list[Progress]:
        """Take in the result of the oldest plan in flight; a Progress per sequence that drew
        a token or ended.

        Rows of sequences that ended meanwhile are ignored. A failed step ends every sequence
        that had a row in it.
        """
        assert plan.step_id == result.step_id == self._num_committed_steps, (
            f"plan {plan.step_id} and result {result.step_id} at step {self._num_committed_steps}"
        )
        self._num_committed_steps += 1
        self.cache.commit(plan, has_failed=result.error is not None)
        if result.error is not None:
            return self._fail_rows(plan, result.error)
        progress = []
        for row, draw, scores, hidden in result.by_row(plan):
            seq = self._begun(row.seq_id)
            if seq is None:
                continue
            seq.hidden = hidden
            seq.num_computed += row.num_tokens
            seq.num_rows_in_flight -= 1
            seq.owes_draw = False
            if scores is not None:
                seq.take_scores(scores)
            if draw is None or draw.token_id != BAD_TOKEN:
                self.cache.publish(seq)
            if draw is not None:
                progress.append(self._take_draw(seq, draw))
        return progress

    def check(self) -> None:
        """Raise AssertionError if any invariant is broken. O(slots + sequences)."""
        running = list(self._running.values())
        self.cache.check([*running, *self._swapped.values()])
        seats = [seq.seat for seq in running] + self._free_seats
        assert sorted(seat for seat in seats if seat is not None) == list(
            range(self.max_batch_size)
        ), f"seats lost or shared: {seats}"
        order = [seq.waiting_order for seq in self._waiting]
        assert order == sorted(order), "the waiting are out of order"
        swapped = [seq for seq in self._waiting if seq.status is SequenceStatus.SWAPPED]
        assert {seq.seq_id for seq in swapped} <= self._swapped.keys(), "a swapped one is lost"
        for seq in self._waiting:
            assert (seq.slot, seq.seat) == (None, None), f"waiting {seq.seq_id} owns a place"
            is_new = seq.status is SequenceStatus.WAITING
            assert not is_new or seq.num_planned == 0, f"waiting {seq.seq_id} has rows planned"
        for seq in [*running, *swapped]:
            self._check_cursors(seq)

    def _begun(self, seq_id: int) -> Sequence | None:
        return self._running.get(seq_id) or self._swapped.get(seq_id)

    def _enqueue(self, seq: Sequence, *, keeps_turn: bool = False) -> None:
        if not keeps_turn:
            seq.turn_number = next(self._turns)
        insort(self._waiting, seq, key=lambda other: other.waiting_order)

    def _give_way(self) -> None:
        """Let a running sequence wait if one that waits has more right to its place."""
        if not self._waiting or (self._free_seats and self.cache.tiers.has_more_than(0)):
            return
        ready = (seq for seq in self._waiting if not self.cache.must_wait(seq))
        first = next(islice(ready, 1), None)
        if first is None:
            return
        victim = choose_victim(
            (seq for seq in self._running.values() if self.cache.can_swap_out(seq)),
            first,
            self.limits.time_slice_tokens,
        )
        if victim is not None and self.swap_out(victim):
            # Who gives way to priority is the next one of its own.
            self._enqueue(victim, keeps_turn=victim.request.priority < first.request.priority)

    def _is_due(self, seq: Sequence) -> bool:
        """This decode row goes before any prefill."""
        return self.limits.decode_first or seq.num_skipped_steps >= DECODE_INTERVAL - 1

    def _decode_rows(self, seqs: list[Sequence]) -> list[Row]:
        for seq in seqs:
            seq.num_skipped_steps = 0
        return [self._row(seq, 1) for seq in seqs]

    def _prefill_rows(self, budget: int) -> tuple[list[Row], list[SeatStart]]:
        """Chunks of running prompts, then of new ones, until the head of the line has no room."""
        rows: list[Row] = []
        starts: list[SeatStart] = []
        for seq in [seq for seq in self._running.values() if seq.needs_prefill]:
            num_tokens = self._chunk_len(seq, budget)
            if num_tokens == 0:
                return rows, starts
            rows.append(self._row(seq, num_tokens))
            budget -= num_tokens
        num_passed = 0  # of those who wait for what others compute
        while num_passed < len(self._waiting) and self._free_seats:
            seq = self._waiting[num_passed]
            if self._ends_at_once(seq):
                continue
            if self.cache.must_wait(seq):
                num_passed += 1
                continue
            if budget < min(self._num_rest(seq), self.cache.paragraph_len):
                break
            if not self.cache.admit(seq):
                break
            del self._waiting[num_passed]
            starts.append(self._start(seq))
            for other in self._waiting[num_passed : num_passed + len(self._free_seats)]:
                if self.cache.may_share(seq, other):
                    self.cache.must_wait(other)  # it may ask for a snapshot where this row must end
            rows.append(self._row(seq, 1 if seq.can_decode else self._chunk_len(seq, budget)))
            budget -= rows[-1].num_tokens
        return rows, starts

    def _ends_at_once(self, seq: Sequence) -> bool:
        """There is nothing to compute for this sequence, or nothing to compute it from."""
        if self.cache.is_lost(seq):
            self.finish(seq, FinishReason.ERROR, "the state it was to go on from is lost")
        elif self.cache.has_whole(seq):
            self.finish(seq, FinishReason.LENGTH)
        else:
            return False
        self._ended.append(Progress(seq, None))
        return True

    def _num_rest(self, seq: Sequence) -> int:
        """Tokens that a waiting sequence has to feed until its next draw."""
        if seq.status is SequenceStatus.SWAPPED:
            return max(seq.num_prompt_tokens - seq.num_planned, 1)
        return seq.num_prompt_tokens - self.cache.num_cached(seq)

    def _num_next(self) -> int:
        """How many may be admitted now, if the budget allows: they need slots."""
        num_seats = len(self._free_seats)
        ready = (seq for seq in self._waiting if not is_awaiting(seq))
        return sum(1 for _ in islice(ready, num_seats))

    def _chunk_len(self, seq: Sequence, budget: int) -> int:
        """Tokens of the next prefill row: up to where it is to stop, or whole paragraphs of it."""
        num_rest = self.cache.next_stop(seq) - seq.num_planned
        if num_rest <= budget:
            return num_rest
        end = seq.num_planned + budget
        return budget - end % self.cache.paragraph_len

    def _start(self, seq: Sequence) -> SeatStart:
        seq.seat = self._free_seats.pop()
        seq.status, seq.num_slice_tokens = SequenceStatus.RUNNING, 0
        if seq.admitted_s is None:
            seq.admitted_s = perf_counter()
        self._swapped.pop(seq.seq_id, None)
        self._running[seq.seq_id] = seq
        return SeatStart(seq.seat, seq.request.sampling, tuple(seq.output_ids))

    def _leave_seat(self, seq: Sequence) -> None:
        assert seq.seat is not None, f"sequence {seq.seq_id} runs without a seat"
        self._free_seats.append(seq.seat)
        seq.seat = None
        del self._running[seq.seq_id]

    def _row(self, seq: Sequence, num_tokens: int) -> Row:
        """The sequence's next tokens. None, where it draws from logits that were kept."""
        assert seq.seat is not None, f"sequence {seq.seq_id} has no seat"
        is_draw = seq.owes_draw and seq.num_rows_in_flight == 0
        is_decode = seq.can_decode and not is_draw
        num_tokens = 0 if is_draw else num_tokens
        src, dst = self.cache.advance(seq)
        begin, end = seq.num_planned, seq.num_planned + num_tokens
        seq.num_planned = end
        seq.num_rows_in_flight += 1
        seq.num_slice_tokens += is_decode
        return Row(
            seq_id=seq.seq_id,
            seat=seq.seat,
            tokens=None if is_decode else seq.request.prompt_ids[begin:end],
            num_tokens=num_tokens,
            position=seq.num_base_tokens + begin,
            src=src,
            dst=dst,
            sample=end >= seq.num_prompt_tokens,  # also to see that a state to keep is sound
            keep_logits=num_tokens > 0 and not is_decode and self.cache.keeps_logits(seq, end),
            targets=seq.targets(begin, end),
            returns_hidden=seq.request.returns_hidden and end == seq.num_prompt_tokens,
        )

    def _take_draw(self, seq: Sequence, draw: Draw) -> Progress:
        token_id = draw.token_id
        has_grammar = seq.request.sampling.grammar is not None
        if token_id == BAD_TOKEN:
            position = seq.num_base_tokens + seq.num_computed
            self.cache.forget(seq)
            self.finish(seq, FinishReason.ERROR, f"logits of token {position} are not finite")
        elif seq.max_tokens == 0:
            self.finish(seq, FinishReason.LENGTH)
        elif token_id == NO_TOKEN and has_grammar:  # what there is does not match it
            self.finish(seq, FinishReason.ERROR, NO_TOKEN_LEFT)
        elif token_id == NO_TOKEN:
            self.finish(seq, FinishReason.STOP)
        else:
            seq.take_draw(draw)
            if token_id in seq.request.sampling.stop_token_ids:
                self.finish(seq, FinishReason.STOP)
            elif len(seq.output_ids) == seq.max_tokens:
                self.finish(seq, FinishReason.LENGTH)
            return Progress(seq, token_id)
        return Progress(seq, None)

    def _fail_rows(self, plan: StepPlan, error: str) -> list[Progress]:
        seqs = [seq for row in plan.rows if (seq := self._begun(row.seq_id)) is not None]
        for seq in seqs:
            self.finish(seq, FinishReason.ERROR, error)
        return [Progress(seq, None) for seq in seqs]

    def _checked(self, limits: LiveLimits) -> LiveLimits:
        least = self.max_batch_size + self.cache.paragraph_len
        if limits.max_batch_tokens < least:
            raise ValueError(
                f"max_batch_tokens = {limits.max_batch_tokens}: must be at least max_batch_size"
                f" + paragraph_len = {least}, so that prefill advances beside a full batch"
            )
        return limits

    def _check_cursors(self, seq: Sequence) -> None:
        num_prompt = seq.num_prompt_tokens
        assert seq.num_computed <= seq.num_planned, f"{seq.seq_id} computed more than planned"
        end = num_prompt + max(seq.max_tokens, 1)
        assert seq.num_planned < end, f"{seq.seq_id} planned too far"
        assert not seq.needs_prefill or seq.num_planned % self.cache.paragraph_len == 0, (
            f"{seq.seq_id} stands at {seq.num_planned}, off the paragraph grid"
        )
        num_drawn = max(0, seq.num_computed - num_prompt + 1) - seq.owes_draw
        assert len(seq.output_ids) == num_drawn, f"{seq.seq_id} lost or gained a token"
