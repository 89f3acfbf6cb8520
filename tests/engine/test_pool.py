"""SlotPool against a plain dictionary of holders."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis.stateful import (
    Bundle,
    MultipleResults,
    RuleBasedStateMachine,
    consumes,
    invariant,
    multiple,
    rule,
)

from engine.plan import ZERO_SLOT, SlotRef
from engine.state.pool import SlotPool

NUM_SLOTS = 3


class PoolMachine(RuleBasedStateMachine):
    """Each element of `held` is one reference that somebody owns."""

    held = Bundle("held")

    def __init__(self) -> None:
        super().__init__()
        self.pool = SlotPool(NUM_SLOTS)
        self.holders: dict[SlotRef, int] = {}
        self.frozen: set[SlotRef] = set()
        self.stale: set[SlotRef] = set()

    @rule(target=held)
    def alloc(self) -> SlotRef | MultipleResults[SlotRef]:
        ref = self.pool.alloc()
        if ref is None:
            assert len(self.holders) == NUM_SLOTS
            return multiple()
        assert ref.slot not in {held.slot for held in self.holders}
        assert ref not in self.stale
        self.holders[ref] = 1
        return ref

    @rule(target=held, ref=held)
    def retain(self, ref: SlotRef) -> SlotRef:
        self.pool.retain(ref)
        self.holders[ref] += 1
        return ref

    @rule(ref=consumes(held))
    def release(self, ref: SlotRef) -> None:
        self.pool.release(ref)
        self.holders[ref] -= 1
        if self.holders[ref] == 0:
            del self.holders[ref]
            self.frozen.discard(ref)
            self.stale.add(ref)

    @rule(ref=held)
    def freeze(self, ref: SlotRef) -> None:
        self.pool.freeze(ref)
        self.frozen.add(ref)

    @invariant()
    def agrees_with_the_dictionary(self) -> None:
        self.pool.check()
        assert self.pool.num_free == NUM_SLOTS - len(self.holders)
        for ref, num_holders in self.holders.items():
            assert self.pool.refs(ref) == num_holders
            assert self.pool.is_frozen(ref) == (ref in self.frozen)
            assert self.pool.is_current(ref)
        for ref in self.stale:
            assert not self.pool.is_current(ref)
            assert ref.generation < self.pool.generation(ref.slot)


TestPoolMachine = PoolMachine.TestCase
TestPoolMachine.settings = settings(max_examples=50, stateful_step_count=30)


def alloc(pool: SlotPool) -> SlotRef:
    ref = pool.alloc()
    assert ref is not None
    return ref


def test_lowest_slot_comes_first_and_the_zero_page_never() -> None:
    pool = SlotPool(3)
    assert [alloc(pool).slot for _ in range(3)] == [1, 2, 3]
    assert pool.alloc() is None


def test_zero_page_is_frozen_and_keeps_a_holder() -> None:
    pool = SlotPool(1)
    assert pool.is_frozen(pool.zero)
    pool.retain(pool.zero)
    pool.release(pool.zero)
    with pytest.raises(AssertionError, match="more often than retained"):
        pool.release(pool.zero)


def test_a_slot_is_free_only_after_its_last_release() -> None:
    pool = SlotPool(1)
    ref = alloc(pool)
    pool.retain(ref)
    pool.release(ref)
    assert pool.num_free == 0
    pool.release(ref)
    assert pool.num_free == 1


def test_a_freed_slot_comes_back_live_with_a_new_generation() -> None:
    pool = SlotPool(1)
    first = alloc(pool)
    pool.freeze(first)
    pool.release(first)
    second = alloc(pool)
    assert second == SlotRef(first.slot, first.generation + 1)
    assert not pool.is_frozen(second)


@pytest.mark.parametrize("use", ["retain", "release", "freeze", "is_frozen", "refs"])
def test_a_stale_reference_is_refused(use: str) -> None:
    pool = SlotPool(1)
    ref = alloc(pool)
    pool.release(ref)
    alloc(pool)
    with pytest.raises(AssertionError, match="stale SlotRef"):
        getattr(pool, use)(ref)


@pytest.mark.parametrize("slot", [-1, 2])
def test_a_slot_outside_the_pool_is_refused(slot: int) -> None:
    with pytest.raises(AssertionError, match="outside a pool of 1"):
        SlotPool(1).retain(SlotRef(slot, 0))


def test_a_free_slot_that_was_never_handed_out_is_refused() -> None:
    with pytest.raises(AssertionError, match="is free"):
        SlotPool(1).release(SlotRef(1, 0))


def test_a_pool_needs_a_slot() -> None:
    with pytest.raises(ValueError, match="num_slots = 0"):
        SlotPool(0)


def broken(**changes: object) -> SlotPool:
    pool = SlotPool(2)
    alloc(pool)
    for name, value in changes.items():
        setattr(pool, name, value)
    return pool


@pytest.mark.parametrize(
    ("changes", "finding"),
    [
        ({"_free": [2, 2]}, "free twice"),
        ({"_free": [2, ZERO_SLOT]}, "zero page is on the free stack"),
        ({"_free": []}, "slot 2"),
        ({"_free": [2, 1]}, "slot 1"),
        ({"_refs": [1, 0, 0]}, "slot 1"),
        ({"_refs": [1, -1, 0]}, "-1 references"),
        ({"_refs": [0, 1, 0]}, "lost its own reference"),
        ({"_frozen": [False, False, False]}, "zero page is not frozen"),
        ({"_frozen": [True, False, True]}, "free and frozen"),
        ({"_generations": [1, 0, 0]}, "zero page has been free"),
    ],
)
def test_check_finds_broken_books(changes: dict[str, object], finding: str) -> None:
    with pytest.raises(AssertionError, match=finding):
        broken(**changes).check()
