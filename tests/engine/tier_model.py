"""A device, a host and a disk as dicts of numbers, and those who use PageTiers, for its tests.

A page's content is its number; so is its digest, so that pages of one text come and go. Plans are
executed when they are committed, in order. The worker fills a frame as soon as it is to be read
into, and looks at a frame that it is to write as late as it can.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from engine.plan import MoveKind, PageMove, SlotRef, StepPlan
from engine.state.page import DeleteFile, DiskJob, DiskResult, Page, ReadFile, WriteFile
from engine.state.tiers import PageTiers

GARBAGE = -1
MAX_USERS, MAX_HELD = 3, 3  # or nobody else would find room any more
T = TypeVar("T")
Places = dict[int, tuple[int, int]]  # generation and content


@dataclass(slots=True, eq=False)
class User:
    """A sequence: it owns a slot, or is parked in a page of its own."""

    number: int
    slot: SlotRef | None = None
    parked: Page | None = None
    num_in_flight: int = 0


@dataclass(slots=True)
class Step:
    """A plan: its moves, then what its rows read, then what they write."""

    step_id: int
    moves: tuple[PageMove, ...] = ()
    reads: list[tuple[SlotRef, int]] = field(default_factory=list)
    writes: list[tuple[SlotRef, int]] = field(default_factory=list)  # become pages
    users: list[User] = field(default_factory=list)

    @property
    def plan(self) -> StepPlan:
        return StepPlan(self.step_id, (), moves=self.moves)


class World:
    def __init__(self, num_slots: int, num_frames: int, max_files: int) -> None:
        self.tiers = PageTiers(
            num_slots, num_frames, max_files, min_file_tokens=3, on_lost=self._lost
        )
        self.device: Places = {}
        self.host: Places = {}
        self.folder: dict[bytes, int] = {}
        self.broken: set[bytes] = set()
        self.pages: dict[int, Page] = {}  # those that can be found
        self.held: list[Page] = []  # each once per holder
        self.users: list[User] = []
        self.steps: deque[Step] = deque()  # in flight
        self.jobs: deque[DiskJob] = deque()
        self.num_steps = 0
        self._making = Step(0)
        self._failing: set[Page] = set()  # whose last copy is being lost to a failure

    # Plans

    def plan(self, actions: list[tuple[str, int]]) -> None:
        """Make a plan of some actions, each on the page or user that its number picks."""
        if len(self.steps) >= 3:
            return
        self._making = Step(self.num_steps)
        self.num_steps += 1
        self.tiers.begin_plan()
        for name, index in actions:
            getattr(self, f"_{name}")(index)
        self._making.moves = self.tiers.end_plan()
        self.steps.append(self._making)
        self._submit()

    def _begin(self, number: int) -> None:
        """A prompt is computed in a slot that becomes a page."""
        coming = {content for step in [*self.steps, self._making] for _, content in step.writes}
        slot = None if number in self.pages or number in coming else self.tiers.take_slot()
        if slot is not None:
            self._making.writes.append((slot, number))

    def _read(self, index: int) -> None:
        """A row begins from a page on the device."""
        page = pick([page for page in self.pages.values() if page.slot], index)
        if page is not None and page.slot is not None:
            self.tiers.read(page.slot)
            self.tiers.touch(page)
            self._making.reads.append((page.slot, page.num_tokens))

    def _load(self, index: int) -> None:
        """A sequence begins from a page in the host, in a slot of its own."""
        page = pick(self._loadable(), index) if len(self.users) < MAX_USERS else None
        with self.tiers.frame_held(page):
            slot = None if page is None else self.tiers.take_slot(spare=page)
        if page is not None and slot is not None:
            self.tiers.load(page, slot)
            self._run(User(page.num_tokens), slot)

    def _promote(self, index: int) -> None:
        page = pick([page for page in self._loadable() if page.slot is None], index)
        slot = None if page is None else self.tiers.slots.alloc()
        if page is not None and slot is not None:
            self.tiers.load(page, slot, promotes=True)
            self._making.reads.append((slot, page.num_tokens))

    def _park(self, index: int) -> None:
        """A sequence gives way; one that has a row in this very plan does not."""
        rested = [user for user in self.users if user.slot and user not in self._making.users]
        user = pick(rested, index)
        frame = None if user is None else self.tiers.take_frame()
        if user is not None and frame is not None and user.slot is not None:
            user.parked = Page(b"", user.number, num_holders=1)
            self.tiers.store(user.slot, frame, user.parked)
            self.tiers.place_frame(user.parked, frame)
            self.tiers.slots.release(user.slot)
            user.slot = None

    def _unpark(self, index: int) -> None:
        parked = [user for user in self.users if user.parked and not user.num_in_flight]
        parked = [user for user in parked if user.parked and self.tiers.is_settled(user.parked)]
        user = pick(parked, index)
        slot = None if user is None else self.tiers.take_slot()
        if user is not None and user.parked is not None and slot is not None:
            self.tiers.load(user.parked, slot)
            self.users.remove(user)
            self._run(user, slot)
            self._let_go_of_parked(user)

    def _secure(self, index: int) -> None:
        """A page is to be held, and brought to where it keeps nobody out."""
        page = pick(list(self.pages.values()), index)
        if page is not None and self.tiers.secure(page):
            self.hold(index)

    def _run(self, user: User, slot: SlotRef) -> None:
        user.slot = slot
        user.num_in_flight += 1
        self.users.append(user)
        self._making.users.append(user)
        self._making.reads.append((slot, user.number))

    def _loadable(self) -> list[Page]:
        return [page for page in self.pages.values() if self.tiers.is_settled(page)]

    # The device and the disk

    def commit(self, *, fails: bool = False) -> None:
        if not self.steps:
            return
        step = self.steps.popleft()
        stored = {move.frame for move in step.moves if move.kind is MoveKind.STORE}
        needed = {*self.held, *(user.parked for user in self.users if user.parked)}
        if fails:
            self._failing = {page for page in needed if page.frame in stored and not page.slot}
        self._execute(step, fails=fails)
        self.tiers.commit(step.plan, has_failed=fails)
        for user in step.users:
            user.num_in_flight -= 1
            if fails and user in self.users:
                self._end(user)
        for slot, number in step.writes:
            if fails:
                self.tiers.slots.release(slot)
            else:
                self._publish(number, slot)
        self._failing = set()
        self.users = [user for user in self.users if user.slot or user.parked]
        self._submit()

    def _execute(self, step: Step, *, fails: bool) -> None:
        for move in step.moves:
            slot, frame = (self.device, move.slot), (self.host, move.frame)
            (source, src), (places, dst) = (
                (slot, frame) if move.kind is MoveKind.STORE else (frame, slot)
            )
            put(places, dst, GARBAGE if fails else content_of(source, src))
        for ref, number in [] if fails else step.reads:
            assert content_of(self.device, ref) == number, f"{ref} is not the page of {number}"
        for ref, number in step.writes:
            put(self.device, ref, GARBAGE if fails else number)

    def _publish(self, number: int, slot: SlotRef) -> None:
        self.tiers.slots.freeze(slot)
        page = self.pages[number] = Page(bytes([number]), number)
        self.tiers.place(page, slot)

    def work(self, *, fails: bool = False) -> None:
        """The worker does its oldest job."""
        if not self.jobs:
            return
        job, error = self.jobs.popleft(), "failed" if fails else None
        match job:
            case WriteFile(file, frame) if not fails:
                self.folder[file.digest] = content_of(self.host, frame)
                self.broken.discard(file.digest)
            case ReadFile(file, frame):
                if file.digest not in self.folder or file.digest in self.broken or fails:
                    self.folder.pop(file.digest, None)
                    error = "failed"
                else:
                    put(self.host, frame, self.folder[file.digest])
            case DeleteFile(digest):
                self.folder.pop(digest, None)
        if error and isinstance(job, ReadFile):
            self._failing = {page for page in self.held if page.digest == job.file.digest}
        self.tiers.finish_job(DiskResult(job, error))
        self._failing = set()
        self._submit()

    def break_file(self, index: int) -> None:
        digest = pick(sorted(self.folder), index)
        if digest is not None:
            self.broken.add(digest)

    def _submit(self) -> None:
        for job in self.tiers.files.take_jobs():
            self.jobs.append(job)
            if isinstance(job, ReadFile):
                put(self.host, job.frame, GARBAGE)

    # Those who need pages

    def hold(self, index: int) -> None:
        page = pick(list(self.pages.values()), index) if len(self.held) < MAX_HELD else None
        if page is not None:
            self.tiers.hold(page)
            self.held.append(page)

    def unhold(self, index: int) -> None:
        page = pick(self.held, index)
        if page is not None:
            self.held.remove(page)
            self.tiers.unhold(page)
            self._submit()

    def keep_safe(self, index: int) -> None:
        page = pick(list(self.pages.values()), index)
        if page is not None:
            self.tiers.keep_safe(page)
            self._submit()

    def fetch(self, index: int) -> None:
        page = pick([page for page in self.pages.values() if page.tier == "disk"], index)
        if page is not None:
            self.tiers.fetch(page)
            self._submit()

    def drop(self, index: int) -> None:
        page = pick([page for page in self.pages.values() if not page.num_holders], index)
        if page is not None:
            self.tiers.drop(page)
            self._submit()

    def end(self, index: int) -> None:
        user = pick(self.users, index)
        if user is not None:
            self._end(user)

    def _end(self, user: User) -> None:
        self.users.remove(user)
        if user.slot is not None:
            self.tiers.slots.release(user.slot)
        self._let_go_of_parked(user)
        user.slot = None

    def _let_go_of_parked(self, user: User) -> None:
        page, user.parked = user.parked, None
        if page is not None:
            self.tiers.unhold(page)
            self.tiers.drop(page)

    def _lost(self, page: Page) -> None:
        assert page.num_holders == 0 or page in self._failing, f"{page} was held, and is lost"
        if self.pages.get(page.num_tokens) is page:
            del self.pages[page.num_tokens]
        self.held = [held for held in self.held if held is not page]
        for user in self.users:
            if user.parked is page:
                user.parked = None

    # What must be true

    def check(self) -> None:
        self.tiers.check()
        for page in self.pages.values():
            self._check_content(page)
            assert page.num_holders == self.held.count(page)
        self._check_slots()
        self._check_frames()
        unheld = [page for page in self.tiers.files.order if page.num_holders == 0]
        assert len(self.tiers.files.order) <= self.tiers.files.max_files or not unheld
        assert {page for page in self.pages.values() if page.has_file} == set(
            self.tiers.files.order
        )

    def _check_content(self, page: Page) -> None:
        number = page.num_tokens
        if page.slot is not None:
            assert content_of(self.device, page.slot) == number, f"{page} is not in its slot"
            assert self.tiers.slots.is_frozen(page.slot), f"{page} can be written"
        if page.frame is not None and self.tiers.is_settled(page):
            assert content_of(self.host, page.frame) == number, f"{page} is not in its frame"
        if page.has_file:
            assert self.folder[page.digest] == number, f"{page} is not in its file"

    def _check_slots(self) -> None:
        used = [page.slot for page in self.pages.values() if page.slot is not None]
        used += [user.slot for user in self.users if user.slot is not None]
        used += [slot for step in self.steps for slot, _ in step.writes]
        used += self.tiers.promised_slots
        slots = self.tiers.slots
        assert len(set(used)) == len(used), "a slot has two users"
        assert slots.num_free + len(used) == slots.num_slots, "a slot leaked"
        for num_slots in (0, 1, slots.num_slots):
            has_more = self.tiers.has_more_than(num_slots)
            assert has_more == (self.tiers.num_available > num_slots)

    def _check_frames(self) -> None:
        frames = self.tiers.frames
        if frames is None:
            return
        pages = [*self.pages.values(), *(user.parked for user in self.users if user.parked)]
        holders = Counter(page.frame for page in pages if page.frame is not None)
        assert all(count == 1 for count in holders.values()), "a frame has two pages"
        holders.update(move.frame for step in self.steps for move in step.moves)
        holders.update(job.frame for job in self.jobs if isinstance(job, ReadFile | WriteFile))
        assert frames.num_free + len(holders) == frames.num_slots, "a frame leaked"
        for frame, count in holders.items():
            assert frames.refs(frame) == count, f"{frame} is held by {frames.refs(frame)}"

    def settle(self) -> None:
        """Until nothing is in flight."""
        while self.steps or self.jobs:
            self.commit()
            self.work()

    def clear(self) -> None:
        """Everybody lets everything go: all places must be free."""
        self.settle()
        while self.users:
            self.end(0)
        while self.held:
            self.unhold(0)
        for page in list(self.pages.values()):
            self.tiers.drop(page)
        self._submit()
        self.settle()
        self.check()
        slots, frames = self.tiers.slots, self.tiers.frames
        assert slots.num_free == slots.num_slots
        assert frames is None or frames.num_free == frames.num_slots
        assert not self.folder


def pick(items: list[T], index: int) -> T | None:
    return items[index % len(items)] if items else None


def content_of(places: Places, ref: SlotRef) -> int:
    assert ref.slot in places, f"{ref} is read before it was written"
    generation, content = places[ref.slot]
    assert generation == ref.generation, f"stale {ref}: generation {generation}"
    return content


def put(places: Places, ref: SlotRef, content: int) -> None:
    generation, _ = places.get(ref.slot, (0, GARBAGE))
    assert generation <= ref.generation, f"stale {ref} is written"
    places[ref.slot] = (ref.generation, content)


ACTIONS = ("begin", "begin", "begin", "read", "load", "promote", "park", "unpark", "secure")
Operation = Callable[[World, int], None]
# Each with how often it comes, of all of them.
OPERATIONS: list[Operation] = [
    *[lambda world, index: world.commit()] * 4,
    *[lambda world, index: world.work()] * 4,
    lambda world, index: world.commit(fails=True),
    lambda world, index: world.work(fails=True),
    World.break_file,
    World.hold,
    World.unhold,
    World.unhold,
    World.keep_safe,
    World.fetch,
    World.fetch,
    World.drop,
    World.end,
]
