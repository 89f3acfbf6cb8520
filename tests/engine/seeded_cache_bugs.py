"""Bugs in the reuse of states, put in on purpose: patches of the state cache and its parts.

The cache's own check is switched off where it would notice at once: the plans, the pages or the
answers have to show it.
"""

from __future__ import annotations

from collections.abc import Sequence as Tokens

from engine.plan import PageMove, SlotRef, StepPlan
from engine.scheduler import Progress, Scheduler
from engine.sequence import FrozenSlot, Sequence
from engine.state import matching, owners, prefix
from engine.state.cache import StateCache
from engine.state.page import Page
from engine.state.pool import SlotPool
from engine.state.prefix import PrefixIndex, link, root
from engine.state.snapshots import Snapshots
from engine.state.tiers import PageTiers
from engine.types import FinishReason
from tests.engine import simulation as simulation_module
from tests.engine.seeded_bugs import Bug, Patch


def without_check(patch: Patch) -> None:
    patch.setattr(StateCache, "check", lambda self, running: None)


# Publishing


def page_is_published_when_it_is_planned(patch: Patch) -> None:
    def publish(self: StateCache, seq: Sequence) -> None:
        while seq.frozen:
            self.snapshots.publish_slot(seq, seq.frozen.pop(0))

    patch.setattr(StateCache, "publish", publish)


def page_of_a_failed_step_is_published(patch: Patch) -> None:
    fail_rows = Scheduler._fail_rows

    def fail(self: Scheduler, plan: StepPlan, error: str) -> list[Progress]:
        for row in plan.rows:
            seq = self._running.get(row.seq_id)
            while seq is not None and seq.frozen:
                self.cache.snapshots.publish_slot(seq, seq.frozen.pop(0))
        return fail_rows(self, plan, error)

    patch.setattr(Scheduler, "_fail_rows", fail)


def page_is_filed_one_paragraph_short(patch: Patch) -> None:
    publish_slot = Snapshots.publish_slot

    def short(self: Snapshots, seq: Sequence, left: FrozenSlot) -> None:
        num_tokens = max(left.num_tokens - self._paragraph_len, self._paragraph_len)
        is_short = left.is_end or left.num_tokens % self._paragraph_len
        publish_slot(self, seq, left if is_short else FrozenSlot(num_tokens, left.slot))

    patch.setattr(Snapshots, "publish_slot", short)


def slot_with_rows_in_flight_is_kept_at_the_end(patch: Patch) -> None:
    release = StateCache.release

    def keep(self: StateCache, seq: Sequence) -> None:
        seq.num_rows_in_flight = 0  # forgets the look-ahead
        release(self, seq)

    patch.setattr(StateCache, "release", keep)


def slot_of_a_failed_row_is_kept_at_the_end(patch: Patch) -> None:
    release = StateCache.release

    def keep(self: StateCache, seq: Sequence) -> None:
        reason = seq.finish_reason
        if reason is FinishReason.ERROR and seq.num_planned <= seq.num_prompt_tokens:
            seq.num_computed, seq.num_rows_in_flight = seq.num_planned, 0
            seq.finish_reason = None
        release(self, seq)
        seq.finish_reason = reason

    patch.setattr(StateCache, "release", keep)


def page_that_led_to_bad_logits_stays(patch: Patch) -> None:
    patch.setattr(StateCache, "forget", lambda self, seq: None)


# Freezing


def snapshot_is_written_in_place(patch: Patch) -> None:
    advance = StateCache.advance

    def in_place(self: StateCache, seq: Sequence) -> tuple[SlotRef, SlotRef]:
        src, dst = advance(self, seq)
        if src != dst and any(frozen.slot == src for frozen in seq.frozen):
            self.pool.release(dst)
            self.pool.retain(src)
            self.pool._frozen[src.slot] = False
            seq.slot = dst = src
        return src, dst

    patch.setattr(StateCache, "advance", in_place)
    without_check(patch)


def snapshot_is_not_frozen(patch: Patch) -> None:
    patch.setattr(SlotPool, "freeze", lambda self, ref: None)
    without_check(patch)


def snapshot_is_left_off_the_grid(patch: Patch) -> None:
    slot_to_go_on = Snapshots.slot_to_go_on

    def early(self: Snapshots, seq: Sequence) -> SlotRef | None:
        at = seq.num_planned
        if self._is_on and at > seq.num_prompt_tokens and at % self._paragraph_len == 1:
            return self._pool.alloc()
        return slot_to_go_on(self, seq)

    patch.setattr(Snapshots, "slot_to_go_on", early)
    patch.setattr(StateCache, "publish", lambda self, seq: None)
    without_check(patch)


# Matching


def whole_prompt_is_matched(patch: Patch) -> None:
    matches = PrefixIndex.matches
    patch.setattr(
        PrefixIndex, "matches", lambda self, chain, max_tokens: matches(self, chain, max_tokens + 1)
    )


def links_are_not_chained(patch: Patch) -> None:
    def alone(previous: bytes, tokens: Tokens[int]) -> bytes:
        return link(b"", tokens)

    for module in (prefix, simulation_module):
        patch.setattr(module, "link", alone)


def links_hold_the_first_token_only(patch: Patch) -> None:
    def first(previous: bytes, tokens: Tokens[int]) -> bytes:
        return link(previous, tokens[:1])

    for module in (prefix, simulation_module):
        patch.setattr(module, "link", first)


def salt_is_ignored(patch: Patch) -> None:
    for module in (matching, simulation_module):
        patch.setattr(module, "root", lambda seed, salt, base: root(seed, "", base))


def hit_begins_from_the_zero_page(patch: Patch) -> None:
    admit = StateCache.admit

    def from_zero(self: StateCache, seq: Sequence) -> bool:
        is_admitted = admit(self, seq)
        if seq.origin is not None and seq.has_origin:
            self.pool.release(seq.origin)
            seq.origin, seq.has_origin = self.pool.zero, False
        return is_admitted

    patch.setattr(StateCache, "admit", from_zero)


def hit_writes_into_the_page_it_reads(patch: Patch) -> None:
    admit = StateCache.admit

    def in_place(self: StateCache, seq: Sequence) -> bool:
        is_admitted = admit(self, seq)
        if is_admitted and seq.has_origin and seq.origin is not None and seq.slot is not None:
            self.pool.release(seq.slot)
            self.pool.retain(seq.origin)
            seq.slot = seq.origin
        return is_admitted

    patch.setattr(StateCache, "admit", in_place)
    without_check(patch)


def cached_tokens_are_one_paragraph_too_many(patch: Patch) -> None:
    admit = StateCache.admit

    def generous(self: StateCache, seq: Sequence) -> bool:
        is_admitted = admit(self, seq)
        further = seq.num_cached_tokens + self.paragraph_len
        if is_admitted and seq.num_cached_tokens > 0 and further < seq.num_prompt_tokens:
            seq.num_cached_tokens = seq.num_planned = seq.num_computed = further
        return is_admitted

    patch.setattr(StateCache, "admit", generous)


# Eviction and release


def page_is_evicted_while_the_plan_reads_it(patch: Patch) -> None:
    patch.setattr(PageTiers, "read", lambda self, slot: None)


def evicted_page_stays_in_the_index(patch: Patch) -> None:
    def leave_slot(self: PageTiers, page: Page) -> None:
        assert page.slot is not None
        self.slots.release(page.slot)
        self.on_device.remove(page)

    patch.setattr(PageTiers, "_leave_slot", leave_slot)
    without_check(patch)


def second_page_of_the_same_text_leaks(patch: Patch) -> None:
    file = Snapshots._file

    def file_or_leak(self: Snapshots, seq: Sequence, digest: bytes, left: FrozenSlot) -> object:
        old = self._index.get(digest)
        return file(self, seq, digest, left) if old is None else (old, False)

    patch.setattr(Snapshots, "_file", file_or_leak)
    without_check(patch)


def page_is_released_twice(patch: Patch) -> None:
    leave_slot = PageTiers._leave_slot

    def twice(self: PageTiers, page: Page) -> None:
        assert page.slot is not None
        slot = page.slot.slot
        leave_slot(self, page)
        self.slots._free.append(slot)

    patch.setattr(PageTiers, "_leave_slot", twice)
    patch.setattr(SlotPool, "check", lambda self: None)
    without_check(patch)


def snapshots_in_flight_leak_at_the_end(patch: Patch) -> None:
    release = StateCache.release

    def leaky(self: StateCache, seq: Sequence) -> None:
        seq.frozen.clear()
        release(self, seq)

    patch.setattr(StateCache, "release", leaky)
    without_check(patch)


def what_a_plan_reads_is_held_for_ever(patch: Patch) -> None:
    end_plan = PageTiers.end_plan

    def forgetful(self: PageTiers) -> tuple[PageMove, ...]:
        self._reading.clear()
        return end_plan(self)

    patch.setattr(PageTiers, "end_plan", forgetful)
    without_check(patch)


# Who goes first


def snapshots_keep_new_sequences_out(patch: Patch) -> None:
    take_slot = PageTiers.take_slot

    def only_free(self: PageTiers, spare: Page | None = None) -> SlotRef | None:
        return take_slot(self, spare) if self.slots.num_free else None

    patch.setattr(PageTiers, "take_slot", only_free)


def snapshots_take_the_slots_of_those_about_to_begin(patch: Patch) -> None:
    patch.setattr(Snapshots, "reserve", lambda self, num_reserved: None)


def whoever_waits_outlives_its_owner(patch: Patch) -> None:
    def may_leave(owner: Sequence, num_tokens: int) -> bool:
        return num_tokens >= owner.num_planned

    patch.setattr(owners, "_may_leave", may_leave)


def sequence_that_shares_nothing_waits(patch: Patch) -> None:
    must_wait = StateCache.must_wait

    def shy(self: StateCache, seq: Sequence) -> bool:
        return must_wait(self, seq) or bool(seq.seq_id % 2 and self.snapshots._num_reserved > 1)

    patch.setattr(StateCache, "must_wait", shy)


CACHE_BUGS: list[Bug] = [
    page_is_published_when_it_is_planned,
    page_of_a_failed_step_is_published,
    page_is_filed_one_paragraph_short,
    slot_with_rows_in_flight_is_kept_at_the_end,
    slot_of_a_failed_row_is_kept_at_the_end,
    page_that_led_to_bad_logits_stays,
    snapshot_is_written_in_place,
    snapshot_is_not_frozen,
    snapshot_is_left_off_the_grid,
    whole_prompt_is_matched,
    links_are_not_chained,
    links_hold_the_first_token_only,
    salt_is_ignored,
    hit_begins_from_the_zero_page,
    hit_writes_into_the_page_it_reads,
    cached_tokens_are_one_paragraph_too_many,
    page_is_evicted_while_the_plan_reads_it,
    evicted_page_stays_in_the_index,
    second_page_of_the_same_text_leaks,
    page_is_released_twice,
    snapshots_in_flight_leak_at_the_end,
    what_a_plan_reads_is_held_for_ever,
    snapshots_keep_new_sequences_out,
    snapshots_take_the_slots_of_those_about_to_begin,
    whoever_waits_outlives_its_owner,
    sequence_that_shares_nothing_waits,
]
