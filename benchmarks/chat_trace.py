"""Hit rate against snapshot policy and budget: synthetic chats through the scheduler alone.

No model runs: the scheduler and the state cache work with integers, and the tokens that a model
would have drawn stand in the trace. Requests come one after the other in the order of their
arrival, each served before the next, since what counts here is what is kept between them.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from engine.plan import StepResult
from engine.scheduler import Scheduler
from engine.sequence import Sequence
from engine.state.cache import MIN_SNAPSHOT_TOKENS, StateCache
from engine.state.tiers import PageTiers
from engine.types import EngineRequest, LiveLimits, SamplingParams

NEVER = 1 << 30  # more tokens, or messages, than there are
NUM_RUNNING_SLOTS = 4  # of the batch; the rest of the budget is for snapshots
VOCAB_SIZE = 65536


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceShape:
    """Chats that begin at random, with pauses between turns, so that many are open at once."""

    num_chats: int = 400
    chats_per_s: float = 1.0
    mean_pause_s: float = 30.0
    mean_num_turns: float = 5.0
    num_system_prompts: int = 20  # the k-th most popular is 1/k as popular as the first
    system_len: int = 300
    mean_question_len: int = 60
    answer_len: int = 40


@dataclass(frozen=True, slots=True)
class Turn:
    arrival_s: float
    prompt_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]
    message_starts: tuple[int, ...]  # numbers of tokens before each message but the first
    num_shared_tokens: int  # of the prompt, that an earlier request had computed as well


@dataclass(frozen=True, slots=True)
class Policy:
    """Where snapshots are left, beside prompts' ends and the latest paragraph of an answer."""

    name: str
    paragraph_len: int
    has_branches: bool  # where a prompt parts from an earlier one
    max_hints: int  # of the places where messages begin, the first ones


POLICIES = (
    Policy("ends only", 16, has_branches=False, max_hints=0),
    Policy("ends, branches", 16, has_branches=True, max_hints=0),
    Policy("ends, branches, system", 16, has_branches=True, max_hints=1),
    Policy("ends, branches, messages", 16, has_branches=True, max_hints=NEVER),
    Policy("all, paragraphs of 64", 64, has_branches=True, max_hints=NEVER),
    Policy("all, paragraphs of 256", 256, has_branches=True, max_hints=NEVER),
)


def make_trace(shape: TraceShape, seed: int = 0) -> list[Turn]:
    """Turns of all chats by arrival. The same for the same seed."""
    draw = random.Random(seed)
    ranks = range(1, shape.num_system_prompts + 1)
    systems = [_tokens(draw, shape.system_len) for _ in ranks]
    weights = [1 / rank for rank in ranks]
    turns: list[Turn] = []
    first_seen: dict[int, float] = {}
    begin = 0.0
    for _ in range(shape.num_chats):
        begin += draw.expovariate(shape.chats_per_s)
        system = draw.choices(range(len(systems)), weights)[0]
        is_known = first_seen.setdefault(system, begin) < begin
        shared = shape.system_len if is_known else 0
        turns += _chat(draw, shape, systems[system], begin, shared)
    return sorted(turns, key=lambda turn: turn.arrival_s)


def _chat(
    draw: random.Random, shape: TraceShape, system: list[int], begin_s: float, num_shared: int
) -> Iterator[Turn]:
    history, starts = list(system), [len(system)]
    while True:
        history += _tokens(draw, 1 + int(draw.expovariate(1 / shape.mean_question_len)))
        answer = _tokens(draw, shape.answer_len)
        yield Turn(begin_s, tuple(history), tuple(answer), tuple(starts), num_shared)
        if draw.random() < 1 / shape.mean_num_turns:
            return
        # The last token drawn was not fed; whoever continues computes it.
        num_shared = len(history) + len(answer) - 1
        starts.append(len(history))
        history += answer
        starts.append(len(history))
        begin_s += draw.expovariate(1 / shape.mean_pause_s)


def _tokens(draw: random.Random, num_tokens: int) -> list[int]:
    return [draw.randrange(1, VOCAB_SIZE) for _ in range(num_tokens)]


def hit_rate(trace: Iterable[Turn], policy: Policy, num_slots: int, num_frames: int) -> float:
    """Prompt tokens taken from states, over all prompt tokens."""
    tiers = PageTiers(num_slots, num_frames)
    least = MIN_SNAPSHOT_TOKENS if policy.has_branches else NEVER
    cache = StateCache(tiers, policy.paragraph_len, b"trace", min_snapshot_tokens=least)
    limits = LiveLimits(
        decode_first=True,
        max_batch_tokens=NUM_RUNNING_SLOTS + 2 * policy.paragraph_len,
        max_waiting=1,
        max_context_len=0,
    )
    scheduler = Scheduler(cache, limits, max_batch_size=NUM_RUNNING_SLOTS)
    for number, turn in enumerate(trace):
        _serve(scheduler, number, turn, policy.max_hints)
    return cache.stats.num_hit_tokens / cache.stats.num_queried_tokens


def _serve(scheduler: Scheduler, number: int, turn: Turn, max_hints: int) -> None:
    """Run one request to its end."""
    sampling = SamplingParams(max_tokens=len(turn.answer_ids), stop_token_ids=())
    request = EngineRequest(
        request_id=str(number),
        prompt_ids=turn.prompt_ids,
        sampling=sampling,
        snapshot_hints=turn.message_starts[:max_hints],
    )
    seq = Sequence(number, request, sampling.max_tokens)
    scheduler.add(seq)
    drawn = iter(turn.answer_ids)
    while not seq.is_finished:
        plan = scheduler.plan()
        assert plan is not None, f"request {number} waits for nobody"
        tokens = tuple(next(drawn) for row in plan.rows if row.sample)
        scheduler.commit(plan, StepResult(plan.step_id, tokens, 0.0))


def measure(shape: TraceShape, budgets: Iterable[tuple[int, int]]) -> dict[str, object]:
    """Hit rates by policy and budget, a budget being numbers of slots and frames."""
    trace, budgets = make_trace(shape), list(budgets)
    num_prompt = sum(len(turn.prompt_ids) for turn in trace)
    best = sum(turn.num_shared_tokens for turn in trace) / num_prompt
    names = [f"{num_slots}+{num_frames}" for num_slots, num_frames in budgets]
    print(f"\nhit rate of {len(trace)} requests in {shape.num_chats} chats, at best {best:.3f}")
    print(f"{'slots + frames':28}" + "".join(f"{name:>10}" for name in names))
    figures: dict[str, object] = {"num_requests": len(trace), "at_best": round(best, 4)}
    for policy in POLICIES:
        rates = [hit_rate(trace, policy, *budget) for budget in budgets]
        print(f"{policy.name:28}" + "".join(f"{rate:>10.3f}" for rate in rates))
        figures[policy.name] = {
            name: round(rate, 4) for name, rate in zip(names, rates, strict=True)
        }
    return figures
