"""Simulation: a scheduler driven by a script against the hash model, checked at every step.

Everything the scheduler promises is recomputed here from the plans alone; nothing asks the
sequence what it thinks. Any broken promise is an AssertionError.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from engine.plan import ZERO_SLOT, Row, SlotRef, StepPlan, StepResult
from engine.scheduler import DECODE_INTERVAL, Progress, Scheduler
from engine.sequence import Sequence
from engine.state.pool import SlotPool
from engine.types import EngineRequest, FinishReason, LiveLimits
from tests.hash_model import Answer, HashModel, oracle


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """The fixed numbers of one replica."""

    num_slots: int = 4
    max_batch_size: int = 4
    paragraph_len: int = 4
    extra_batch_tokens: int = 0  # beyond the least that is allowed
    depth: int = 2
    decode_first: bool = True
    bad_every: int = 0

    def limits(self, extra_batch_tokens: int, decode_first: bool) -> LiveLimits:
        return LiveLimits(
            decode_first=decode_first,
            max_batch_tokens=self.max_batch_size + self.paragraph_len + extra_batch_tokens,
            max_waiting=1000,
            max_context_len=0,
        )


@dataclass(slots=True, eq=False)
class Tracked:
    """What the simulation itself knows of a sequence."""

    seq: Sequence
    answer: Answer
    num_fed: int = 0  # by the rows planned so far
    num_draws: int = 0
    num_skipped: int = 0
    has_failed_row: bool = False
    tokens: list[int] = field(default_factory=list)

    @property
    def request(self) -> EngineRequest:
        return self.seq.request

    @property
    def is_runnable_decode(self) -> bool:
        is_open = not self.seq.is_finished and self.num_draws > 0
        return is_open and self.num_draws < self.request.sampling.max_tokens


class Simulation:
    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self.pool = SlotPool(setup.num_slots)
        self.scheduler = Scheduler(
            self.pool,
            setup.limits(setup.extra_batch_tokens, setup.decode_first),
            max_batch_size=setup.max_batch_size,
            paragraph_len=setup.paragraph_len,
        )
        self.model = HashModel(setup.bad_every)
        self.tracked: dict[int, Tracked] = {}
        self.in_flight: deque[StepPlan] = deque()
        self.used: dict[int, SlotRef] = {}  # the slot each sequence was given

    def add(self, request: EngineRequest) -> Tracked:
        seq = Sequence(len(self.tracked), request, request.sampling.max_tokens)
        tracked = Tracked(seq, oracle(request, bad_every=self.setup.bad_every))
        self.tracked[seq.seq_id] = tracked
        self.scheduler.add(seq)
        self.check()
        return tracked

    def plan(self) -> StepPlan | None:
        """Plan one step if the pipeline has room, and check the plan."""
        if len(self.in_flight) >= self.setup.depth:
            return None
        waiting = [tracked for tracked in self.tracked.values() if self._is_waiting(tracked)]
        decoding = [tracked for tracked in self.tracked.values() if tracked.is_runnable_decode]
        prefilling = [tracked for tracked in self.tracked.values() if self._is_prefilling(tracked)]
        can_admit = bool(waiting) and self._num_running < self.setup.max_batch_size
        can_admit = can_admit and self._num_running < self.setup.num_slots
        plan = self.scheduler.plan()
        if plan is None:
            assert not decoding, "nothing planned beside a runnable decode row"
            assert not prefilling, "nothing planned beside an unfinished prompt"
            assert not can_admit, "nothing planned though somebody could be admitted"
        else:
            self._check_plan(plan, waiting, decoding)
            has_prefill = any(row.tokens is not None for row in plan.rows)
            assert has_prefill or not (prefilling or can_admit), "prefill starves"
            self.in_flight.append(plan)
        self.check()
        return plan

    def commit(self, *, fails: bool = False) -> None:
        """Let the device finish the oldest step in flight, well or (`fails`) badly."""
        if not self.in_flight:
            return
        plan = self.in_flight.popleft()
        result = self.model.fail(plan) if fails else self.model.execute(plan)
        self._take(plan, result, self.scheduler.commit(plan, result))
        self.check()

    def abort(self, index: int) -> None:
        """End one of those alive; its slot must be free at once."""
        alive = [tracked.seq for tracked in self.tracked.values() if not tracked.seq.is_finished]
        if not alive:
            return
        seq = alive[index % len(alive)]
        num_free, had_slot = self.pool.num_free, seq.slot is not None
        self.scheduler.finish(seq, FinishReason.ABORT)
        assert self.pool.num_free == num_free + had_slot, "an abort left its slot in use"
        self.check()

    def reconfigure(self, extra_batch_tokens: int, decode_first: bool) -> None:
        self.scheduler.reconfigure(self.setup.limits(extra_batch_tokens, decode_first))
        self.check()

    def drain(self) -> None:
        """Run until nobody is left; everything must be free and every answer complete."""
        num_tokens = sum(
            len(tracked.request.prompt_ids) + tracked.request.sampling.max_tokens
            for tracked in self.tracked.values()
        )
        for _ in range(DECODE_INTERVAL * num_tokens + 1):
            while self.plan() is not None:
                pass
            if not self.in_flight:
                break
            self.commit()
        for tracked in self.tracked.values():
            seq = tracked.seq
            assert seq.is_finished, f"{seq.seq_id} never finished"
            if seq.finish_reason is not FinishReason.ABORT and not tracked.has_failed_row:
                found = Answer(tuple(tracked.tokens), seq.finish_reason or FinishReason.ABORT)
                assert found == tracked.answer, f"{seq.seq_id}: {found} is not {tracked.answer}"
        assert self.scheduler.num_running == self.scheduler.num_waiting == 0
        assert self.pool.num_free == self.setup.num_slots, "a slot leaked"
        assert self.scheduler.num_admissible == min(
            self.setup.num_slots, self.setup.max_batch_size
        ), "a seat leaked"
        self.check()

    def check(self) -> None:
        self.scheduler.check()
        for seq_id, slot in self.used.items():
            is_live = not self.tracked[seq_id].seq.is_finished
            assert self.pool.is_current(slot) == is_live, f"{slot} of {seq_id}: {is_live=}"

    def run(self, operations: Iterable[Callable[[Simulation], None]]) -> None:
        for operation in operations:
            operation(self)
        self.drain()

    @property
    def _num_running(self) -> int:
        return sum(
            tracked.num_fed > 0 and not tracked.seq.is_finished for tracked in self.tracked.values()
        )

    def _is_waiting(self, tracked: Tracked) -> bool:
        return tracked.num_fed == 0 and not tracked.seq.is_finished

    def _is_prefilling(self, tracked: Tracked) -> bool:
        is_open = not tracked.seq.is_finished
        return is_open and 0 < tracked.num_fed < len(tracked.request.prompt_ids)

    def _check_plan(self, plan: StepPlan, waiting: list[Tracked], decoding: list[Tracked]) -> None:
        rows = plan.rows
        limits = self.scheduler.limits
        assert plan.num_tokens <= limits.max_batch_tokens, f"{plan.num_tokens} tokens over budget"
        for name, values in (
            ("sequence", [row.seq_id for row in rows]),
            ("seat", [row.seat for row in rows]),
            ("dst", [row.dst.slot for row in rows]),
        ):
            assert len(set(values)) == len(values), f"two rows share a {name}: {values}"
        for row in rows:
            self._check_row(row, {other.src for other in rows if other is not row})
        planned = {row.seq_id for row in rows}
        for tracked in decoding:
            tracked.num_skipped = 0 if tracked.seq.seq_id in planned else tracked.num_skipped + 1
            most = 0 if limits.decode_first else DECODE_INTERVAL - 1
            assert tracked.num_skipped <= most, f"decode of {tracked.seq.seq_id} starves"
        self._check_admission_order(planned, waiting)

    def _check_row(self, row: Row, other_srcs: set[tuple[int, int]]) -> None:
        tracked = self.tracked[row.seq_id]
        prompt, length = tracked.request.prompt_ids, self.setup.paragraph_len
        assert not tracked.seq.is_finished, f"a row for {row.seq_id}, which has ended"
        assert row.dst.slot != ZERO_SLOT, "a row writes the zero page"
        assert self.pool.is_current(row.dst), f"{row.dst} is not live"
        assert not self.pool.is_frozen(row.dst), f"{row.dst} is frozen"
        assert self.used.setdefault(row.seq_id, row.dst) == row.dst, f"{row.seq_id} moved its page"
        assert row.dst not in other_srcs, f"{row.dst} is read by another row"
        end = tracked.num_fed + row.num_tokens
        assert row.num_tokens > 0, "an empty row"
        if row.tokens is None:
            assert row.num_tokens == 1, f"a decode row of {row.num_tokens} tokens"
            assert tracked.is_runnable_decode, f"{row.seq_id} has nothing to decode"
        else:
            assert row.tokens == prompt[tracked.num_fed : end], f"wrong tokens for {row.seq_id}"
            assert tracked.num_fed % length == 0, f"a chunk begins at {tracked.num_fed}"
            assert end == len(prompt) or end % length == 0, f"a chunk is ragged at {end}"
        assert row.sample == (end >= len(prompt)), f"draw of {row.seq_id} at {end} is wrong"
        tracked.num_fed = end
        tracked.num_draws += row.sample

    def _check_admission_order(self, planned: set[int], waiting: list[Tracked]) -> None:
        ranks = [(-tracked.request.priority, tracked.seq.seq_id) for tracked in waiting]
        came_in = [rank for rank in ranks if rank[1] in planned]
        assert came_in == [] or max(came_in) == sorted(ranks)[len(came_in) - 1], (
            f"admitted {came_in} out of {ranks}"
        )

    def _take(self, plan: StepPlan, result: StepResult, progress: list[Progress]) -> None:
        if result.error is not None:
            for row in plan.rows:
                self.tracked[row.seq_id].has_failed_row = True
                assert self.tracked[row.seq_id].seq.is_finished, "a failed row goes on"
        for one in progress:
            tracked = self.tracked[one.seq.seq_id]
            assert one.seq is tracked.seq
            if one.token_id is None:
                assert one.seq.finish_reason is FinishReason.ERROR
                assert one.seq.error, "an error without words"
                continue
            place = len(tracked.tokens)
            tracked.tokens.append(one.token_id)
            expected = tracked.answer.token_ids
            assert place < len(expected), f"{one.seq.seq_id} goes on after its end"
            assert one.token_id == expected[place], f"token {place} of {one.seq.seq_id} is wrong"
