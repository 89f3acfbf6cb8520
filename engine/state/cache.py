"""StateCache: which state a sequence begins from, writes to and leaves behind. Integers only.

The scheduler's one door to pool and index. A snapshot is a slot that a sequence stood on at a
paragraph boundary: it is frozen, and the sequence goes on in a fresh slot, since a row may read
one slot and write another. Nothing is ever copied.

Why a slot may be reused at once, also with rows in flight that read or write it: the device runs
plans in order, so whoever is given the slot writes it in a later plan. Only rows of one plan run
in no order; therefore what the plan in the making reads (other than the writer's own slot) is
held until it is complete. And a snapshot that becomes visible was written by a committed step and
has no writer in flight.
"""

from __future__ import annotations

from engine.plan import SlotRef
from engine.sequence import FrozenSlot, Sequence
from engine.state.owners import PrefillOwners, is_awaiting
from engine.state.pool import SlotPool
from engine.state.prefix import Page, PrefixIndex, link, root
from engine.types import CacheStats, FinishReason

MAX_HINTS = 4  # snapshots one request may ask for: the first and the deepest others
MIN_SNAPSHOT_TOKENS = 64  # of prefill that a snapshot beside the prompt's last one must save
MAX_GHOSTS = 100_000  # 16 bytes each, besides the dict


class StateCache:
    """Slots for running sequences and snapshots together; running sequences come first.

    `seed` names everything besides tokens and salt that a state depends on: weights, layout,
    tokenizer. None switches reuse off; then slots are all there is.
    """

    def __init__(
        self,
        pool: SlotPool,
        paragraph_len: int,
        seed: bytes | None,
        *,
        min_snapshot_tokens: int = MIN_SNAPSHOT_TOKENS,
        max_ghosts: int = MAX_GHOSTS,
    ) -> None:
        if paragraph_len < 1:
            raise ValueError(f"paragraph_len = {paragraph_len}: must be at least 1")
        self.pool = pool
        self.paragraph_len = paragraph_len
        self.index = PrefixIndex(
            paragraph_len, max_protected=pool.num_slots // 2, max_ghosts=max_ghosts
        )
        self._seed = seed
        self._min_snapshot_tokens = min_snapshot_tokens
        self._owners = PrefillOwners(paragraph_len)
        self._reading: set[SlotRef] = set()  # frozen slots that the plan in the making reads
        self._num_reserved = 0  # slots that snapshots must leave to others in this plan
        self._num_queried_tokens = self._num_hit_tokens = self._num_evictions = 0

    @property
    def num_available(self) -> int:
        """Slots a new sequence could get: free ones and snapshots that nothing reads just now."""
        num_held = 0
        if self._reading:
            num_held = sum(page.slot in self._reading for page in self.index.victims())
        return self.pool.num_free + len(self.index) - num_held

    @property
    def stats(self) -> CacheStats:
        return CacheStats(
            num_queried_tokens=self._num_queried_tokens,
            num_hit_tokens=self._num_hit_tokens,
            num_evictions=self._num_evictions,
            num_snapshots=len(self.index),
        )

    # Beginning

    def num_cached(self, seq: Sequence) -> int:
        """Prompt tokens that a waiting sequence would not need to compute."""
        page = self._match(seq)
        return 0 if page is None else page.num_tokens

    def must_wait(self, seq: Sequence) -> bool:
        """Somebody is computing what this prompt begins with: wait for the snapshot.

        Once per sequence, and only for one that runs, so nobody waits for ever: the owner passes
        the boundary, with or without leaving a snapshot, or ends.
        """
        if self._seed is None:
            return False
        if seq.awaited is None:
            least = self.num_cached(seq) + max(self._min_snapshot_tokens, 1)
            seq.awaited = self._owners.ask(seq, least)
        return is_awaiting(seq)

    def admit(self, seq: Sequence) -> bool:
        """Give a slot to a waiting sequence, and the deepest snapshot to begin from.

        False if there is no room. Snapshots make room; the one to begin from does so last, and
        then its slot is both read and written by the first row.
        """
        page = self._match(seq)
        slot = self._take_slot(spare=page) or self._take_slot()
        if slot is None:
            return False
        seq.slot, seq.origin = slot, self.pool.zero
        seq.awaited = None  # or those who waited for each other would keep each other in memory
        if page is not None:
            seq.origin = page.slot
            seq.num_cached_tokens = seq.num_planned = seq.num_computed = page.num_tokens
            if self.index.get(page.digest) is page:
                self.index.touch(page)
                self._hold(page.slot)
        if self._seed is not None:
            self._num_queried_tokens += seq.num_prompt_tokens
            self._num_hit_tokens += seq.num_cached_tokens
            seq.stops |= self._boundaries(seq)
            self.index.note(seq.chain)
            self._owners.add(seq)
        return True

    def next_stop(self, seq: Sequence) -> int:
        """Tokens after which the next prefill row is to end, at the latest."""
        ahead = (stop for stop in seq.stops if stop > seq.num_planned)
        return min(ahead, default=seq.num_prompt_tokens)

    # Going on

    def begin_plan(self, num_reserved: int) -> None:
        """A plan is in the making, which may admit `num_reserved` sequences at the end of it.

        Their slots are not for snapshots. A snapshot already left takes its slot out of reach
        until it is committed, for `depth` steps at most.
        """
        self._num_reserved = num_reserved

    def advance(self, seq: Sequence) -> tuple[SlotRef, SlotRef]:
        """(src, dst) of the next row of a running sequence.

        Where it stands on a boundary worth keeping, it leaves its slot as a snapshot, if there
        is another to go on in: one that holds a snapshot will do for a prompt, while decoding
        takes free ones only, or that of the sequence's own snapshot before.
        """
        assert seq.slot is not None, f"sequence {seq.seq_id} has no slot"
        if seq.origin is not None:
            src, seq.origin = seq.origin, None
            return src, seq.slot
        fresh = self._slot_to_go_on(seq)
        if fresh is None:
            return seq.slot, seq.slot
        left, seq.slot = seq.slot, fresh
        self.pool.freeze(left)
        self._hold(left)
        seq.frozen.append(FrozenSlot(seq.num_planned, left))
        self.publish(seq)
        return left, fresh

    def end_plan(self) -> None:
        """The plan is complete: what it reads may be given up from now on."""
        for slot in self._reading:
            self.pool.release(slot)
        self._reading.clear()

    def publish(self, seq: Sequence) -> None:
        """Index the snapshots whose last token's step has been committed."""
        while seq.frozen and seq.frozen[0].num_tokens <= seq.num_computed:
            self._index(seq, seq.frozen.pop(0))

    # Ending

    def forget(self, seq: Sequence) -> None:
        """Its logits were not finite: any page it came from or left may be to blame."""
        for digest in seq.chain:
            if (page := self.index.get(digest)) is not None:
                self._drop(page)

    def release(self, seq: Sequence) -> None:
        """Take back everything from a sequence that has ended.

        A slot that happens to stand on the grid, with no row in flight that writes it, is a
        snapshot for nothing. What was left but not committed is lost.
        """
        assert seq.slot is not None, f"sequence {seq.seq_id} has no slot"
        for left in seq.frozen:
            self.pool.release(left.slot)
        seq.frozen.clear()
        is_settled = seq.num_computed == seq.num_planned
        is_on_grid = seq.num_computed % self.paragraph_len == 0
        is_failed = seq.finish_reason is FinishReason.ERROR
        if self._seed is not None and is_settled and is_on_grid and not is_failed:
            self.pool.freeze(seq.slot)
            self._index(seq, FrozenSlot(seq.num_computed, seq.slot))
        else:
            self.pool.release(seq.slot)
        seq.slot = seq.origin = seq.turn = None
        self._owners.remove(seq)

    def check(self, running: list[Sequence]) -> None:
        """Raise AssertionError if any invariant is broken. O(slots). For outside of planning."""
        self.pool.check()
        self.index.check()
        assert not self._reading, f"still held for a plan: {self._reading}"
        live = [seq.slot for seq in running if seq.slot is not None]
        left = [frozen.slot for seq in running for frozen in seq.frozen]
        pages = [page.slot for page in self.index.victims()]
        assert len(live) == len(running), "a running sequence has no slot"
        used = live + left + pages
        assert all(self.pool.is_current(slot) for slot in used), f"a stale slot among {used}"
        assert len(set(used)) == len(used), f"slots shared: {live=} {left=} {pages=}"
        num_used = self.pool.num_slots - self.pool.num_free
        assert num_used == len(used), (
            f"{num_used} slots used by {len(running)} sequences and {len(left + pages)} snapshots"
        )
        assert all(self.pool.refs(slot) == 1 for slot in used), "a slot is held by nobody known"
        assert not any(self.pool.is_frozen(slot) for slot in live), "a live slot is frozen"
        assert all(self.pool.is_frozen(slot) for slot in left + pages), "a snapshot is not frozen"
        for seq in running:
            assert seq.origin is None, f"{seq.seq_id} was admitted without a row"
            assert all(frozen.num_tokens > seq.num_computed for frozen in seq.frozen), (
                f"{seq.seq_id} did not publish {seq.frozen} at {seq.num_computed}"
            )
        self._owners.check(running)

    def _match(self, seq: Sequence) -> Page | None:
        """The deepest snapshot to begin from; one token is left to compute, to give logits."""
        if self._seed is None:
            return None
        if not seq.chain:
            seq.chain.append(root(self._seed, seq.request.cache_salt))
            self._extend(seq, seq.num_prompt_tokens)
        return self.index.match(seq.chain, seq.num_prompt_tokens - 1)

    def _extend(self, seq: Sequence, num_tokens: int) -> None:
        """Make the chain reach over `num_tokens` tokens."""
        while (end := len(seq.chain) * self.paragraph_len) <= num_tokens:
            seq.chain.append(link(seq.chain[-1], seq.tokens(end - self.paragraph_len, end)))

    def _boundaries(self, seq: Sequence) -> set[int]:
        """Where this prefill is to leave snapshots, beyond where it begins.

        The last boundary of the prompt, for whoever asks the same or more; the point where it
        parts from an earlier prompt, as a second sight says that there will be a third; and
        where the request itself says that it may be continued differently.
        """
        begin, length = seq.num_cached_tokens, self.paragraph_len
        last = seq.num_prompt_tokens - 1
        stops = {last - last % length, *self._hinted(seq)}
        branch = self.index.shared_depth(seq.chain, last)
        if branch - begin >= self._min_snapshot_tokens:
            stops.add(branch)
        return {stop for stop in stops if stop > begin}

    def _hinted(self, seq: Sequence) -> list[int]:
        """Boundaries at or before the hints of a request, at some distance from each other."""
        hints = sorted({hint - hint % self.paragraph_len for hint in seq.request.snapshot_hints})
        kept = [seq.num_cached_tokens]
        for hint in hints:
            if hint - kept[-1] >= max(self._min_snapshot_tokens, 1):
                kept.append(hint)
        return kept[1:2] + kept[2:][1 - MAX_HINTS :]

    def _slot_to_go_on(self, seq: Sequence) -> SlotRef | None:
        """A fresh slot if the one that the sequence stands on is to be left as a snapshot."""
        at, length = seq.num_planned, self.paragraph_len
        if self._seed is None or at % length or self.num_available <= self._num_reserved:
            return None
        if at in seq.stops:
            is_there = self.index.get(seq.chain[at // length]) is not None
            return None if is_there else self._take_slot()
        if at < seq.num_prompt_tokens:
            return None
        if self.pool.num_free == 0:
            self._drop_turn(seq)
        return self.pool.alloc()

    def _index(self, seq: Sequence, left: FrozenSlot) -> None:
        """Make a snapshot visible, or give its slot back if there is one of the same tokens."""
        self._extend(seq, left.num_tokens)
        digest = seq.chain[left.num_tokens // self.paragraph_len]
        page = Page(digest, left.num_tokens, left.slot)
        if not self.index.insert(page):
            self.pool.release(left.slot)
        elif left.num_tokens >= seq.num_prompt_tokens and left.num_tokens not in seq.stops:
            self._drop_turn(seq)
            seq.turn = page

    def _drop_turn(self, seq: Sequence) -> None:
        """Give up the sequence's snapshot before, unless it is gone or somebody has used it."""
        page, seq.turn = seq.turn, None
        if page is None or self.index.get(page.digest) is not page:
            return
        if not self.index.is_protected(page):
            self._drop(page)

    def _take_slot(self, spare: Page | None = None) -> SlotRef | None:
        """A free slot, if need be that of the first snapshot in line that may go."""
        if self.pool.num_free == 0:
            victims = (page for page in self.index.victims() if page is not spare)
            victim = next((page for page in victims if page.slot not in self._reading), None)
            if victim is not None:
                self._drop(victim)
                self._num_evictions += 1
        return self.pool.alloc()

    def _drop(self, page: Page) -> None:
        self.index.remove(page)
        self.pool.release(page.slot)

    def _hold(self, slot: SlotRef) -> None:
        if slot not in self._reading:
            self.pool.retain(slot)
            self._reading.add(slot)
