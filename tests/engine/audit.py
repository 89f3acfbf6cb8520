"""What must be true of every plan and of every page of a simulation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from engine.plan import ZERO_SLOT, MoveKind, Row, SlotRef, StepPlan
from engine.scheduler import DECODE_INTERVAL
from engine.sequence import SequenceStatus
from engine.state.page import Page, ReadFile, WriteFile
from tests.engine.tracked import Tracked
from tests.hash_model import Page as Content
from tests.hash_model import feed

if TYPE_CHECKING:
    from tests.engine.simulation import Simulation


@dataclass(frozen=True, slots=True)
class Before:
    """Who could do what when a plan was begun."""

    waiting: list[Tracked]
    away: list[Tracked]
    decoding: list[Tracked]
    prefilling: list[Tracked]
    can_admit: bool
    num_forks: int


def before_plan(sim: Simulation) -> Before:
    all_tracked = list(sim.tracked.values())
    for tracked in all_tracked:
        tracked.turn_number = tracked.seq.turn_number
    waiting = [tracked for tracked in all_tracked if tracked.is_waiting]
    away = [tracked for tracked in all_tracked if tracked.is_away and not tracked.seq.is_finished]
    num_running = sum(tracked.is_running for tracked in all_tracked)
    can_admit = bool(waiting or away) and num_running < sim.setup.max_batch_size
    can_admit = can_admit and num_running + num_pages_held(sim) < sim.setup.num_slots
    if sim.setup.has_cache or sim.setup.num_frames:
        # A prompt may wait for a snapshot or the disk; a slot may be a snapshot that is in flight.
        is_held_up = bool(sim.in_flight or sim.disk.jobs or sim.kept)
        is_held_up = is_held_up or all(has_companion(sim, tracked) for tracked in waiting)
        can_admit = can_admit and not is_held_up
    if any(tracked.seq.max_tokens == 0 for tracked in waiting):
        can_admit = False  # it may end without a row, or wait for a frame
    return Before(
        waiting,
        away,
        [tracked for tracked in all_tracked if tracked.is_runnable_decode],
        [tracked for tracked in all_tracked if tracked.is_prefilling],
        can_admit,
        sim.num_forks,
    )


def num_pages_held(sim: Simulation) -> int:
    """Slots that some hold besides their own: they have drawn from a page and read it once more."""
    return sum(tracked.is_running and tracked.has_only_drawn for tracked in sim.tracked.values())


def check_plan(sim: Simulation, before: Before, plan: StepPlan | None) -> None:
    for tracked in sim.tracked.values():
        if tracked.seq.status is SequenceStatus.SWAPPED and not tracked.is_away:
            _check_preemption(sim, before, tracked, plan)
            sim.note_swap(tracked)
    decoding = [tracked for tracked in before.decoding if not tracked.is_away]
    prefilling = [tracked for tracked in before.prefilling if not tracked.is_away]
    is_excused = sim.tiers.files.has_jobs or (plan is not None and bool(plan.moves))
    can_admit = before.can_admit and not is_excused
    if plan is None:
        assert not decoding, "nothing planned beside a runnable decode row"
        assert not prefilling, "nothing planned beside an unfinished prompt"
        assert not can_admit, "nothing planned though somebody could be admitted"
        return
    assert plan.rows or plan.moves, "an empty plan"
    _check_moves(sim, plan)
    _check_rows(sim, before, decoding, plan)
    has_prefill = any(row.tokens is not None for row in plan.rows)
    came_back = any(tracked.is_running for tracked in before.away)
    assert has_prefill or came_back or not (prefilling or can_admit), "prefill starves"
    assert sim.setup.has_cache or sim.num_forks == 0, "a page moved for nothing"
    num_running = sum(tracked.is_running for tracked in sim.tracked.values())
    if sim.num_forks > before.num_forks and num_running < sim.setup.max_batch_size:
        passed = [tracked for tracked in before.waiting if tracked.is_waiting]
        is_excused = is_excused or bool(sim.disk.jobs or sim.tiers.frames)
        assert (
            is_excused
            or sim.cache.tiers.num_available + num_pages_held(sim) > 0
            or all(has_companion(sim, tracked) for tracked in passed)
        ), "a snapshot took the slot of somebody who could begin"


def _check_preemption(
    sim: Simulation, before: Before, victim: Tracked, plan: StepPlan | None
) -> None:
    """Who gives way does so to a higher priority, whose turn comes before its own then, or to its
    like after a time slice, and goes to the end of the line."""
    assert sim.setup.num_frames > 0, "a sequence was swapped out to nowhere"
    others = [*before.waiting, *before.away]
    rank, slice_tokens = victim.request.priority, sim.setup.time_slice_tokens
    has_higher = any(other.request.priority > rank for other in others)
    has_equal = any(other.request.priority == rank for other in others)
    is_due = has_equal and 0 < slice_tokens <= victim.num_slice_rows
    assert has_higher or is_due, "it gives way to nobody with more right"
    planned = () if plan is None else {row.seq_id for row in plan.rows}
    came_in = [other.request.priority for other in others if other.seq.seq_id in planned]
    if max(came_in, default=rank) > rank and not is_due:
        assert victim.seq.turn_number == victim.turn_number, "it lost its turn"
    elif came_in and not has_higher:
        still = [other.seq for other in others if other.seq.seq_id not in planned]
        equals = [seq.turn_number for seq in still if seq.request.priority == rank]
        assert victim.seq.turn_number > max(equals, default=-1), "it did not go to the end"


def _check_moves(sim: Simulation, plan: StepPlan) -> None:
    frames = sim.tiers.frames
    for move in plan.moves:
        assert frames is not None, "a move without frames"
        assert frames.is_current(move.frame), f"{move.frame} of a move is free"
        assert move.slot.slot != ZERO_SLOT, "the zero page is moved"
        if move.kind is MoveKind.LOAD:
            stored = [other.frame for flight in sim.in_flight for other in flight.moves]
            kinds = [other.kind for flight in sim.in_flight for other in flight.moves]
            pairs = zip(stored, kinds, strict=True)
            assert (move.frame, MoveKind.STORE) not in list(pairs), "loaded before it is certain"


def _check_rows(sim: Simulation, before: Before, decoding: list[Tracked], plan: StepPlan) -> None:
    rows = plan.rows
    limits = sim.scheduler.limits
    assert plan.num_tokens <= limits.max_batch_tokens, f"{plan.num_tokens} tokens over budget"
    for name, values in (
        ("sequence", [row.seq_id for row in rows]),
        ("seat", [row.seat for row in rows]),
        ("dst", [row.dst.slot for row in rows]),
    ):
        assert len(set(values)) == len(values), f"two rows share a {name}: {values}"
    loaded = {move.slot: move.frame for move in plan.moves if move.kind is MoveKind.LOAD}
    for row in rows:
        _check_places(sim, row, {other.src.slot for other in rows if other is not row}, loaded)
        _check_row(sim, row)
    planned = {row.seq_id for row in rows}
    for tracked in decoding:
        tracked.num_skipped = 0 if tracked.seq.seq_id in planned else tracked.num_skipped + 1
        most = 0 if limits.decode_first else DECODE_INTERVAL - 1
        assert tracked.num_skipped <= most, f"decode of {tracked.seq.seq_id} starves"
    _check_admission_order(sim, plan, before.waiting)


def _check_places(sim: Simulation, row: Row, other_srcs: set[int], loaded: dict) -> None:  # type: ignore[type-arg]
    """Rows of one plan run in no order; those of different plans do."""
    tracked = sim.tracked[row.seq_id]
    assert row.dst.slot != ZERO_SLOT, "a row writes the zero page"
    assert sim.pool.is_current(row.dst), f"{row.dst} is not live"
    assert not sim.pool.is_frozen(row.dst), f"{row.dst} is frozen"
    assert row.dst.slot not in other_srcs or row.num_tokens == 0, f"{row.dst} is read by another"
    if not tracked.has_begun:
        _check_origin(sim, tracked, row)
    elif tracked.is_away:
        assert row.src in loaded, f"{row.seq_id} came back without its state"
        tracked.is_away, tracked.num_slice_rows = False, 0
    else:
        assert row.src == tracked.dst, f"{row.seq_id} reads {row.src}, not what it wrote"
        _check_fork(sim, tracked, row)
    tracked.has_begun = True
    tracked.has_only_drawn = row.num_tokens == 0
    tracked.dst = row.dst if row.num_tokens > 0 else row.src
    if row.num_tokens > 0:
        assert sim.owners.setdefault(row.dst, tracked) is tracked, f"{row.dst} was another's"
        sim.writers[row.dst.slot] = tracked


def _check_fork(sim: Simulation, tracked: Tracked, row: Row) -> None:
    if row.src == row.dst:
        return
    is_free = not sim.pool.is_current(row.src)
    is_same = row.src.slot == row.dst.slot  # it has taken over the page it began from
    assert is_free or is_same or sim.pool.is_frozen(row.src), f"{row.src} can be written"
    if not tracked.has_only_drawn:
        is_end = tracked.num_fed == tracked.num_prompt
        is_on_grid = tracked.num_fed % sim.setup.paragraph_len == 0
        assert is_end or is_on_grid, f"a snapshot is left at {tracked.num_fed}, off the grid"
        sim.num_forks += not is_same


def _check_origin(sim: Simulation, tracked: Tracked, row: Row) -> None:
    """The first row: from nothing, from a state that is held, or from a snapshot of the tenant."""
    begin = row.position - tracked.num_base
    assert begin == tracked.seq.num_cached_tokens, "the count of cached tokens is wrong"
    assert begin <= tracked.num_prompt, "more is cached than was asked"
    tracked.num_fed = begin
    if begin == 0 and tracked.base is None:
        assert row.src == sim.pool.zero, f"{row.seq_id} begins from {row.src}"
        return
    assert sim.setup.has_cache or tracked.base is not None, "a hit without a cache"
    is_own = row.src.slot == row.dst.slot
    assert is_own or sim.pool.is_frozen(row.src), f"{row.src} can be written"
    sim.num_hits += 1
    sim.num_draws_kept += row.num_tokens == 0


def _check_row(sim: Simulation, row: Row) -> None:
    tracked = sim.tracked[row.seq_id]
    prompt, length = tracked.request.prompt_ids, sim.setup.paragraph_len
    assert not tracked.seq.is_finished, f"a row for {row.seq_id}, which has ended"
    position = row.position - tracked.num_base
    assert position == tracked.num_fed, f"{row.seq_id} goes on at {position}"
    end = tracked.num_fed + row.num_tokens
    if row.tokens is None:
        assert row.num_tokens == 1, f"a decode row of {row.num_tokens} tokens"
        assert tracked.is_runnable_decode, f"{row.seq_id} has nothing to decode"
    elif row.num_tokens == 0:
        assert end == len(prompt), f"{row.seq_id} draws in the middle of its prompt"
        assert tracked.num_draws == 0, f"{row.seq_id} draws once more from kept logits"
    else:
        assert row.tokens == prompt[tracked.num_fed : end], f"wrong tokens for {row.seq_id}"
        is_branch = tracked.num_fed == tracked.request.branch_at == tracked.num_cached
        sim.num_branches += is_branch and tracked.num_fed % length > 0
        is_on_grid = tracked.num_fed % length == 0
        assert is_on_grid or is_branch, f"a chunk begins at {tracked.num_fed}"
        assert end == len(prompt) or end % length == 0, f"a chunk is ragged at {end}"
    assert row.sample == (end >= len(prompt)), f"draw of {row.seq_id} at {end} is wrong"
    tracked.num_fed = end
    tracked.num_draws += row.sample
    tracked.num_slice_rows += row.tokens is None


def _check_admission_order(sim: Simulation, plan: StepPlan, waiting: list[Tracked]) -> None:
    """Nobody is passed by but a prompt that waits for what it begins with, or for a frame."""
    planned = {row.seq_id for row in plan.rows}
    ranked = sorted(waiting, key=lambda tracked: tracked.seq.waiting_order)
    came_in = [tracked.seq.seq_id in planned for tracked in ranked]
    last = max((place for place, came in enumerate(came_in) if came), default=0)
    for tracked, came in zip(ranked[:last], came_in, strict=False):
        is_excused = has_companion(sim, tracked) or tracked.seq.is_finished
        is_excused = is_excused or tracked.seq.keeps_prompt
        is_excused = is_excused or tracked.base is not None
        is_excused = is_excused or bool(sim.disk.jobs) or sim.tiers.files.has_jobs
        is_excused = is_excused or bool((sim.in_flight or plan.moves) and sim.tiers.frames)
        assert came or is_excused, f"{tracked.seq.seq_id} was passed by"


def has_companion(sim: Simulation, tracked: Tracked) -> bool:
    """Somebody runs whose prompt begins like this one, or is the same."""
    return any(
        other.is_running
        and (
            (len(tracked.chain) > 1 and tracked.chain[1] in other.chain)
            or tracked.request.prompt_ids == other.request.prompt_ids
        )
        for other in sim.tracked.values()
    )


# Pages


def check_pages(sim: Simulation) -> None:
    """Every page holds the state after exactly its tokens, wherever it lies, and what is needed
    is there."""
    alive = [tracked for tracked in sim.tracked.values() if not tracked.seq.is_finished]
    needed = sim.needed_pages
    for page in needed:
        assert page.exists or page in sim.lost, f"the state of {page.num_tokens} tokens was dropped"
        assert page.num_holders > 0, "a state that somebody needs is held by nobody"
    for page in {*sim.cache.index, *(kept.page for kept in sim.kept)}:
        if not page.exists:
            assert page in needed, "a page that nobody holds lies nowhere"
            continue
        assert page.digest in sim.states, "a page of a text that nobody asked for"
        _check_page(sim, page)
    for tracked in alive:
        parked = tracked.seq.parked
        if parked is not None and parked.exists and sim.tiers.is_settled(parked):
            assert tracked.is_away, f"{tracked.seq.seq_id} has a state beside its slot"
            _check_parked(sim, tracked, parked)
    num_pages = sum(page.slot is not None for page in sim.tiers.on_device)
    num_left = sum(len(tracked.seq.frozen) for tracked in alive)
    num_live = sum(tracked.seq.slot is not None for tracked in alive)
    num_used = sim.pool.num_slots - sim.pool.num_free
    num_promised = len(sim.tiers.promised_slots)
    paged = {page.slot for page in sim.tiers.on_device} | set(sim.tiers.promised_slots)
    num_promised += len({t.seq.origin for t in alive if t.seq.has_origin} - paged)
    assert num_used == num_live + num_pages + num_left + num_promised, (
        f"{num_used} slots used by {num_live} sequences, {num_pages} pages, {num_left} left"
    )


def _check_page(sim: Simulation, page: Page) -> None:
    state, num_tokens, _ = sim.states[page.digest]
    assert page.num_tokens == num_tokens, f"a page of {page.num_tokens} tokens counts wrong"
    if page.slot is not None:
        content = sim.model.pages.get(page.slot.slot)
        assert content is not None, f"a page of {page.num_tokens} tokens is not written yet"
        assert content.generation == page.slot.generation, "a page has a stale slot"
        _check_content(page, content, state)
    if page.frame is not None and sim.tiers.is_settled(page):
        _check_frame(sim, page, page.frame, state)
    if page.has_file:
        assert page.digest in sim.folder.files, f"no file of a page of {page.num_tokens} tokens"
        found = sim.folder.files[page.digest]
        _check_content(page, Content(found.state, 0, found.logits), state)


def _check_parked(sim: Simulation, tracked: Tracked, page: Page) -> None:
    state = 0 if tracked.base is None else tracked.base.state
    tokens = (*tracked.request.prompt_ids, *tracked.tokens)[: tracked.num_fed]
    assert len(tokens) == tracked.num_fed, f"{tracked.seq.seq_id} is away with rows in flight"
    for token in tokens:
        state = feed(state, token)
    assert page.num_tokens == tracked.num_base + tracked.num_fed, "a state counts its tokens wrong"
    if page.frame is not None:
        _check_frame(sim, page, page.frame, state)


def _check_frame(sim: Simulation, page: Page, frame: SlotRef, state: int) -> None:
    content = sim.model.frames.get(frame.slot)
    assert content is not None, f"a page of {page.num_tokens} tokens is not copied yet"
    assert content.generation == frame.generation, "a page has a stale frame"
    _check_content(page, content, state)


def _check_content(page: Page, content: Content, state: int) -> None:
    what = f"the page of {page.num_tokens} tokens"
    assert content.state == state, f"{what} holds the state after others"
    assert not page.has_logits or content.logits == state, f"{what} has the logits of others"


def check_nothing_left(sim: Simulation, tracked: Tracked) -> None:
    """What led to logits that are not finite cannot be begun from."""
    for page in sim.cache.index:
        is_suspect = page.slot is not None and sim.writers.get(page.slot.slot) is tracked
        assert not is_suspect or page.num_holders > 0, "bad logits can still be begun from"


def check_jobs(sim: Simulation) -> None:
    """What the worker is to do can be done whenever it comes to it."""
    reads = [job.file.digest for job in sim.disk.jobs if isinstance(job, ReadFile)]
    assert len(set(reads)) == len(reads), "a file is read twice at once"
    for job in sim.disk.jobs:
        if isinstance(job, ReadFile | WriteFile):
            frames = sim.tiers.frames
            assert frames is not None, "a job for a frame without frames"
            assert frames.is_current(job.frame), f"{job.frame} of a job is free"


def check_frames_are_pages(sim: Simulation) -> None:
    """At rest every frame in use is that of a page that can be found."""
    frames = sim.tiers.frames
    if frames is not None:
        num_pages = sum(page.frame is not None for page in sim.cache.index)
        assert frames.num_slots - frames.num_free == num_pages, "a frame leaked"
    assert len(sim.tiers.files.order) <= sim.setup.max_files, "more files than the budget"
    found = {page.digest for page in sim.cache.index if page.has_file}
    assert len(sim.tiers.files.order) == len(found), "a file is nobody's"
    assert sim.folder.files.keys() <= found, "a file was forgotten"
