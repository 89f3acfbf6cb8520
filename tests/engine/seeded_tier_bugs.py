"""Bugs in tiers and files, put in on purpose.

The books' own checks are switched off where they would notice at once, as for the other lists.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import replace

from engine.plan import PageMove, SlotRef, StepPlan
from engine.sequence import Sequence
from engine.state.cache import StateCache
from engine.state.files import PageFiles
from engine.state.matching import Matching
from engine.state.page import DiskResult, Page, PageFile, ReadFile, WriteFile
from engine.state.pool import SlotPool
from engine.state.tiers import PageTiers
from tests.engine.seeded_bugs import Bug, Patch
from tests.engine.seeded_cache_bugs import without_check


def frames_of(tiers: PageTiers) -> SlotPool:
    assert tiers.frames is not None
    return tiers.frames


# Moves


def frame_is_released_when_its_move_is_planned(patch: Patch) -> None:
    end_plan, commit = PageTiers.end_plan, PageTiers.commit

    def release(self: PageTiers) -> tuple[PageMove, ...]:
        moves = end_plan(self)
        for move in moves:
            frames_of(self).release(move.frame)
        return moves

    def balance(self: PageTiers, plan: StepPlan, *, has_failed: bool = False) -> None:
        for move in plan.moves:
            if frames_of(self).is_current(move.frame):
                frames_of(self).retain(move.frame)
        kept = tuple(move for move in plan.moves if frames_of(self).is_current(move.frame))
        commit(self, replace(plan, moves=kept), has_failed=has_failed)

    patch.setattr(PageTiers, "end_plan", release)
    patch.setattr(PageTiers, "commit", balance)


def page_is_loaded_before_its_store_is_certain(patch: Patch) -> None:
    patch.setattr(PageTiers, "is_settled", lambda self, page: page.frame is not None)


def moves_are_made_in_the_wrong_order(patch: Patch) -> None:
    end_plan = PageTiers.end_plan
    patch.setattr(PageTiers, "end_plan", lambda self: end_plan(self)[::-1])


def moves_leave_the_logits_behind(patch: Patch) -> None:
    end_plan = PageTiers.end_plan
    patch.setattr(
        PageTiers,
        "end_plan",
        lambda self: tuple(replace(move, has_logits=False) for move in end_plan(self)),
    )


def promoted_slot_is_published_when_it_is_planned(patch: Patch) -> None:
    load = PageTiers.load

    def early(self: PageTiers, page: Page, slot: SlotRef, *, promotes: bool = False) -> None:
        load(self, page, slot, promotes=promotes)
        if promotes:
            self._promoted.pop(slot)
            self.place(page, slot)

    patch.setattr(PageTiers, "load", early)


def failed_load_is_published(patch: Patch) -> None:
    loaded = PageTiers._loaded
    patch.setattr(PageTiers, "_loaded", lambda self, slot, has_failed: loaded(self, slot, False))


def promoted_slot_is_left_live(patch: Patch) -> None:
    freeze, load = SlotPool.freeze, PageTiers.load

    def live(self: PageTiers, page: Page, slot: SlotRef, *, promotes: bool = False) -> None:
        patch.setattr(SlotPool, "freeze", lambda self, ref: None)
        load(self, page, slot, promotes=promotes)
        patch.setattr(SlotPool, "freeze", freeze)

    patch.setattr(PageTiers, "load", live)
    without_check(patch)


def frame_of_a_failed_store_is_kept(patch: Patch) -> None:
    stored = PageTiers._stored
    patch.setattr(PageTiers, "_stored", lambda self, frame, has_failed: stored(self, frame, False))


def failed_store_of_a_held_page_loses_it(patch: Patch) -> None:
    stored = PageTiers._stored

    def give_up(self: PageTiers, frame: SlotRef, has_failed: bool) -> None:
        page = self._filled[frame]
        stored(self, frame, has_failed)
        if has_failed and page is not None and page.slot is not None:
            self.drop(page)

    patch.setattr(PageTiers, "_stored", give_up)


# Frames


def page_keeps_a_frame_that_was_taken_from_it(patch: Patch) -> None:
    def leave_frame(self: PageTiers, page: Page) -> None:
        assert page.frame is not None
        frames_of(self).release(page.frame)
        self.in_host.remove(page)

    patch.setattr(PageTiers, "_leave_frame", leave_frame)
    patch.setattr(PageTiers, "check", lambda self: None)


def frame_is_taken_from_a_page_that_is_needed(patch: Patch) -> None:
    def sort(self: PageTiers, page: Page) -> None:
        if page.frame is not None:
            self.in_host.insert(page)
        else:
            self.in_host.remove(page)

    patch.setattr(PageTiers, "_sort", sort)


def frame_to_begin_from_is_taken_while_room_is_made(patch: Patch) -> None:
    patch.setattr(PageTiers, "frame_held", lambda self, page: nullcontext())


def demotion_loses_a_page_that_is_held(patch: Patch) -> None:
    def may_leave(self: PageTiers, page: Page) -> bool:
        assert page.slot is not None
        return page.slot not in self._reading and self.slots.refs(page.slot) == 1

    patch.setattr(PageTiers, "_may_leave", may_leave)
    patch.setattr(PageTiers, "demote", PageTiers._leave_slot)


def held_page_is_bound_to_its_slot(patch: Patch) -> None:
    """Found by the property: nobody could begin any more."""
    patch.setattr(PageTiers, "secure", lambda self, page: True)
    patch.setattr(PageTiers, "keep_safe", lambda self, page: None)


def frame_for_a_state_is_counted_twice(patch: Patch) -> None:
    """Found by the property: who was let pass by the one that waits for a frame could not begin."""

    def lacks_frame(self: Matching, page: Page | None) -> bool:
        is_loaded = page is not None and page.slot is None and page in self._tiers.in_host
        return self._tiers.num_frames_available <= is_loaded

    patch.setattr(Matching, "_lacks_frame", lacks_frame)


def frame_for_a_state_leaks(patch: Patch) -> None:
    release = StateCache.release

    def leaky(self: StateCache, seq: Sequence) -> None:
        seq.frame = None
        release(self, seq)

    patch.setattr(StateCache, "release", leaky)


# Files


def file_is_written_before_its_frame_is_filled(patch: Patch) -> None:
    store_into = PageTiers.store_into

    def early(self: PageTiers, page: Page, frame: SlotRef) -> None:
        store_into(self, page, frame)
        self._write(page)

    patch.setattr(PageTiers, "store_into", early)


def write_does_not_hold_its_frame(patch: Patch) -> None:
    finish_job = PageTiers.finish_job

    def write(self: PageTiers, page: Page) -> None:
        if self.files.wants(page):
            assert page.frame is not None
            self.files.write(page, page.frame)

    def finish(self: PageTiers, result: DiskResult) -> None:
        if isinstance(result.job, WriteFile):
            self.files.written(result.job, result.error)
        else:
            finish_job(self, result)

    patch.setattr(PageTiers, "_write", write)
    patch.setattr(PageTiers, "finish_job", finish)


def failed_write_counts_as_a_file(patch: Patch) -> None:
    written = PageFiles.written
    patch.setattr(PageFiles, "written", lambda self, job, error: written(self, job, None))


def failed_read_is_published(patch: Patch) -> None:
    was_read = PageFiles.was_read
    patch.setattr(PageFiles, "was_read", lambda self, job, error: was_read(self, job, None))


def frame_of_a_failed_read_leaks(patch: Patch) -> None:
    finish_job = PageTiers.finish_job

    def finish(self: PageTiers, result: DiskResult) -> None:
        if isinstance(result.job, ReadFile) and result.error:
            frames_of(self).retain(result.job.frame)
        finish_job(self, result)

    patch.setattr(PageTiers, "finish_job", finish)


def file_that_cannot_be_read_stays(patch: Patch) -> None:
    def was_read(self: PageFiles, job: ReadFile, error: str | None) -> Page | None:
        page = self._reads.pop(job.file.digest)
        return page if error is None and page.exists else None

    patch.setattr(PageFiles, "was_read", was_read)


def file_is_read_twice_at_once(patch: Patch) -> None:
    patch.setattr(PageFiles, "is_reading", lambda self, page: False)


def late_write_brings_a_dropped_page_back(patch: Patch) -> None:
    written = PageFiles.written

    def revive(self: PageFiles, job: WriteFile, error: str | None) -> None:
        page = self._writes[job.file.digest]
        if error is None and not page.exists:
            page.has_file = True
        written(self, job, error)

    patch.setattr(PageFiles, "written", revive)


def late_write_of_a_dropped_page_stays_on_the_disk(patch: Patch) -> None:
    written = PageFiles.written

    def forget(self: PageFiles, job: WriteFile, error: str | None) -> None:
        is_dropped = not self._writes[job.file.digest].exists
        written(self, job, error)
        if is_dropped and error is None:
            self._jobs.pop()

    patch.setattr(PageFiles, "written", forget)


def file_of_a_held_page_is_trimmed(patch: Patch) -> None:
    def trim(self: PageFiles) -> None:
        while len(self.order) > self.max_files:
            self.delete(next(iter(self.order)))

    patch.setattr(PageFiles, "trim", trim)


def files_are_never_trimmed(patch: Patch) -> None:
    patch.setattr(PageFiles, "trim", lambda self: None)


def files_are_adopted_as_if_all_had_logits(patch: Patch) -> None:
    adopt_files = StateCache.adopt_files

    def adopt(self: StateCache, files: Iterable[PageFile]) -> None:
        adopt_files(self, [replace(file, has_logits=True) for file in files])

    patch.setattr(StateCache, "adopt_files", adopt)


TIER_BUGS: list[Bug] = [
    frame_is_released_when_its_move_is_planned,
    page_is_loaded_before_its_store_is_certain,
    moves_are_made_in_the_wrong_order,
    moves_leave_the_logits_behind,
    promoted_slot_is_published_when_it_is_planned,
    failed_load_is_published,
    promoted_slot_is_left_live,
    frame_of_a_failed_store_is_kept,
    failed_store_of_a_held_page_loses_it,
    page_keeps_a_frame_that_was_taken_from_it,
    frame_is_taken_from_a_page_that_is_needed,
    frame_to_begin_from_is_taken_while_room_is_made,
    demotion_loses_a_page_that_is_held,
    held_page_is_bound_to_its_slot,
    frame_for_a_state_is_counted_twice,
    frame_for_a_state_leaks,
    file_is_written_before_its_frame_is_filled,
    write_does_not_hold_its_frame,
    failed_write_counts_as_a_file,
    failed_read_is_published,
    frame_of_a_failed_read_leaks,
    file_that_cannot_be_read_stays,
    file_is_read_twice_at_once,
    late_write_brings_a_dropped_page_back,
    late_write_of_a_dropped_page_stays_on_the_disk,
    file_of_a_held_page_is_trimmed,
    files_are_never_trimmed,
    files_are_adopted_as_if_all_had_logits,
]
