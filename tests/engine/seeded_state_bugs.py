"""Bugs in kept logits, states that users keep, and preemption, put in on purpose.

The books' own checks are switched off where they would notice at once, as for the other lists.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from engine import scheduler as scheduler_module
from engine.plan import Row, SeatStart, SlotRef
from engine.scheduler import Scheduler
from engine.sequence import Sequence
from engine.state import matching as matching_module
from engine.state.cache import StateCache
from engine.state.matching import Matching
from engine.state.page import Page
from engine.state.prefix import root
from engine.state.snapshots import Snapshots
from engine.state.tiers import PageTiers
from engine.turns import choose_victim
from tests.engine import simulation as simulation_module
from tests.engine.seeded_bugs import Bug, Patch
from tests.engine.seeded_cache_bugs import without_check

# Kept logits


def end_of_a_shorter_prompt_is_taken_for_that_of_a_longer(patch: Patch) -> None:
    chain_up = Matching.chain_up

    def short(self: Matching, seq: Sequence) -> None:
        chain_up(self, seq)
        if len(seq.chain) > 1:
            seq.end_digest = seq.chain[-1]

    patch.setattr(Matching, "chain_up", short)


def end_without_logits_is_drawn_from(patch: Patch) -> None:
    match = Matching.match

    def careless(self: Matching, seq: Sequence) -> tuple[Page | None, int]:
        page = self._index.get(seq.end_digest) if seq.end_digest else None
        if page is not None and seq.num_prompt_tokens > 0 and self._is_usable(seq, page):
            return page, seq.num_prompt_tokens
        return match(self, seq)

    patch.setattr(Matching, "match", careless)


def page_without_logits_is_filed_as_one_with(patch: Patch) -> None:
    file = Snapshots._file

    def claim(self: Snapshots, seq: Sequence, digest: bytes, left: object) -> tuple[Page, bool]:
        page, is_new = file(self, seq, digest, left)  # type: ignore[arg-type]
        page.has_logits = True
        return page, is_new

    patch.setattr(Snapshots, "_file", claim)


def sequence_goes_on_from_its_own_slot_after_a_draw(patch: Patch) -> None:
    advance = StateCache.advance

    def forget(self: StateCache, seq: Sequence) -> tuple[SlotRef, SlotRef]:
        src, dst = advance(self, seq)
        if seq.origin is not None:
            self._let_origin_go(seq, is_read=True)
        return src, dst

    patch.setattr(StateCache, "advance", forget)


def page_to_draw_from_is_not_held_until_it_is_fed(patch: Patch) -> None:
    begin_from = StateCache._begin_from

    def careless(self: StateCache, seq: Sequence, page: Page, slot: SlotRef | None) -> None:
        begin_from(self, seq, page, slot)
        if seq.has_origin and seq.origin is not None:
            self.pool.release(seq.origin)
            seq.has_origin = False

    patch.setattr(StateCache, "_begin_from", careless)


# States to go on from, and kept states


def base_is_not_in_the_root_of_the_chain(patch: Patch) -> None:
    for module in (matching_module, simulation_module):
        patch.setattr(module, "root", lambda seed, salt, base: root(seed, salt))


def position_does_not_count_the_base(patch: Patch) -> None:
    row_of = Scheduler._row

    def row(self: Scheduler, seq: Sequence, num_tokens: int) -> Row:
        made = row_of(self, seq, num_tokens)
        return made._replace(position=made.position - seq.num_base_tokens)

    patch.setattr(Scheduler, "_row", row)


def page_does_not_count_the_tokens_of_its_base(patch: Patch) -> None:
    file = Snapshots._file

    def short(self: Snapshots, seq: Sequence, digest: bytes, left: object) -> tuple[Page, bool]:
        num_base_tokens, seq.num_base_tokens = seq.num_base_tokens, 0
        found = file(self, seq, digest, left)  # type: ignore[arg-type]
        seq.num_base_tokens = num_base_tokens
        return found

    patch.setattr(Snapshots, "_file", short)


def prompt_begins_from_nothing_instead_of_its_base(patch: Patch) -> None:
    match = Matching.match

    def from_nothing(self: Matching, seq: Sequence) -> tuple[Page | None, int]:
        page, num_tokens = match(self, seq)
        return (None if page is seq.base and seq.num_prompt_tokens else page), num_tokens

    patch.setattr(Matching, "match", from_nothing)


def kept_state_is_not_held(patch: Patch) -> None:
    keep = Snapshots._keep

    def loose(self: Snapshots, seq: Sequence, slot: SlotRef, frame: SlotRef) -> None:
        keep(self, seq, slot, frame)
        if seq.kept is not None:
            seq.kept.num_holders -= 1

    patch.setattr(Snapshots, "_keep", loose)


def state_found_whole_is_not_held(patch: Patch) -> None:
    has_whole = StateCache.has_whole

    def loose(self: StateCache, seq: Sequence) -> bool:
        is_whole = has_whole(self, seq)
        if is_whole and seq.kept is not None:
            seq.kept.num_holders -= 1
        return is_whole

    patch.setattr(StateCache, "has_whole", loose)


def state_let_go_leaks(patch: Patch) -> None:
    patch.setattr(StateCache, "let_go", lambda self, page, drops=False: self.tiers.unhold(page))


def state_let_go_stays_held(patch: Patch) -> None:
    patch.setattr(StateCache, "let_go", lambda self, page, drops=False: None)


def state_is_dropped_while_others_hold_it(patch: Patch) -> None:
    def let_go(self: StateCache, page: Page, *, drops: bool = False) -> None:
        self.tiers.unhold(page)
        self.tiers.drop(page)

    patch.setattr(StateCache, "let_go", let_go)


# Preemption


def snapshot_is_left_from_a_slot_that_is_being_loaded(patch: Patch) -> None:
    swap_in = StateCache._swap_in

    def ready(self: StateCache, seq: Sequence) -> bool:
        is_in = swap_in(self, seq)
        seq.is_loading = False
        return is_in

    patch.setattr(StateCache, "_swap_in", ready)


def change_starts(patch: Patch, cut: slice) -> None:
    start_of = Scheduler._start

    def start(self: Scheduler, seq: Sequence) -> SeatStart:
        made = start_of(self, seq)
        return replace(made, output_ids=made.output_ids[cut])

    patch.setattr(Scheduler, "_start", start)


def penalties_are_lost_on_the_way(patch: Patch) -> None:
    change_starts(patch, slice(-1, None))


def newest_token_is_lost_on_the_way(patch: Patch) -> None:
    change_starts(patch, slice(None, -1))


def sequence_comes_back_with_rows_in_flight(patch: Patch) -> None:
    must_wait = Matching.must_wait

    def hasty(self: Matching, seq: Sequence) -> bool:
        is_settled = seq.parked is not None and self._tiers.is_settled(seq.parked)
        return must_wait(self, seq) if seq.parked is None else not is_settled

    patch.setattr(Matching, "must_wait", hasty)
    patch.setattr(Sequence, "is_settled", property(lambda seq: True))


def parked_state_is_stored_before_its_last_row(patch: Patch) -> None:
    store = PageTiers.store

    def early(self: PageTiers, slot: SlotRef, frame: SlotRef, page: Page) -> None:
        store(self, slot, frame, page)
        if not page.digest:
            page.num_tokens -= 1

    patch.setattr(PageTiers, "store", early)


def sequence_that_has_only_drawn_is_swapped_out(patch: Patch) -> None:
    def can_swap_out(self: StateCache, seq: Sequence) -> bool:
        if seq.origin is not None and seq.has_origin:
            self._let_origin_go(seq)
        return seq.can_decode or seq.needs_prefill

    patch.setattr(StateCache, "can_swap_out", can_swap_out)


def parked_state_leaks_at_the_end(patch: Patch) -> None:
    release = StateCache.release

    def leaky(self: StateCache, seq: Sequence) -> None:
        seq.parked = None
        release(self, seq)

    patch.setattr(StateCache, "release", leaky)


def slot_of_who_gave_way_is_not_released(patch: Patch) -> None:
    swap_out = StateCache.swap_out

    def leaky(self: StateCache, seq: Sequence) -> bool:
        slot = seq.slot
        assert slot is not None
        self.pool.retain(slot)
        is_out = swap_out(self, seq)
        if not is_out:
            self.pool.release(slot)
        return is_out

    patch.setattr(StateCache, "swap_out", leaky)
    without_check(patch)


def time_slice_ignores_priority(patch: Patch) -> None:
    def choose(
        running: Iterable[Sequence], first: Sequence, time_slice_tokens: int
    ) -> Sequence | None:
        due = [seq for seq in running if 0 < time_slice_tokens <= seq.num_slice_tokens]
        return max(due, key=lambda seq: seq.num_slice_tokens, default=None)

    patch.setattr(scheduler_module, "choose_victim", choose)


def time_slice_is_not_read(patch: Patch) -> None:
    patch.setattr(
        scheduler_module, "choose_victim", lambda seqs, first, _: choose_victim(seqs, first, 1)
    )


def who_gave_way_to_priority_loses_its_turn(patch: Patch) -> None:
    enqueue = Scheduler._enqueue
    patch.setattr(Scheduler, "_enqueue", lambda self, seq, keeps_turn=False: enqueue(self, seq))


def who_had_its_time_slice_keeps_its_turn(patch: Patch) -> None:
    enqueue = Scheduler._enqueue

    def stay(self: Scheduler, seq: Sequence, *, keeps_turn: bool = False) -> None:
        enqueue(self, seq, keeps_turn=keeps_turn or seq.parked is not None)

    patch.setattr(Scheduler, "_enqueue", stay)


def who_gave_way_never_comes_back(patch: Patch) -> None:
    must_wait = Matching.must_wait
    patch.setattr(
        Matching, "must_wait", lambda self, seq: seq.parked is not None or must_wait(self, seq)
    )


STATE_BUGS: list[Bug] = [
    end_of_a_shorter_prompt_is_taken_for_that_of_a_longer,
    end_without_logits_is_drawn_from,
    page_without_logits_is_filed_as_one_with,
    sequence_goes_on_from_its_own_slot_after_a_draw,
    page_to_draw_from_is_not_held_until_it_is_fed,
    base_is_not_in_the_root_of_the_chain,
    position_does_not_count_the_base,
    page_does_not_count_the_tokens_of_its_base,
    prompt_begins_from_nothing_instead_of_its_base,
    kept_state_is_not_held,
    state_found_whole_is_not_held,
    state_let_go_leaks,
    state_let_go_stays_held,
    state_is_dropped_while_others_hold_it,
    snapshot_is_left_from_a_slot_that_is_being_loaded,
    penalties_are_lost_on_the_way,
    newest_token_is_lost_on_the_way,
    sequence_comes_back_with_rows_in_flight,
    parked_state_is_stored_before_its_last_row,
    sequence_that_has_only_drawn_is_swapped_out,
    parked_state_leaks_at_the_end,
    slot_of_who_gave_way_is_not_released,
    time_slice_ignores_priority,
    time_slice_is_not_read,
    who_gave_way_to_priority_loses_its_turn,
    who_had_its_time_slice_keeps_its_turn,
    who_gave_way_never_comes_back,
]
