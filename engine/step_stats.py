"""What a committed step says to the statistics."""

from __future__ import annotations

from engine.plan import StepPlan, StepResult
from engine.types import StepStats


def step_stats(plan: StepPlan, result: StepResult, gaps_s: list[float]) -> StepStats:
    prefill = [row.num_tokens for row in plan.rows if row.tokens is not None]
    return StepStats(
        duration_s=result.duration_s,
        num_decode_rows=len(plan.rows) - len(prefill),
        num_prefill_rows=len(prefill),
        num_prefill_tokens=sum(prefill),
        inter_token_s=tuple(gaps_s),
    )
