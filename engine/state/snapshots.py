"""Snapshots: what sequences leave behind, where, and at whose cost. Integers only.

A snapshot is a slot that a sequence stood on, frozen while the sequence goes on in another. It
becomes a page when the step that wrote it is committed.
"""

from __future__ import annotations

from secrets import token_bytes

from engine.plan import SlotRef
from engine.sequence import FrozenSlot, Sequence
from engine.state.page import Page
from engine.state.prefix import PrefixIndex, extend
from engine.state.tiers import PageTiers
from engine.types import FinishReason

MAX_HINTS = 2  # snapshots one request may ask for: the first and the deepest
MIN_SNAPSHOT_TOKENS = 64  # of prefill that a snapshot beside the prompt's last one must save


class Snapshots:
    """Without `is_on` nothing is left for others to find; a state that is asked for still is."""

    def __init__(
        self,
        tiers: PageTiers,
        index: PrefixIndex,
        paragraph_len: int,
        *,
        is_on: bool,
        min_snapshot_tokens: int = MIN_SNAPSHOT_TOKENS,
    ) -> None:
        self.min_snapshot_tokens = min_snapshot_tokens
        self._tiers = tiers
        self._pool = tiers.slots
        self._index = index
        self._paragraph_len = paragraph_len
        self._is_on = is_on
        self._num_reserved = 0  # slots that snapshots must leave to others in this plan

    def reserve(self, num_reserved: int) -> None:
        """The plan in the making may admit `num_reserved` sequences at the end of it.

        Their slots are not for snapshots. A snapshot already left takes its slot out of reach
        until it is committed, for `depth` steps at most.
        """
        self._num_reserved = num_reserved

    @property
    def has_spare_slot(self) -> bool:
        """A slot is free that nobody is expected to need."""
        return self._pool.num_free > self._num_reserved

    def boundaries(self, seq: Sequence) -> set[int]:
        """Where this prefill is to leave snapshots, beyond where it begins.

        The last boundary of the prompt, for whoever asks more; its end, for whoever asks the
        same; the point where it parts from an earlier prompt, as a second sight says that there
        will be a third; and where the request itself says that it may be continued differently.
        """
        begin, length = seq.num_planned, self._paragraph_len
        last = seq.num_prompt_tokens - 1
        stops = {last - last % length, seq.num_prompt_tokens, *self._hinted(seq)}
        branch = self._index.shared_depth(seq.chain, last)
        if branch - begin >= self.min_snapshot_tokens:
            stops.add(branch)
        return {stop for stop in stops if stop > begin}

    def _hinted(self, seq: Sequence) -> list[int]:
        """Boundaries at or before the hints of a request, at some distance from each other."""
        hints = sorted({hint - hint % self._paragraph_len for hint in seq.request.snapshot_hints})
        kept = [seq.num_planned]
        for hint in hints:
            if hint - kept[-1] >= max(self.min_snapshot_tokens, 1):
                kept.append(hint)
        return kept[1:2] + kept[2:][1 - MAX_HINTS :]

    def slot_to_go_on(self, seq: Sequence) -> SlotRef | None:
        """A fresh slot if the one that the sequence stands on is to be left as a snapshot."""
        at, length = seq.num_planned, self._paragraph_len
        is_end = at == seq.num_prompt_tokens and at in seq.stops
        is_due = is_end or at % length == 0
        if not (self._is_on and is_due and self._tiers.has_more_than(self._num_reserved)):
            return None
        if is_end:
            page = self._index.get(seq.end_digest)
            if page is not None and page.has_logits:
                return None
            return self._tiers.take_slot() if seq.expects_end else self._pool.alloc()
        if at in seq.stops:
            is_there = self._index.get(seq.chain[at // length]) is not None
            return None if is_there else self._tiers.take_slot()
        if at < seq.num_prompt_tokens:
            return None
        # One snapshot per answer: the one before makes room, or at first that of somebody else.
        if self._pool.num_free == 0:
            self._drop_turn(seq)
        return self._tiers.take_slot()

    def publish_slot(self, seq: Sequence, left: FrozenSlot) -> None:
        """Make a snapshot visible, or give its slot back if there is one of the same tokens."""
        extend(seq.chain, seq.tokens, left.num_tokens, self._paragraph_len)
        digest = (
            seq.end_digest if left.is_end else seq.chain[left.num_tokens // self._paragraph_len]
        )
        page, is_new = self._file(seq, digest, left)
        is_turn = left.num_tokens >= seq.num_prompt_tokens and not left.is_end
        if is_new and is_turn and left.num_tokens not in seq.stops:
            self._drop_turn(seq)
            seq.turn = page

    def _file(self, seq: Sequence, digest: bytes, left: FrozenSlot) -> tuple[Page, bool]:
        """The page of this digest, which takes the slot if it can use it; and whether it is new."""
        old = self._index.get(digest)
        if old is not None and (old.has_logits or not left.is_end or old.num_holders > 0):
            if old.slot is None and old.has_logits == left.is_end:
                self._tiers.place(old, left.slot)
            else:
                self._pool.release(left.slot)
            return old, False
        if old is not None:
            self._tiers.drop(old)  # the same state, but without logits
        page = Page(digest, seq.num_base_tokens + left.num_tokens, left.is_end)
        self._tiers.place(page, left.slot)
        self._index.insert(page)
        return page, True

    def leave_slot(self, seq: Sequence, slot: SlotRef) -> None:
        """The sequence has ended and does not need its slot any more."""
        is_end = seq.num_computed == seq.num_prompt_tokens
        is_on_grid = seq.num_computed % self._paragraph_len == 0
        is_written = seq.origin is None and seq.is_settled and seq.num_computed > 0
        is_good = is_written and seq.finish_reason is not FinishReason.ERROR
        if is_good and seq.frame is not None and is_end:
            self._keep(seq, slot, seq.frame)
        elif is_good and self._is_on and (is_end or is_on_grid):
            self._pool.freeze(slot)
            self.publish_slot(seq, FrozenSlot(seq.num_computed, slot, is_end))
        else:
            self._pool.release(slot)

    def _keep(self, seq: Sequence, slot: SlotRef, frame: SlotRef) -> None:
        """The state of a whole prompt is wanted: hold it, and bring it to safety."""
        self._pool.freeze(slot)
        left = FrozenSlot(seq.num_computed, slot, is_end=True)
        if not self._is_on:
            page = Page(token_bytes(16), seq.num_base_tokens + left.num_tokens, has_logits=True)
            self._tiers.place(page, slot)
        else:
            page, _ = self._file(seq, seq.end_digest, left)
        seq.kept = page
        self._tiers.hold(page)
        if page.frame is None and page.slot is not None:
            self._tiers.store_into(page, frame)
            seq.frame = None

    def _drop_turn(self, seq: Sequence) -> None:
        """Give up the sequence's snapshot before, unless it is gone or somebody has used it."""
        page, seq.turn = seq.turn, None
        if page is None or self._index.get(page.digest) is not page:
            return
        if page.num_holders == 0 and not self._tiers.was_used(page):
            self._tiers.drop(page)
