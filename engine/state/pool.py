"""SlotPool: who holds which slot of device memory. Integers only; it has never seen a tensor.

A slot is *free*, or *referenced* by one or more holders. A referenced slot is *live* (its one
holder writes it) until it is frozen; then nobody writes it and any number may read it. Every
time a slot becomes free its generation grows, so a reference kept too long is recognised.
"""

from __future__ import annotations

from engine.plan import ZERO_SLOT, SlotRef


class SlotPool:
    """Slot 0 is the zero page: frozen, held by the pool itself, never handed out.

    Usable slots are 1..num_slots. A stale reference is a bug of the caller and fails an
    assertion in every method that takes one.
    """

    def __init__(self, num_slots: int) -> None:
        if num_slots < 1:
            raise ValueError(f"num_slots = {num_slots}: a pool needs at least one usable slot")
        self.num_slots = num_slots
        self.zero = SlotRef(ZERO_SLOT, 0)
        self._refs = [1] + [0] * num_slots
        self._frozen = [True] + [False] * num_slots
        self._generations = [0] * (num_slots + 1)
        self._free = list(range(num_slots, 0, -1))  # a stack: the lowest slot comes out first

    @property
    def num_free(self) -> int:
        return len(self._free)

    def alloc(self) -> SlotRef | None:
        """A live slot with one reference, or None when all are taken. Its content is garbage."""
        if not self._free:
            return None
        slot = self._free.pop()
        self._refs[slot] = 1
        return SlotRef(slot, self._generations[slot])

    def retain(self, ref: SlotRef) -> None:
        """Add a holder."""
        self._refs[self._held(ref)] += 1

    def release(self, ref: SlotRef) -> None:
        """Take a holder away; with the last one the slot is free and `ref` is stale."""
        slot = self._held(ref)
        self._refs[slot] -= 1
        if self._refs[slot] > 0:
            return
        assert slot != ZERO_SLOT, "the zero page was released more often than retained"
        self._generations[slot] += 1
        self._frozen[slot] = False
        self._free.append(slot)

    def freeze(self, ref: SlotRef) -> None:
        """Make the slot read-only until its last release. Freezing twice changes nothing."""
        self._frozen[self._held(ref)] = True

    def is_frozen(self, ref: SlotRef) -> bool:
        return self._frozen[self._held(ref)]

    def refs(self, ref: SlotRef) -> int:
        """How many hold the slot, at least one."""
        return self._refs[self._held(ref)]

    def generation(self, slot: int) -> int:
        """How often the slot has become free."""
        return self._generations[slot]

    def is_current(self, ref: SlotRef) -> bool:
        """Whether `ref` is of the slot's present generation and somebody holds the slot."""
        return (
            0 <= ref.slot <= self.num_slots
            and self._generations[ref.slot] == ref.generation
            and self._refs[ref.slot] > 0
        )

    def check(self) -> None:
        """Raise AssertionError if any invariant is broken. O(num_slots)."""
        free = set(self._free)
        assert len(free) == len(self._free), f"a slot is free twice: {sorted(self._free)}"
        assert ZERO_SLOT not in free, "the zero page is on the free stack"
        assert self._frozen[ZERO_SLOT], "the zero page is not frozen"
        assert self._refs[ZERO_SLOT] >= 1, "the pool lost its own reference to the zero page"
        assert self._generations[ZERO_SLOT] == 0, "the zero page has been free"
        for slot in range(1, self.num_slots + 1):
            refs = self._refs[slot]
            assert refs >= 0, f"slot {slot} has {refs} references"
            assert (refs == 0) == (slot in free), f"slot {slot}: refs {refs}, {slot in free=}"
            assert refs > 0 or not self._frozen[slot], f"slot {slot} is free and frozen"

    def _held(self, ref: SlotRef) -> int:
        """The slot of a reference that is not stale."""
        assert 0 <= ref.slot <= self.num_slots, f"{ref} is outside a pool of {self.num_slots}"
        current = self._generations[ref.slot]
        assert ref.generation == current, f"stale {ref}: the slot is at generation {current}"
        assert self._refs[ref.slot] > 0, f"{ref} is free"
        return ref.slot
