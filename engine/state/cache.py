"""StateCache: which state a sequence begins from, writes to and leaves behind. Integers only.

The scheduler's one door to the pages. A snapshot is a slot that a sequence stood on: it is
frozen, and the sequence goes on in a fresh slot, since a row may read one slot and write another.
Nothing is copied on the device. A snapshot becomes visible when the step that wrote it is
committed, so it has no writer in flight, and a step that fails leaves nothing.
"""

from __future__ import annotations

from collections.abc import Iterable

from engine.plan import PageMove, SlotRef, StepPlan
from engine.sequence import FrozenSlot, Sequence, SequenceStatus
from engine.state.matching import Matching
from engine.state.owners import PrefillOwners
from engine.state.page import Page, PageFile
from engine.state.prefix import PrefixIndex
from engine.state.snapshots import MIN_SNAPSHOT_TOKENS, Snapshots
from engine.state.tiers import PageTiers
from engine.types import CacheStats

MAX_GHOSTS = 100_000  # 16 bytes each, besides the dict


class StateCache:
    """Slots for running sequences and snapshots together; running sequences come first.

    `seed` names everything besides tokens and salt that a state depends on: weights, layout,
    tokenizer. None switches reuse off; then pages are only what users keep.
    """

    def __init__(
        self,
        tiers: PageTiers,
        paragraph_len: int,
        seed: bytes | None,
        *,
        min_snapshot_tokens: int = MIN_SNAPSHOT_TOKENS,
        max_ghosts: int = MAX_GHOSTS,
    ) -> None:
        if paragraph_len < 1:
            raise ValueError(f"paragraph_len = {paragraph_len}: must be at least 1")
        self.tiers = tiers
        self.pool = tiers.slots
        self.paragraph_len = paragraph_len
        self.index = PrefixIndex(paragraph_len, max_ghosts=max_ghosts)
        tiers.on_lost = self.index.remove
        self.snapshots = Snapshots(
            tiers,
            self.index,
            paragraph_len,
            is_on=seed is not None,
            min_snapshot_tokens=min_snapshot_tokens,
        )
        self._seed = seed
        self._owners = PrefillOwners(paragraph_len)
        self._matching = Matching(
            tiers,
            self.index,
            self._owners,
            seed,
            paragraph_len=paragraph_len,
            min_awaited_tokens=max(min_snapshot_tokens, 1),
        )
        self._num_queried_tokens = self._num_hit_tokens = 0
        self._num_swaps = 0

    @property
    def stats(self) -> CacheStats:
        tiers = self.tiers
        return CacheStats(
            num_queried_tokens=self._num_queried_tokens,
            num_hit_tokens=self._num_hit_tokens,
            num_evictions=tiers.num_lost,
            num_snapshots=len(self.index),
            num_device_pages=len(tiers.on_device),
            num_host_pages=tiers.num_frames_used,
            num_disk_pages=len(tiers.files.order),
            num_stores=tiers.num_stores,
            num_loads=tiers.num_loads,
            num_disk_writes=tiers.files.num_written,
            num_disk_reads=tiers.files.num_read,
            num_preemptions=self._num_swaps,
        )

    # Files

    def adopt_files(self, files: Iterable[PageFile]) -> None:
        """Pages found on the disk, least recently used first."""
        for file in files:
            page = self.index.get(file.digest)
            if page is None:
                page = Page(file.digest, file.num_tokens, file.has_logits, has_file=True)
                self.index.insert(page)
            if page.has_logits == file.has_logits:
                self.tiers.files.add(page)

    def add_page(self, file: PageFile, frame: SlotRef) -> Page:
        """The page that came from outside into a frame, which the caller held. It is held."""
        page = self.index.get(file.digest)
        if page is None:
            page = Page(file.digest, file.num_tokens, file.has_logits)
            self.index.insert(page)
        if page.frame is None:
            self.tiers.place_frame(page, frame)
        else:
            self.tiers.release_frame(frame)
        self.tiers.hold(page)
        self.tiers.keep_safe(page)
        return page

    def take_tuned(self, file: PageFile) -> Page:
        """The page of a tuned initial state, for good: its content is in the lowest free frame."""
        frame = self.tiers.take_frame()
        assert frame is not None, "there are fewer frames than tuned states"
        page = Page(file.digest, file.num_tokens, file.has_logits, num_holders=1)
        self.tiers.place_frame(page, frame)
        return page

    def save_all(self) -> None:
        """Have every page that is worth it brought to its file, as far as room and steps go."""
        files = self.tiers.files
        files.is_patient = True
        for page in list(self.index):
            if page.num_holders > 0 or page.num_tokens >= files.min_tokens:
                self.tiers.keep_safe(page)

    # Beginning

    def num_cached(self, seq: Sequence) -> int:
        """Prompt tokens that a waiting sequence would not need to compute."""
        return self._matching.match(seq)[1]

    def must_wait(self, seq: Sequence) -> bool:
        """What the sequence begins from is on its way."""
        return self._matching.must_wait(seq)

    def may_share(self, first: Sequence, second: Sequence) -> bool:
        """The prompts begin alike, as far as one could leave a snapshot for the other."""
        return self._matching.may_share(first, second)

    def is_lost(self, seq: Sequence) -> bool:
        """The state that a waiting sequence must go on from could not be read back."""
        page = seq.parked if seq.status is SequenceStatus.SWAPPED else seq.base
        return page is not None and not page.exists

    def has_whole(self, seq: Sequence) -> bool:
        """There is nothing to compute for a sequence that draws no token. If the state of its
        prompt is to be kept, it is held for it, wherever it lies."""
        page, num_tokens = self._matching.match(seq)
        if page is None or not page.has_logits or num_tokens < seq.num_prompt_tokens:
            return False
        if seq.max_tokens > 0 or (seq.keeps_prompt and not self.tiers.secure(page)):
            return False
        seq.num_cached_tokens = num_tokens
        if seq.keeps_prompt:
            seq.kept = page
            self.tiers.hold(page)
            self.tiers.keep_safe(page)
        return True

    def admit(self, seq: Sequence) -> bool:
        """Give a slot to a waiting sequence, and the deepest page to begin from.

        False if there is no room. Pages make room; the one to begin from does so last, and then
        its slot is both read and written by the first row.
        """
        if seq.status is SequenceStatus.SWAPPED:
            return self._swap_in(seq)
        page, num_tokens = self._matching.match(seq)
        with self.tiers.frame_held(page):
            if seq.keeps_prompt:  # first, or a page that makes room takes the last one
                seq.frame = self.tiers.take_frame()
            slot = self.tiers.take_slot(spare=page)
            origin = None if page is None else page.slot  # making room for itself takes it away
            slot = slot or self.tiers.take_slot()
        if slot is None or (seq.keeps_prompt and seq.frame is None):
            self._give_back(seq, slot)
            return False
        seq.slot, seq.origin = slot, self.pool.zero
        seq.awaited = None  # or those who waited for each other would keep each other in memory
        if page is not None:
            seq.num_cached_tokens = seq.num_planned = seq.num_computed = num_tokens
            seq.owes_draw = num_tokens == seq.num_prompt_tokens
            self._begin_from(seq, page, origin)
        if self._seed is not None:
            self._num_queried_tokens += seq.num_prompt_tokens
            self._num_hit_tokens += num_tokens
            seq.stops |= self.snapshots.boundaries(seq)
            seq.expects_end |= self.index.has_seen(seq.end_digest)
            self.index.note([*seq.chain, seq.end_digest])
            self._owners.add(seq)
        return True

    def next_stop(self, seq: Sequence) -> int:
        """Tokens after which the next prefill row is to end, at the latest."""
        ahead = (stop for stop in seq.stops if stop > seq.num_planned)
        return min(ahead, default=seq.num_prompt_tokens)

    # Going on

    def begin_plan(self) -> None:
        self.tiers.begin_plan()

    def reserve(self, num_reserved: int) -> None:
        """The plan in the making may admit so many sequences, whose slots are not for snapshots."""
        self.snapshots.reserve(num_reserved)

    def advance(self, seq: Sequence) -> tuple[SlotRef, SlotRef]:
        """(src, dst) of the next row of a running sequence.

        Where it stands on a boundary worth keeping, it leaves its slot as a snapshot, if there
        is another to go on in: one that holds a snapshot will do for a prompt, while decoding
        takes free ones only, or that of the sequence's own snapshot before.
        """
        assert seq.slot is not None, f"sequence {seq.seq_id} has no slot"
        if seq.origin is not None:
            src = seq.origin
            if seq.num_rows_in_flight == 0 and seq.owes_draw:
                return src, seq.slot  # draws only; the row that feeds comes after
            self._let_origin_go(seq, is_read=True)
            return src, seq.slot
        # What was loaded in this very plan is no snapshot before that is committed.
        fresh = None if seq.is_loading else self.snapshots.slot_to_go_on(seq)
        seq.is_loading = False
        if fresh is None:
            return seq.slot, seq.slot
        left, seq.slot = seq.slot, fresh
        self.pool.freeze(left)
        self.tiers.read(left)
        is_end = seq.num_planned == seq.num_prompt_tokens and seq.num_planned in seq.stops
        seq.frozen.append(FrozenSlot(seq.num_planned, left, is_end))
        self.publish(seq)
        return left, fresh

    def keeps_logits(self, seq: Sequence, end: int) -> bool:
        """The row that ends at `end` is to leave its logits: the prompt may come again."""
        is_kept = self._seed is not None or seq.keeps_prompt
        return is_kept and end == seq.num_prompt_tokens

    def end_plan(self) -> tuple[PageMove, ...]:
        """The plan is complete. Returns the moves that it is to make before its rows."""
        return self.tiers.end_plan()

    def commit(self, plan: StepPlan, *, has_failed: bool) -> None:
        """The plan's moves are made. To be called before anything else is done with its result."""
        self.tiers.commit(plan, has_failed=has_failed)

    def publish(self, seq: Sequence) -> None:
        """Index the snapshots whose last token's step has been committed."""
        while seq.frozen and seq.frozen[0].num_tokens <= seq.num_computed:
            self.snapshots.publish_slot(seq, seq.frozen.pop(0))

    # Giving way and coming back

    def can_swap_out(self, seq: Sequence) -> bool:
        """The sequence has a state of its own to take away."""
        return seq.origin is None and (seq.can_decode or seq.needs_prefill)

    def swap_out(self, seq: Sequence) -> bool:
        """Copy the state of a running sequence to the host, in the plan in the making, and take
        its slot. False, and nothing changes, if there is no frame for it."""
        assert seq.slot is not None, f"sequence {seq.seq_id} has no slot"
        frame = self.tiers.take_frame()
        if frame is None:
            return False
        self._num_swaps += 1
        num_tokens = seq.num_base_tokens + seq.num_planned
        has_logits = self.keeps_logits(seq, seq.num_planned)
        seq.parked = Page(b"", num_tokens, has_logits, num_holders=1)
        self.tiers.store(seq.slot, frame, seq.parked)
        self.tiers.place_frame(seq.parked, frame)
        self.pool.release(seq.slot)
        seq.slot = None
        self._owners.remove(seq)
        return True

    # Ending

    def forget(self, seq: Sequence) -> None:
        """Its logits were not finite: any page it came from or left may be to blame."""
        for digest in (*seq.chain, seq.end_digest):
            page = self.index.get(digest)
            if page is not None and page.num_holders == 0:
                self.tiers.drop(page)

    def release(self, seq: Sequence) -> None:
        """Take back everything from a sequence that has ended.

        A slot that happens to stand on the grid, or at the end of the prompt with its logits,
        with no row in flight that writes it, is a snapshot for nothing. What was left but not
        committed is lost.
        """
        for left in seq.frozen:
            self.pool.release(left.slot)
        seq.frozen.clear()
        if seq.slot is not None:
            self.snapshots.leave_slot(seq, seq.slot)
            self._let_origin_go(seq)
        if seq.frame is not None:
            self.tiers.release_frame(seq.frame)
        self._unpark(seq)
        if seq.base is not None:
            self.let_go(seq.base)
            seq.base = None
        seq.slot = seq.frame = seq.turn = None
        self._owners.remove(seq)

    def let_go(self, page: Page, *, drops: bool = False) -> None:
        """Somebody who held a page does not need it any more. It is gone if nobody holds it and
        nobody can find it, or, with `drops`, should."""
        self.tiers.unhold(page)
        is_findable = self.index.get(page.digest) is page
        if page.num_holders == 0 and (drops or not is_findable):
            self.tiers.drop(page)

    def check(self, running: list[Sequence]) -> None:
        """Raise AssertionError if any invariant is broken. O(slots). For outside of planning."""
        self.index.check()
        self.tiers.check()
        live = [seq.slot for seq in running if seq.slot is not None]
        left = [frozen.slot for seq in running for frozen in seq.frozen]
        pages = [page.slot for page in self.tiers.on_device if page.slot is not None]
        promised = self.tiers.promised_slots
        origins = [seq.origin for seq in running if seq.has_origin and seq.origin is not None]
        known = {*live, *left, *pages, *promised}
        orphans = [slot for slot in dict.fromkeys(origins) if slot not in known]
        used = live + left + pages + promised + orphans
        assert all(self.pool.is_current(slot) for slot in used), f"a stale slot among {used}"
        assert len(set(used)) == len(used), f"slots shared: {live=} {left=} {pages=} {promised=}"
        num_used = self.pool.num_slots - self.pool.num_free
        assert num_used == len(used), f"{num_used} slots used, known are {used}"
        for slot in used:
            num_holders = origins.count(slot) + (slot not in orphans)
            assert self.pool.refs(slot) == num_holders, f"{slot} is held by a stranger"
        assert not any(self.pool.is_frozen(slot) for slot in live), "a live slot is frozen"
        assert all(self.pool.is_frozen(slot) for slot in left + pages), "a snapshot is not frozen"
        for seq in running:
            is_running = seq.status is SequenceStatus.RUNNING
            assert (seq.slot is not None) == is_running, f"{seq.seq_id} is {seq.status}"
            assert (seq.parked is None) == is_running, f"{seq.seq_id} is {seq.status}"
            is_drawing = seq.num_planned == seq.num_prompt_tokens
            assert seq.origin is None or is_drawing, f"{seq.seq_id} was admitted without a row"
            assert all(frozen.num_tokens > seq.num_computed for frozen in seq.frozen), (
                f"{seq.seq_id} did not publish {seq.frozen} at {seq.num_computed}"
            )
        self._owners.check(running)

    def _begin_from(self, seq: Sequence, page: Page, slot: SlotRef | None) -> None:
        """Let the first row read a page, from `slot` if it has one, else after a move."""
        if slot is None:
            slot = self._load(seq, page)
        seq.origin = slot
        if slot not in (seq.slot, self.pool.zero) and self.pool.is_current(slot):
            self.pool.retain(slot)
            seq.has_origin = True
            self.tiers.read(slot)
        self.tiers.touch(page)

    def _load(self, seq: Sequence, page: Page) -> SlotRef:
        """Copy a page to the device: to a slot of its own where there is one to spare, so that
        the next one finds it there; else to the sequence's."""
        assert seq.slot is not None
        fresh = self.pool.alloc() if self.snapshots.has_spare_slot else None
        self.tiers.load(page, fresh or seq.slot, promotes=fresh is not None)
        return fresh or seq.slot

    def _let_origin_go(self, seq: Sequence, *, is_read: bool = False) -> None:
        if seq.origin is not None and seq.has_origin:
            if is_read:
                self.tiers.read(seq.origin)
            self.pool.release(seq.origin)
        seq.origin, seq.has_origin = None, False

    def _give_back(self, seq: Sequence, slot: SlotRef | None) -> None:
        if slot is not None:
            self.pool.release(slot)
        if seq.frame is not None:
            self.tiers.release_frame(seq.frame)
            seq.frame = None

    def _swap_in(self, seq: Sequence) -> bool:
        with self.tiers.frame_held(seq.parked):  # one that has a file could make room for itself
            slot = self.tiers.take_slot()
        if slot is None:
            return False
        assert seq.parked is not None, f"sequence {seq.seq_id} was swapped without a page"
        self._matching.chain_up(seq)  # it may have begun in an earlier process
        self.tiers.load(seq.parked, slot)
        self._unpark(seq)
        seq.slot, seq.is_loading = slot, True
        return True

    def _unpark(self, seq: Sequence) -> None:
        page, seq.parked = seq.parked, None
        if page is not None:
            self.tiers.unhold(page)
            self.tiers.drop(page)
