"""PageTiers against dicts, and case by case."""

from __future__ import annotations

import random

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from engine.plan import MoveKind, PageMove, SlotRef, StepPlan
from engine.state import files
from engine.state.page import DiskResult, Page, ReadFile, WriteFile
from engine.state.tiers import MAX_DEMOTIONS, PageTiers
from tests.engine.tier_model import ACTIONS, OPERATIONS, Operation, World

indices = st.integers(0, 9)
actions = st.lists(st.tuples(st.sampled_from(ACTIONS), indices), max_size=4)


class TiersMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.world = World(1, 0, 0)

    @initialize(
        num_slots=st.integers(1, 4), num_frames=st.integers(0, 4), max_files=st.sampled_from((0, 2))
    )
    def begin(self, num_slots: int, num_frames: int, max_files: int) -> None:
        self.world = World(num_slots, num_frames, max_files)

    @rule(actions=actions)
    def plan(self, actions: list[tuple[str, int]]) -> None:
        self.world.plan(actions)

    @rule(operation=st.sampled_from(OPERATIONS), index=indices)
    def operate(self, operation: Operation, index: int) -> None:
        operation(self.world, index)

    @invariant()
    def everything_is_where_it_should_be(self) -> None:
        self.world.check()

    def teardown(self) -> None:
        self.world.clear()


TestTiersMachine = TiersMachine.TestCase
TestTiersMachine.settings = settings(max_examples=100, stateful_step_count=50)


@pytest.mark.parametrize("seed", range(2))
def test_the_books_balance_after_10_000_rounds(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "PAUSE_AFTER_ERROR", 2)  # one job in five fails here
    dice = random.Random(seed)
    world = World(num_slots=4, num_frames=5, max_files=4)
    for _ in range(10_000):
        world.plan([(dice.choice(ACTIONS), dice.randrange(20)) for _ in range(dice.randrange(4))])
        world.check()
        for _ in range(3):
            dice.choice(OPERATIONS)(world, dice.randrange(20))
        world.check()
    tiers = world.tiers
    counts = (tiers.num_stores, tiers.num_loads, tiers.num_lost, tiers.files.num_written)
    assert min(*counts, tiers.files.num_read) > 100, counts  # all of it happened
    world.clear()


# Case by case


def page_in_slot(tiers: PageTiers, number: int, num_tokens: int = 256) -> Page:
    """A page that a committed step has left."""
    slot = tiers.take_slot()
    assert slot is not None
    tiers.slots.freeze(slot)
    page = Page(bytes([number]), num_tokens)
    tiers.place(page, slot)
    return page


def commit(tiers: PageTiers, *, fails: bool = False) -> tuple[PageMove, ...]:
    """End the plan in the making and commit it; the next one is begun."""
    moves = tiers.end_plan()
    tiers.commit(StepPlan(0, (), moves=moves), has_failed=fails)
    tiers.begin_plan()
    return moves


def kinds(moves: tuple[PageMove, ...]) -> list[MoveKind]:
    return [move.kind for move in moves]


def test_a_page_that_makes_room_is_copied_to_the_host_in_the_same_plan() -> None:
    tiers = PageTiers(num_slots=1, num_frames=1)
    page = page_in_slot(tiers, 1)
    old = page.slot
    new = tiers.take_slot()
    assert (page.slot, page.tier) == (None, "host")
    assert not tiers.is_settled(page)
    moves = commit(tiers)
    assert moves == (PageMove(MoveKind.STORE, old, page.frame, False),)  # type: ignore[arg-type]
    assert old is not None
    assert new == SlotRef(old.slot, old.generation + 1)
    assert tiers.is_settled(page)


def test_without_frames_a_page_that_makes_room_is_lost() -> None:
    lost: list[Page] = []
    tiers = PageTiers(num_slots=1, on_lost=lost.append)
    page = page_in_slot(tiers, 1)
    tiers.take_slot()
    assert lost == [page]
    assert not page.exists
    assert tiers.num_lost == 1
    assert tiers.end_plan() == ()


def test_few_pages_are_demoted_per_plan_and_the_others_dropped() -> None:
    tiers = PageTiers(num_slots=4, num_frames=9)
    pages = [page_in_slot(tiers, number) for number in range(4)]
    for _ in pages:
        tiers.take_slot()
    assert [page.exists for page in pages] == [True] * MAX_DEMOTIONS + [False] * 2
    assert kinds(commit(tiers)) == [MoveKind.STORE] * MAX_DEMOTIONS


def test_what_the_plan_in_the_making_reads_stays_until_it_is_complete() -> None:
    tiers = PageTiers(num_slots=1)
    page = page_in_slot(tiers, 1)
    assert page.slot is not None
    tiers.read(page.slot)
    tiers.read(page.slot)
    assert (tiers.num_available, tiers.take_slot()) == (0, None)
    tiers.end_plan()
    assert tiers.num_available == 1
    assert tiers.take_slot() is not None


def test_the_page_to_begin_from_is_spared() -> None:
    tiers = PageTiers(num_slots=2)
    first, second = page_in_slot(tiers, 1), page_in_slot(tiers, 2)
    tiers.take_slot(spare=first)
    assert first.slot is not None
    assert second.slot is None
    assert tiers.take_slot(spare=first) is None


def test_a_page_that_is_held_keeps_its_slot_if_it_lies_nowhere_else() -> None:
    tiers = PageTiers(num_slots=1, num_frames=1)
    page = page_in_slot(tiers, 1)
    tiers.hold(page)
    assert (tiers.num_available, tiers.take_slot()) == (0, None)
    assert tiers.secure(page)
    assert tiers.num_available == 1
    assert tiers.take_slot() is not None
    assert page.tier == "host"
    assert tiers.num_frames_available == 0  # nobody can take that one away
    tiers.unhold(page)
    commit(tiers)
    assert tiers.num_frames_available == 1


def test_a_page_cannot_be_secured_without_a_frame() -> None:
    tiers = PageTiers(num_slots=1, num_frames=1)
    assert tiers.take_frame() is not None
    assert not tiers.secure(page_in_slot(tiers, 1))


def test_keeping_safe_waits_for_a_frame() -> None:
    tiers = PageTiers(num_slots=1, num_frames=1, max_files=1, min_file_tokens=999)
    page, frame = page_in_slot(tiers, 1), tiers.take_frame()
    assert frame is not None
    tiers.hold(page)
    tiers.keep_safe(page)
    assert not tiers.has_work
    assert commit(tiers) == ()
    tiers.release_frame(frame)
    assert tiers.has_work
    tiers.begin_plan()
    assert kinds(commit(tiers)) == [MoveKind.STORE]
    assert [type(job) for job in tiers.files.take_jobs()] == [WriteFile]  # short, but held
    assert not tiers.has_work


def test_a_page_is_loaded_to_a_slot_that_becomes_its_own_at_commit() -> None:
    tiers = PageTiers(num_slots=2, num_frames=1)
    page = page_in_slot(tiers, 1)
    assert tiers.secure(page)
    tiers.demote(page)
    commit(tiers)
    slot = tiers.take_slot()
    assert slot is not None
    tiers.load(page, slot, promotes=True)
    assert page.slot is None
    assert tiers.promised_slots == [slot]
    commit(tiers)
    assert page.slot == slot
    assert tiers.promised_slots == []
    tiers.check()


def test_a_load_that_failed_leaves_the_page_where_it_was() -> None:
    tiers = PageTiers(num_slots=1, num_frames=1)
    page = page_in_slot(tiers, 1)
    slot = tiers.take_slot()
    commit(tiers)
    assert slot is not None
    tiers.load(page, slot, promotes=True)
    commit(tiers, fails=True)
    assert page.tier == "host"
    assert tiers.slots.num_free == 1


def test_a_store_that_failed_is_tried_again_for_those_who_are_held() -> None:
    tiers = PageTiers(num_slots=2, num_frames=2)
    held, other = page_in_slot(tiers, 1), page_in_slot(tiers, 2)
    tiers.hold(held)
    for page in (held, other):
        assert tiers.secure(page)
    moves = tiers.end_plan()
    tiers.commit(StepPlan(0, (), moves=moves), has_failed=True)
    assert (held.frame, other.frame, tiers.frames.num_free) == (None, None, 2)  # type: ignore[union-attr]
    tiers.begin_plan()
    assert [move.slot for move in tiers.end_plan()] == [held.slot]


def test_a_page_dropped_while_it_is_stored_leaves_nothing() -> None:
    tiers = PageTiers(num_slots=1, num_frames=1, max_files=1, min_file_tokens=0)
    page = page_in_slot(tiers, 1)
    tiers.take_slot()
    tiers.drop(page)
    assert tiers.num_frames_used == 1  # the move in flight fills it
    commit(tiers)
    assert tiers.num_frames_used == 0
    assert tiers.files.take_jobs() == []


def test_a_frame_is_not_taken_while_its_file_is_written() -> None:
    tiers = PageTiers(num_slots=1, num_frames=1, max_files=1, min_file_tokens=0)
    page = page_in_slot(tiers, 1)
    assert tiers.secure(page)
    commit(tiers)
    (job,) = tiers.files.take_jobs()
    assert (tiers.num_frames_available, tiers.take_frame()) == (0, None)
    tiers.finish_job(DiskResult(job))
    assert page.has_file
    assert tiers.take_frame() is not None
    assert page.tier == "device"


def test_a_page_comes_back_from_its_file() -> None:
    tiers = PageTiers(num_slots=1, num_frames=1, max_files=1)
    page = Page(b"1", 4)
    tiers.files.add(page)
    assert tiers.fetch(page)
    assert tiers.fetch(page)  # once is enough
    (job,) = tiers.files.take_jobs()
    assert isinstance(job, ReadFile)
    assert page.tier == "disk"
    tiers.finish_job(DiskResult(job))
    assert page.frame == job.frame
    assert tiers.is_settled(page)
    tiers.check()


def test_a_page_whose_file_cannot_be_read_is_lost() -> None:
    lost: list[Page] = []
    tiers = PageTiers(num_slots=1, num_frames=1, max_files=1, on_lost=lost.append)
    page = Page(b"1", 4)
    tiers.files.add(page)
    tiers.fetch(page)
    (job,) = tiers.files.take_jobs()
    tiers.finish_job(DiskResult(job, "broken"))
    assert lost == [page]
    assert tiers.num_frames_used == 0


def test_without_a_frame_nothing_is_fetched() -> None:
    tiers = PageTiers(num_slots=1, num_frames=0, max_files=1)
    page = Page(b"1", 4)
    tiers.files.add(page)
    assert not tiers.fetch(page)
    assert tiers.files.take_jobs() == []


def test_what_was_used_keeps_its_slot_longer() -> None:
    tiers = PageTiers(num_slots=2, num_frames=1)
    used, unused = page_in_slot(tiers, 1), page_in_slot(tiers, 2)
    tiers.touch(used)
    assert tiers.was_used(used)
    tiers.take_slot()
    assert (used.tier, unused.tier) == ("device", "host")


def test_a_page_let_go_more_often_than_held_is_noticed() -> None:
    tiers = PageTiers(num_slots=1)
    with pytest.raises(AssertionError, match="let go more often than held"):
        tiers.unhold(page_in_slot(tiers, 1))
