"""Bugs, put in on purpose: each is a patch of the scheduler, the pool or the simulation.

Self-checks that would notice a bug at once are switched off with it where the point is that
the answers or the plans show it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from engine.plan import BAD_TOKEN, ZERO_SLOT, Draw, Row, SeatStart, SlotRef, StepPlan, StepResult
from engine.scheduler import Progress, Scheduler
from engine.sequence import Sequence
from engine.state.cache import StateCache
from engine.state.pool import SlotPool
from engine.types import FinishReason
from tests.engine.simulation import Simulation
from tests.hash_model import Page

Patch = pytest.MonkeyPatch
Bug = Callable[[Patch], None]


# Pages


def new_sequence_reads_its_slot_instead_of_the_zero_page(patch: Patch) -> None:
    advance = StateCache.advance

    def own(self: StateCache, seq: Sequence) -> tuple[SlotRef, SlotRef]:
        src, dst = advance(self, seq)
        is_fresh = dst.generation == 0  # that one would be noticed
        return (src if src.slot != ZERO_SLOT or is_fresh else dst), dst

    patch.setattr(StateCache, "advance", own)


def second_chunk_reads_the_zero_page_again(patch: Patch) -> None:
    advance = StateCache.advance

    def zero(self: StateCache, seq: Sequence) -> tuple[SlotRef, SlotRef]:
        src, dst = advance(self, seq)
        return (self.pool.zero if seq.needs_prefill else src), dst

    patch.setattr(StateCache, "advance", zero)


def page_is_reset_at_once_instead_of_in_the_plan(patch: Patch) -> None:
    plan_of = Simulation.plan

    def plan(self: Simulation) -> StepPlan | None:
        made = plan_of(self)
        if made is not None:
            for row in made.rows:
                if row.src.slot == ZERO_SLOT:
                    self.model.pages[row.dst.slot] = Page(0, row.dst.generation)
            in_place = [
                row._replace(src=row.dst) if row.src.slot == ZERO_SLOT else row for row in made.rows
            ]
            self.in_flight[-1] = replace(made, rows=tuple(in_place))
        return made

    patch.setattr(Simulation, "plan", plan)


def two_sequences_get_one_slot(patch: Patch) -> None:
    def alloc(self: SlotPool) -> SlotRef | None:
        if not self._free:
            return None
        slot = self._free[-1]
        self._refs[slot] += 1
        return SlotRef(slot, self._generations[slot])

    patch.setattr(SlotPool, "alloc", alloc)
    patch.setattr(SlotPool, "check", lambda self: None)
    patch.setattr(Scheduler, "check", lambda self: None)


def zero_page_is_handed_out(patch: Patch) -> None:
    init = SlotPool.__init__

    def with_zero(self: SlotPool, num_slots: int) -> None:
        init(self, num_slots)
        self._free[0] = ZERO_SLOT

    patch.setattr(SlotPool, "__init__", with_zero)
    patch.setattr(SlotPool, "check", lambda self: None)


def slot_is_not_released(patch: Patch) -> None:
    patch.setattr(SlotPool, "release", lambda self, ref: None)
    patch.setattr(Scheduler, "check", lambda self: None)


def slot_is_released_twice(patch: Patch) -> None:
    release = SlotPool.release

    def twice(self: SlotPool, ref: SlotRef) -> None:
        release(self, ref)
        self._free.append(ref.slot)

    patch.setattr(SlotPool, "release", twice)


def generation_does_not_grow(patch: Patch) -> None:
    release = SlotPool.release

    def forgetful(self: SlotPool, ref: SlotRef) -> None:
        release(self, ref)
        self._generations[ref.slot] = ref.generation

    patch.setattr(SlotPool, "release", forgetful)


def abort_leaks_its_slot(patch: Patch) -> None:
    finish = Scheduler.finish

    def leaky(
        self: Scheduler, seq: Sequence, reason: FinishReason, error: str | None = None
    ) -> None:
        if reason is FinishReason.ABORT and seq.slot is not None:
            self.cache.pool.retain(seq.slot)
        finish(self, seq, reason, error)

    patch.setattr(Scheduler, "finish", leaky)
    patch.setattr(Scheduler, "check", lambda self: None)


def slot_is_released_when_the_last_row_is_planned(patch: Patch) -> None:
    row_of, release = Scheduler._row, SlotPool.release

    def row(self: Scheduler, seq: Sequence, num_tokens: int) -> Row:
        made = row_of(self, seq, num_tokens)
        if seq.num_planned == seq.num_prompt_tokens + seq.max_tokens - 1:
            release(self.cache.pool, made.dst)
        return made

    def release_once(self: SlotPool, ref: SlotRef) -> None:
        if self.is_current(ref):
            release(self, ref)

    patch.setattr(Scheduler, "_row", row)
    patch.setattr(SlotPool, "release", release_once)
    patch.setattr(Scheduler, "check", lambda self: None)


# Seats


def reused_seat_is_not_started(patch: Patch) -> None:
    plan_of = Scheduler.plan

    def plan(self: Scheduler) -> StepPlan | None:
        made = plan_of(self)
        if made is None:
            return None
        starts = tuple(start for start in made.starts if made.step_id == 0 or start.seat > 0)
        return replace(made, starts=starts)

    patch.setattr(Scheduler, "plan", plan)


def start_carries_the_sampling_of_another(patch: Patch) -> None:
    start_of = Scheduler._start

    def mixed_up(self: Scheduler, seq: Sequence) -> SeatStart:
        start = start_of(self, seq)
        first = next(iter(self._running.values()))
        return replace(start, sampling=first.request.sampling)

    patch.setattr(Scheduler, "_start", mixed_up)


def seat_is_not_given_back(patch: Patch) -> None:
    leave_seat = Scheduler._leave_seat

    def leaky(self: Scheduler, seq: Sequence) -> None:
        leave_seat(self, seq)
        self._free_seats.pop()

    patch.setattr(Scheduler, "_leave_seat", leaky)
    patch.setattr(Scheduler, "check", lambda self: None)


def two_sequences_get_one_seat(patch: Patch) -> None:
    start_of = Scheduler._start

    def crowded(self: Scheduler, seq: Sequence) -> SeatStart:
        start = start_of(self, seq)
        self._free_seats.append(start.seat)
        return start

    patch.setattr(Scheduler, "_start", crowded)
    patch.setattr(Scheduler, "check", lambda self: None)


# Chunks and positions


def chunk_is_one_token_short(patch: Patch) -> None:
    chunk_len = Scheduler._chunk_len
    patch.setattr(
        Scheduler, "_chunk_len", lambda self, seq, budget: max(1, chunk_len(self, seq, budget) - 1)
    )


def middle_chunk_is_ragged(patch: Patch) -> None:
    patch.setattr(
        Scheduler,
        "_chunk_len",
        lambda self, seq, budget: min(budget, seq.num_prompt_tokens - seq.num_planned),
    )
    patch.setattr(Scheduler, "_check_cursors", lambda self, seq: None)


def change_rows(patch: Patch, change: Callable[[Row], Row]) -> None:
    row_of = Scheduler._row

    def row(self: Scheduler, seq: Sequence, num_tokens: int) -> Row:
        return change(row_of(self, seq, num_tokens))

    patch.setattr(Scheduler, "_row", row)


def position_is_off_by_one(patch: Patch) -> None:
    change_rows(patch, lambda row: row._replace(position=row.position + 1))


def decode_position_is_that_of_the_token_drawn(patch: Patch) -> None:
    change_rows(
        patch, lambda row: row._replace(position=row.position + 1) if row.tokens is None else row
    )


def each_chunk_draws(patch: Patch) -> None:
    change_rows(patch, lambda row: row._replace(sample=True))


def prompt_token_is_fed_twice(patch: Patch) -> None:
    def stutter(row: Row) -> Row:
        if not row.tokens or row.position == 0:
            return row
        return row._replace(tokens=(row.tokens[0], *row.tokens[:-1]))

    change_rows(patch, stutter)


# Order and limits


def look_ahead_ignores_max_tokens(patch: Patch) -> None:
    patch.setattr(Sequence, "can_decode", property(lambda seq: not seq.needs_prefill))
    patch.setattr(Scheduler, "_check_cursors", lambda self, seq: None)


def decode_waits_for_the_token_of_the_step_in_flight(patch: Patch) -> None:
    def can_decode(seq: Sequence) -> bool:
        num_drawn = seq.num_planned - seq.num_prompt_tokens + 1
        return 0 < num_drawn < seq.max_tokens and seq.num_planned == seq.num_computed

    patch.setattr(Sequence, "can_decode", property(can_decode))


def a_decode_row_is_skipped(patch: Patch) -> None:
    decode_rows = Scheduler._decode_rows
    patch.setattr(
        Scheduler,
        "_decode_rows",
        lambda self, seqs: decode_rows(self, seqs[:-1] if len(seqs) > 1 else seqs),
    )


def prefill_starves_decode(patch: Patch) -> None:
    patch.setattr(Scheduler, "_is_due", lambda self, seq: self.limits.decode_first)


def decode_first_is_not_read(patch: Patch) -> None:
    patch.setattr(Scheduler, "_is_due", lambda self, seq: seq.num_skipped_steps >= 3)


def decode_rows_are_not_in_the_budget(patch: Patch) -> None:
    prefill_rows = Scheduler._prefill_rows
    patch.setattr(
        Scheduler,
        "_prefill_rows",
        lambda self, budget: prefill_rows(self, self.limits.max_batch_tokens),
    )


def last_come_is_first_served(patch: Patch) -> None:
    def enqueue(self: Scheduler, seq: Sequence, *, keeps_turn: bool = False) -> None:
        self._waiting.insert(0, seq)

    patch.setattr(Scheduler, "_enqueue", enqueue)
    patch.setattr(Scheduler, "check", lambda self: None)


# Commit


def tokens_go_to_the_wrong_sequences(patch: Patch) -> None:
    commit = Scheduler.commit

    def crossed(self: Scheduler, plan: StepPlan, result: StepResult) -> list[Progress]:
        return commit(self, plan, replace(result, tokens=result.tokens[::-1]))

    patch.setattr(Scheduler, "commit", crossed)


def result_of_an_ended_row_goes_to_the_next_in_its_seat(patch: Patch) -> None:
    commit = Scheduler.commit

    def by_seat(self: Scheduler, plan: StepPlan, result: StepResult) -> list[Progress]:
        owners = {seq.seat: seq.seq_id for seq in self._running.values()}
        rows = tuple(row._replace(seq_id=owners.get(row.seat, row.seq_id)) for row in plan.rows)
        return commit(self, replace(plan, rows=rows), result)

    patch.setattr(Scheduler, "commit", by_seat)


def change_tokens(patch: Patch, change: Callable[[Sequence, int], int]) -> None:
    take_draw = Scheduler._take_draw

    def take(self: Scheduler, seq: Sequence, draw: Draw) -> Progress:
        return take_draw(self, seq, draw._replace(token_id=change(seq, draw.token_id)))

    patch.setattr(Scheduler, "_take_draw", take)


def bad_token_is_taken_for_a_token(patch: Patch) -> None:
    change_tokens(patch, lambda seq, token_id: max(token_id, 0))


def stop_token_is_overlooked(patch: Patch) -> None:
    take_draw = Scheduler._take_draw

    def take(self: Scheduler, seq: Sequence, draw: Draw) -> Progress:
        if draw.token_id == BAD_TOKEN or seq.max_tokens == 0:
            return take_draw(self, seq, draw)
        seq.take_draw(draw)
        if len(seq.output_ids) == seq.max_tokens:
            self.finish(seq, FinishReason.LENGTH)
        return Progress(seq, draw.token_id)

    patch.setattr(Scheduler, "_take_draw", take)


def failed_step_ends_only_its_first_row(patch: Patch) -> None:
    fail_rows = Scheduler._fail_rows

    def fail_first(self: Scheduler, plan: StepPlan, error: str) -> list[Progress]:
        return fail_rows(self, replace(plan, rows=plan.rows[:1]), error)

    patch.setattr(Scheduler, "_fail_rows", fail_first)
    patch.setattr(Scheduler, "_check_cursors", lambda self, seq: None)


BUGS: list[Bug] = [
    new_sequence_reads_its_slot_instead_of_the_zero_page,
    second_chunk_reads_the_zero_page_again,
    page_is_reset_at_once_instead_of_in_the_plan,
    two_sequences_get_one_slot,
    zero_page_is_handed_out,
    slot_is_not_released,
    slot_is_released_twice,
    generation_does_not_grow,
    abort_leaks_its_slot,
    slot_is_released_when_the_last_row_is_planned,
    reused_seat_is_not_started,
    start_carries_the_sampling_of_another,
    seat_is_not_given_back,
    two_sequences_get_one_seat,
    chunk_is_one_token_short,
    middle_chunk_is_ragged,
    position_is_off_by_one,
    decode_position_is_that_of_the_token_drawn,
    each_chunk_draws,
    prompt_token_is_fed_twice,
    look_ahead_ignores_max_tokens,
    decode_waits_for_the_token_of_the_step_in_flight,
    a_decode_row_is_skipped,
    prefill_starves_decode,
    decode_first_is_not_read,
    decode_rows_are_not_in_the_budget,
    last_come_is_first_served,
    tokens_go_to_the_wrong_sequences,
    result_of_an_ended_row_goes_to_the_next_in_its_seat,
    bad_token_is_taken_for_a_token,
    stop_token_is_overlooked,
    failed_step_ends_only_its_first_row,
]
