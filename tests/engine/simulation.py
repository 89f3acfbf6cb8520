"""Simulation: a scheduler driven by a script against the hash model, checked at every step.

Everything the scheduler promises is recomputed here and in audit.py from the plans alone; nothing
asks the sequence what it thinks. Any broken promise is an AssertionError.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable

from engine.plan import MoveKind, SlotRef, StepPlan, StepResult
from engine.scheduler import DECODE_INTERVAL, Progress, Scheduler
from engine.sequence import Sequence
from engine.state.cache import StateCache
from engine.state.page import Page, ReadFile
from engine.state.prefix import link, root
from engine.state.tiers import PageTiers
from engine.types import EngineRequest, FinishReason
from tests.engine import audit
from tests.engine.tracked import Kept, Setup, Tracked
from tests.hash_disk import HashDisk, HashFolder
from tests.hash_model import Answer, HashModel, feed, hidden_of, oracle, scores_of

SEED = b"seed of the hash model"
LOST = "the state it was to go on from is lost"


class Simulation:
    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self.folder = HashFolder()
        # The state, token count and salt that a page of this digest must have.
        self.states: dict[bytes, tuple[int, int, str]] = {}
        self.tracked: dict[int, Tracked] = {}
        self.past: list[Tracked] = []  # of before a restart
        self.kept: list[Kept] = []
        self.lost: set[Page] = set()  # pages that were needed and lost by failures
        self.num_hits = 0
        self.num_forks = 0  # rows that left the slot they stood on as a snapshot
        self.num_draws_kept = 0  # draws that needed no forward
        self.num_swaps = 0
        self.num_hidden = 0
        self.num_branches = 0  # chunks that began where prompts part, off the grid
        self._begin()

    def _begin(self) -> None:
        """A replica with nothing on the device or in host memory, and what is in the folder."""
        setup = self.setup
        self.tiers = PageTiers(
            setup.num_slots,
            setup.num_frames,
            setup.max_files,
            min_file_tokens=setup.min_file_tokens,
        )
        self.pool = self.tiers.slots
        self.cache = StateCache(
            self.tiers,
            setup.paragraph_len,
            SEED if setup.has_cache else None,
            min_snapshot_tokens=setup.min_snapshot_tokens,
            max_ghosts=setup.max_ghosts,
        )
        self.scheduler = Scheduler(
            self.cache,
            setup.limits(setup.extra_batch_tokens, setup.decode_first),
            max_batch_size=setup.max_batch_size,
        )
        self.model = HashModel(setup.bad_every)
        self.disk = HashDisk(self.folder, self.model)
        self.cache.adopt_files(self.disk.scan_pages())
        self.in_flight: deque[StepPlan] = deque()
        self.writers: dict[int, Tracked] = {}  # whose row or page was last to fill the slot
        self.owners: dict[SlotRef, Tracked] = {}  # each is one sequence's, as long as it is live

    @property
    def has_room_to_keep(self) -> bool:
        """A further state can be kept, those that are on their way counted."""
        num_coming = sum(
            tracked.seq.keeps_prompt and not tracked.seq.is_finished
            for tracked in self.tracked.values()
        )
        return self.tiers.num_frames_available > num_coming + 1

    @property
    def needed_pages(self) -> set[Page]:
        """Pages that must not be lost, unless their only copy is."""
        alive = [tracked.seq for tracked in self.tracked.values() if not tracked.seq.is_finished]
        pages = [page for seq in alive for page in (seq.parked, seq.base) if page is not None]
        return {*pages, *(kept.page for kept in self.kept)}

    # What a script does

    def add(self, request: EngineRequest, base: Kept | None = None) -> Tracked:
        page = None if base is None else base.page
        if page is not None:
            self.tiers.hold(page)
        seq = Sequence(len(self.tracked), request, request.sampling.max_tokens, page)
        start = (0, 0) if base is None else (base.state, base.num_tokens)
        answer = oracle(request, bad_every=self.setup.bad_every, base=start)
        tracked = Tracked(seq, answer, base)
        self.tracked[seq.seq_id] = tracked
        self._file_states(tracked)
        self.scheduler.add(seq)
        self.check()
        return tracked

    def plan(self) -> StepPlan | None:
        """Plan one step if the pipeline has room, and check the plan."""
        if len(self.in_flight) >= self.setup.depth:
            return None
        before = audit.before_plan(self)
        plan = self.scheduler.plan()
        self._take_ended(self.scheduler.take_ended())
        audit.check_plan(self, before, plan)
        if plan is not None:
            self.in_flight.append(plan)
        self.disk.submit(self.tiers.files.take_jobs())
        self.check()
        return plan

    def commit(self, *, fails: bool = False) -> None:
        """Let the device finish the oldest step in flight, well or (`fails`) badly."""
        if not self.in_flight:
            return
        plan = self.in_flight.popleft()
        if fails:
            stored = {move.frame for move in plan.moves if move.kind is MoveKind.STORE}
            failing = {
                page for page in self.needed_pages if page.frame in stored and page.slot is None
            }
        result = self.model.fail(plan) if fails else self.model.execute(plan)
        progress = self.scheduler.commit(plan, result)
        if fails:
            self.lost |= {page for page in failing if not page.exists}
        self._take(plan, result, progress)
        self.disk.submit(self.tiers.files.take_jobs())
        self.check()

    def work_disk(self, *, fails: bool = False) -> None:
        """Let the disk's worker finish its oldest job, well or badly."""
        if self.disk.jobs:
            result = self.disk.finish(fails=fails)
            digest = result.job.file.digest if isinstance(result.job, ReadFile) else None
            failing = {page for page in self.needed_pages if result.error and page.digest == digest}
            self.tiers.finish_job(result)
            self.lost |= {page for page in failing if not page.exists}
            self.disk.submit(self.tiers.files.take_jobs())
            self.check()

    def abort(self, index: int) -> None:
        """End one of those alive; its slot must be free at once."""
        alive = [tracked for tracked in self.tracked.values() if not tracked.seq.is_finished]
        if not alive:
            return
        tracked = alive[index % len(alive)]
        seq = tracked.seq
        num_available = self.cache.tiers.num_available
        num_held = (seq.slot is not None) + len(seq.frozen)
        self.scheduler.finish(seq, FinishReason.ABORT)
        assert self.cache.tiers.num_available >= num_available + num_held, (
            "an abort left its slot in use"
        )
        self.check()

    def swap_out(self, index: int) -> None:
        """Let a running sequence give way, whoever waits."""
        running = [tracked for tracked in self.tracked.values() if tracked.is_running]
        if running:
            tracked = running[index % len(running)]
            if self.scheduler.swap_out(tracked.seq):
                self.note_swap(tracked)
                self.scheduler.add(tracked.seq)
            self.check()

    def let_go(self, index: int) -> None:
        """A user deletes a state, whoever has begun from it."""
        if self.kept:
            self.cache.let_go(self.kept.pop(index % len(self.kept)).page)
            self.disk.submit(self.tiers.files.take_jobs())
            self.check()

    def save(self) -> None:
        """Bring everything that may be wanted later down to the files, as before a stop."""
        self.cache.save_all()
        self.check()

    def restart(self) -> None:
        """The process ends without a word and begins again: only the folder is left.

        What a user keeps is on record from when its file is there until it is lost or let go.
        """
        self.past += self.tracked.values()
        self.tracked = {}
        survivors = [kept for kept in self.kept if kept.page.has_file]
        self._begin()
        self.kept = []
        for kept in survivors:
            page = self.cache.index.get(kept.page.digest)
            if page is not None:
                self.tiers.hold(page)
                self.kept.append(Kept(page, kept.state, kept.num_tokens))
        self.tiers.files.trim()
        self.check()

    def break_file(self, index: int) -> None:
        """A file goes bad under our feet."""
        digests = sorted(self.folder.files)
        if digests:
            self.folder.broken.add(digests[index % len(digests)])

    def reconfigure(self, extra_batch_tokens: int, decode_first: bool) -> None:
        self.scheduler.reconfigure(self.setup.limits(extra_batch_tokens, decode_first))
        self.check()

    def settle(self) -> None:
        """Run until nobody is left, and check every answer."""
        num_tokens = sum(
            tracked.num_prompt + tracked.request.sampling.max_tokens
            for tracked in self.tracked.values()
        )
        num_steps = DECODE_INTERVAL * num_tokens + 10 * len(self.tracked) + 10
        for _ in range(num_steps + self.setup.num_slots + self.setup.max_files):
            while self.plan() is not None:
                pass
            if not self.in_flight and not self.disk.jobs:
                break
            self.commit()
            self.work_disk()
        for tracked in self.tracked.values():
            self._check_answer(tracked)

    def drain(self) -> None:
        """The same, and nobody keeps a state any longer: everything must be free."""
        self.settle()
        assert self.scheduler.num_running == self.scheduler.num_waiting == 0
        while self.kept:
            self.let_go(0)
        while self.disk.jobs:
            self.work_disk()
        assert self.cache.tiers.num_available == self.setup.num_slots, "a slot leaked"
        assert self.scheduler.num_admissible == min(
            self.setup.num_slots, self.setup.max_batch_size
        ), "a seat leaked"
        self.check()
        audit.check_frames_are_pages(self)

    def check(self) -> None:
        self.scheduler.check()
        audit.check_pages(self)
        audit.check_jobs(self)

    def run(self, operations: Iterable[Callable[[Simulation], None]]) -> None:
        for operation in operations:
            operation(self)
        self.drain()

    # What it notes

    def note_swap(self, tracked: Tracked) -> None:
        tracked.is_away, tracked.dst = True, None
        tracked.parked = tracked.seq.parked
        self.num_swaps += 1

    def _check_answer(self, tracked: Tracked) -> None:
        seq = tracked.seq
        assert seq.is_finished, f"{seq.seq_id} never finished"
        if seq.error == LOST:
            base = None if tracked.base is None else tracked.base.page
            assert self.lost & {tracked.parked, base}, f"the state of {seq.seq_id} is lost"
            return
        if tracked.has_failed_row:
            return
        if seq.finish_reason is not FinishReason.ABORT:
            found = Answer(tuple(tracked.tokens), seq.finish_reason or FinishReason.ABORT)
            assert found == tracked.answer, f"{seq.seq_id}: {found} is not {tracked.answer}"
            start = 0 if tracked.base is None else tracked.base.state
            assert seq.prompt_logprobs == scores_of(seq.request, start), f"{seq.seq_id} is scored"

    def _file_states(self, tracked: Tracked) -> None:
        """Note what the pages of this sequence must hold, as far as its tokens are known."""
        salt, length = tracked.request.cache_salt, self.setup.paragraph_len
        tokens = (*tracked.request.prompt_ids, *tracked.tokens)
        if not tracked.chain:
            base = tracked.base
            digest = b"" if base is None else base.page.digest
            tracked.chain.append(root(SEED, salt, digest))
            state = 0 if base is None else base.state
            self._file(tracked.chain[0], state, tracked.num_base, salt)
        while (end := len(tracked.chain) * length) <= len(tokens):
            self._extend(tracked, tokens[end - length : end])
        num_whole = tracked.num_prompt // length
        rest = tracked.request.prompt_ids[num_whole * length :]
        if rest:
            state = self.states[tracked.chain[num_whole]][0]
            for token in rest:
                state = feed(state, token)
            num_tokens = tracked.num_base + tracked.num_prompt
            self._file(link(tracked.chain[num_whole], rest), state, num_tokens, salt)

    def _extend(self, tracked: Tracked, paragraph: tuple[int, ...]) -> None:
        state, num_tokens, salt = self.states[tracked.chain[-1]]
        for token in paragraph:
            state = feed(state, token)
        tracked.chain.append(link(tracked.chain[-1], paragraph))
        self._file(tracked.chain[-1], state, num_tokens + len(paragraph), salt)

    def _file(self, digest: bytes, state: int, num_tokens: int, salt: str) -> None:
        expected = (state, num_tokens, salt)
        assert self.states.setdefault(digest, expected) == expected, "two texts have one digest"

    def _take(self, plan: StepPlan, result: StepResult, progress: list[Progress]) -> None:
        if result.error is not None:
            for row in plan.rows:
                self.tracked[row.seq_id].has_failed_row = True
                assert self.tracked[row.seq_id].seq.is_finished, "a failed row goes on"
        self._take_ended([one for one in progress if one.token_id is None])
        for one in progress:
            tracked = self.tracked[one.seq.seq_id]
            assert one.seq is tracked.seq
            if one.token_id is None:
                continue
            place = len(tracked.tokens)
            tracked.tokens.append(one.token_id)
            self._file_states(tracked)
            expected = tracked.answer.token_ids
            assert place < len(expected), f"{one.seq.seq_id} goes on after its end"
            assert one.token_id == expected[place], f"token {place} of {one.seq.seq_id} is wrong"

    def _take_ended(self, progress: list[Progress]) -> None:
        for one in progress:
            tracked, seq = self.tracked[one.seq.seq_id], one.seq
            if seq.finish_reason is FinishReason.ERROR:
                assert seq.error, "an error without words"
                if "finite" in seq.error:
                    audit.check_nothing_left(self, tracked)
            elif tracked.request.returns_hidden:
                assert seq.hidden == hidden_of(tracked.prompt_state), "the row of another state"
                self.num_hidden += 1
            elif seq.keeps_prompt:
                self._keep(tracked, seq.kept)
            else:
                assert seq.kept is None, "a state was kept that nobody wants"

    def _keep(self, tracked: Tracked, page: Page | None) -> None:
        assert page is not None, "the state of a prompt was wanted and is not there"
        assert page.num_holders > 0, "a state that is wanted is held by nobody"
        assert page.has_logits, "the state of a prompt has no logits"
        state = tracked.prompt_state
        num_tokens = tracked.num_base + tracked.num_prompt
        assert page.num_tokens == num_tokens, "a state counts its tokens wrong"
        self.states.setdefault(page.digest, (state, num_tokens, tracked.request.cache_salt))
        self.kept.append(Kept(page, state, num_tokens))
