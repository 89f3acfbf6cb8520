"""PageTiers: where pages lie, which way they go, and which gives way. Integers only.

Three tiers: slots of the device, frames of host memory, files. A page that loses its slot is
copied to a frame first, as a move of the plan in the making; one that has a frame is written to
its file by a worker. Nobody waits for any of this.

Why a slot may be reused at once, also with rows in flight that read or write it: the device runs
plans in order, so whoever is given the slot writes it in a later plan. Only rows of one plan run
in no order; therefore what the plan in the making reads is held until it is complete.

Frames are also read and written by the worker, which is in no order with the device. So a frame
is held by every move in flight and every job under way, and is loaded from or written to a file
only once the plan that filled it is committed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice

from engine.plan import MoveKind, PageMove, SlotRef, StepPlan
from engine.state.files import MIN_FILE_TOKENS, PageFiles
from engine.state.order import Slru
from engine.state.page import DiskResult, Page, ReadFile, WriteFile
from engine.state.pool import SlotPool

MAX_DEMOTIONS = 2  # pages copied to the host per step for room; beyond that they are dropped


class PageTiers:
    def __init__(
        self,
        num_slots: int,
        num_frames: int = 0,
        max_files: int = 0,
        *,
        min_file_tokens: int = MIN_FILE_TOKENS,
        on_lost: Callable[[Page], None] = lambda page: None,
    ) -> None:
        """`on_lost` is called with a page that lies nowhere any more."""
        self.slots = SlotPool(num_slots)
        self.frames = SlotPool(num_frames) if num_frames > 0 else None
        self.files = PageFiles(max_files, min_file_tokens, self._sort, self._settle_loss)
        self.on_lost = on_lost
        self.on_device = Slru(num_slots // 2)  # pages with a slot
        self.in_host = Slru(num_frames // 2)  # pages whose frame may be taken
        self.num_stores = self.num_loads = self.num_lost = 0
        self._reading: set[SlotRef] = set()  # frozen slots that the plan in the making reads
        self._moves: list[PageMove] = []  # of the plan in the making
        self._num_demotions = 0  # in the plan in the making
        self._filled: dict[SlotRef, Page | None] = {}  # frames with a STORE in flight, and for whom
        self._promoted: dict[SlotRef, Page] = {}  # slots with a LOAD in flight that become a page's
        self._wanted: dict[Page, None] = {}  # to be copied to the host as soon as there is a frame

    @property
    def num_available(self) -> int:
        """Slots that can be had: free ones and those of pages that may go just now."""
        return self.slots.num_free + sum(1 for page in self.on_device if self._may_leave(page))

    @property
    def num_frames_used(self) -> int:
        return 0 if self.frames is None else self.frames.num_slots - self.frames.num_free

    @property
    def has_work(self) -> bool:
        """Copies are asked for that a plan without rows could make."""
        return bool(self._moves) or any(self._can_store(page) for page in self._wanted)

    def has_more_than(self, num_slots: int) -> bool:
        """More than so many slots can be had. As `num_available`, but it need not look at all."""
        num_missing = num_slots + 1 - self.slots.num_free
        if num_missing <= 0:
            return True
        movable = (page for page in self.on_device if self._may_leave(page))
        return sum(1 for _ in islice(movable, num_missing)) == num_missing

    @property
    def num_frames_available(self) -> int:
        """Frames that can be had: free ones and those of pages that may go just now."""
        if self.frames is None:
            return 0
        frames = self.frames
        return frames.num_free + sum(
            page.frame is not None and frames.refs(page.frame) == 1 for page in self.in_host
        )

    @property
    def is_saved(self) -> bool:
        """Nothing that was wanted on its way down is still to come."""
        return not (self._wanted or self._filled or self.files.is_busy)

    @property
    def promised_slots(self) -> list[SlotRef]:
        """Slots that a page is being loaded into; nobody's but its own from then on."""
        return list(self._promoted)

    # Places

    def take_slot(self, spare: Page | None = None) -> SlotRef | None:
        """A free slot, if need be that of the first page in line that may go; never `spare`'s."""
        if self.slots.num_free == 0:
            pages = (page for page in self.on_device if page is not spare)
            victim = next((page for page in pages if self._may_leave(page)), None)
            if victim is None:
                return None
            self.demote(victim)
            self.num_lost += not victim.exists
        return self.slots.alloc()

    def take_frame(self) -> SlotRef | None:
        """A frame nobody else uses. It is the caller's to release."""
        if self.frames is None:
            return None
        if self.frames.num_free == 0:
            frames = self.frames
            victim = next(
                (page for page in self.in_host if page.frame and frames.refs(page.frame) == 1), None
            )
            if victim is None:
                return None
            self._leave_frame(victim)
            self.num_lost += not victim.exists
        return self.frames.alloc()

    @contextmanager
    def frame_held(self, page: Page | None) -> Iterator[None]:
        """The page's frame is not taken for others while room is made."""
        frame = None if page is None else page.frame
        if frame is None or self.frames is None:
            yield
            return
        self.frames.retain(frame)
        try:
            yield
        finally:
            self.frames.release(frame)

    def release_frame(self, frame: SlotRef) -> None:
        """Give back what `take_frame` gave."""
        assert self.frames is not None, "a frame without frames"
        self.frames.release(frame)

    def place(self, page: Page, slot: SlotRef) -> None:
        """A frozen slot, which the caller held, is the page's from now on."""
        assert page.slot is None, "a page has two slots"
        page.slot = slot
        self.on_device.insert(page)
        self._sort(page)

    def place_frame(self, page: Page, frame: SlotRef) -> None:
        """A frame, which the caller held and filled, is the page's from now on."""
        assert page.frame is None, "a page has two frames"
        page.frame = frame
        self._sort(page)

    def demote(self, page: Page) -> None:
        """Take the slot away from a page; it goes to the host if there is room for it."""
        if page.frame is None and (page.num_holders > 0 or self._num_demotions < MAX_DEMOTIONS):
            self._num_demotions += 1
            if self._store(page) is None and page.num_holders > 0:
                assert page.has_file, "the only copy of a page that is held has no place to go"
        self._leave_slot(page)

    def drop(self, page: Page) -> None:
        """Nobody may begin from this page any more; those who have it keep their copies."""
        if page.slot is not None:
            self._leave_slot(page)
        if page.frame is not None:
            self._leave_frame(page)
        if page.has_file:
            self.files.delete(page)

    def was_used(self, page: Page) -> bool:
        """Somebody began from the page not too long ago."""
        return self.on_device.is_protected(page) or self.in_host.is_protected(page)

    def touch(self, page: Page) -> None:
        for order in (self.on_device, self.in_host, self.files.order):
            if page in order:
                order.touch(page)

    # Those who need a page to exist

    def hold(self, page: Page) -> None:
        page.num_holders += 1
        self._sort(page)

    def unhold(self, page: Page) -> None:
        assert page.num_holders > 0, "a page is let go more often than held"
        page.num_holders -= 1
        self._sort(page)
        self.files.trim()

    def secure(self, page: Page) -> bool:
        """Have a page, which is to be held, lie elsewhere than in a slot, which it would never
        leave, by the plan in the making. False if there is no frame for it."""
        return page.frame is not None or page.has_file or self._store(page) is not None

    def keep_safe(self, page: Page) -> None:
        """Copy a page that is held down the tiers, as far as they go, when there is room."""
        if page.frame is None and page.slot is not None and self.frames is not None:
            self._wanted[page] = None
        elif page.frame is not None and self.is_settled(page):
            self._write(page)

    # Reading

    def is_settled(self, page: Page) -> bool:
        """The page's frame may be loaded from: the plan that filled it is committed."""
        return page.frame is not None and page.frame not in self._filled

    def read(self, slot: SlotRef) -> None:
        """The plan in the making reads a frozen slot: it stays as it is until that is complete."""
        if slot not in self._reading:
            self.slots.retain(slot)
            self._reading.add(slot)

    def load(self, page: Page, slot: SlotRef, *, promotes: bool = False) -> None:
        """Copy a settled page into a live slot. With `promotes` the slot is frozen, and the
        page's as soon as the plan is committed; the caller's hold on it goes over."""
        assert page.frame is not None, "a page without a frame is loaded"
        assert self.is_settled(page), "a page is not there to load"
        self.num_loads += 1
        self._move(MoveKind.LOAD, slot, page.frame, page.has_logits)
        if promotes:
            self.slots.freeze(slot)
            self._promoted[slot] = page

    def fetch(self, page: Page) -> bool:
        """Have a page that lies in a file only read into a frame. False if there is no frame."""
        assert page.frame is None, "a page is fetched that is there"
        if self.files.is_reading(page):
            return True
        frame = self.take_frame()
        if frame is None:
            return False
        self.files.read(page, frame)
        return True

    # Plans and jobs

    def begin_plan(self) -> None:
        self._num_demotions = 0
        for page in list(self._wanted):
            if page.slot is None or page.frame is not None or self._store(page) is not None:
                del self._wanted[page]

    def end_plan(self) -> tuple[PageMove, ...]:
        """The plan is complete: what it reads may be given up from now on. Returns its moves."""
        for slot in self._reading:
            self.slots.release(slot)
        self._reading.clear()
        moves, self._moves = tuple(self._moves), []
        return moves

    def commit(self, plan: StepPlan, *, has_failed: bool = False) -> None:
        """The moves of a plan have been made; or not, as far as anybody knows."""
        for move in plan.moves:
            if move.kind is MoveKind.STORE:
                self._stored(move.frame, has_failed)
            elif move.slot in self._promoted:
                self._loaded(move.slot, has_failed)
            assert self.frames is not None, "a move without frames"
            self.frames.release(move.frame)

    def finish_job(self, result: DiskResult) -> None:
        """The disk's worker has done a job, or has not been able to."""
        if isinstance(result.job, WriteFile):
            self.files.written(result.job, result.error)
        elif isinstance(result.job, ReadFile):
            page = self.files.was_read(result.job, result.error)
            if page is not None and page.frame is None:
                assert self.frames is not None, "a file was read without frames"
                self.frames.retain(result.job.frame)
                self.place_frame(page, result.job.frame)
        else:
            return
        self.release_frame(result.job.frame)

    def check(self) -> None:
        """Raise AssertionError if any invariant is broken. O(slots + frames + files)."""
        self.slots.check()
        assert not self._reading, f"still held for a plan: {self._reading}"
        for order in (self.on_device, self.in_host, self.files.order):
            order.check()
        pages = [*self.on_device, *self.in_host, *self.files.order]
        assert all(page.exists for page in pages), "a page lies nowhere"
        for pool, places in (
            (self.slots, {page.slot for page in pages if page.slot}),
            (self.frames, {page.frame for page in pages if page.frame}),
        ):
            assert pool is not None or not places, "frames without a pool"
            stale = [place for place in places if pool is not None and not pool.is_current(place)]
            assert not stale, f"stale places: {stale}"
        if self.frames is not None:
            self.frames.check()

    # Between them

    def _may_leave(self, page: Page) -> bool:
        """The page's slot can be had: nothing reads it now, and who needs the page keeps it."""
        assert page.slot is not None, "a page on the device has no slot"
        if page.slot in self._reading or self.slots.refs(page.slot) > 1:
            return False
        return page.num_holders == 0 or page.frame is not None or page.has_file

    def _can_store(self, page: Page) -> bool:
        is_due = page.slot is not None and page.frame is None
        return is_due and self.num_frames_available > 0

    def _store(self, page: Page) -> SlotRef | None:
        """Copy a page to a frame, in the plan in the making."""
        assert page.slot is not None, "a page without a slot is stored"
        frame = self.take_frame()
        if frame is not None:
            self.store_into(page, frame)
        return frame

    def store_into(self, page: Page, frame: SlotRef) -> None:
        """Copy a page on the device to a frame that the caller held and that is the page's now."""
        assert page.slot is not None, "a page without a slot is stored"
        self.store(page.slot, frame, page)
        self.place_frame(page, frame)

    def store(self, slot: SlotRef, frame: SlotRef, page: Page) -> None:
        """Copy a slot to a frame that is, or will be, the page's."""
        self.num_stores += 1
        self._filled[frame] = page
        self._move(MoveKind.STORE, slot, frame, page.has_logits)

    def _move(self, kind: MoveKind, slot: SlotRef, frame: SlotRef, has_logits: bool) -> None:
        assert self.frames is not None, "a move without frames"
        self.frames.retain(frame)
        self._moves.append(PageMove(kind, slot, frame, has_logits))

    def _stored(self, frame: SlotRef, has_failed: bool) -> None:
        page = self._filled.pop(frame)
        if page is None or page.frame != frame:
            return
        if has_failed:
            self._leave_frame(page)
            if page.num_holders > 0 and page.slot is not None:
                self._wanted[page] = None  # once more
        elif page.num_holders > 0 or page.num_tokens >= self.files.min_tokens:
            self._write(page)

    def _loaded(self, slot: SlotRef, has_failed: bool) -> None:
        page = self._promoted.pop(slot)
        if has_failed or page.slot is not None or not page.exists:
            self.slots.release(slot)
        else:
            self.place(page, slot)

    def _write(self, page: Page) -> None:
        if self.files.wants(page):
            assert self.frames is not None, "a file without frames"
            assert page.frame is not None, "a page without a frame is written"
            self.frames.retain(page.frame)
            self.files.write(page, page.frame)

    def _leave_slot(self, page: Page) -> None:
        assert page.slot is not None
        self.slots.release(page.slot)
        self.on_device.remove(page)
        page.slot = None
        self._settle_loss(page)

    def _leave_frame(self, page: Page) -> None:
        assert self.frames is not None, "a page has a frame without frames"
        assert page.frame is not None, "a page leaves a frame it has not"
        self.frames.release(page.frame)
        page.frame = None
        self._settle_loss(page)

    def _settle_loss(self, page: Page) -> None:
        self._sort(page)
        if not page.exists:
            self._wanted.pop(page, None)
            self.on_lost(page)

    def _sort(self, page: Page) -> None:
        """Whether the page's frame may be taken has changed."""
        is_needed = page.num_holders > 0 and not page.has_file  # or it would never leave its slot
        if page.frame is not None and not is_needed:
            self.in_host.insert(page)
        else:
            self.in_host.remove(page)
