"""ModelStats: what the replicas of one model have reported so far. Plain numbers, no Prometheus.

An observation is a bisect and two additions, so that one per token costs next to nothing.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate

from engine.types import RequestStats, StepStats

# The upper bounds are vLLM's, with finer ones below its first: a query over either set works.
TTFT_S = (
    0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10,
    20, 40, 80, 160, 640, 2560,
)  # fmt: skip
INTER_TOKEN_S = (
    0.0005, 0.001, 0.002, 0.003, 0.004, 0.005, 0.0075, 0.01, 0.015, 0.025, 0.05, 0.075, 0.1, 0.15,
    0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80,
)  # fmt: skip
STEP_S = INTER_TOKEN_S
LATENCY_S = (
    0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60,
    120, 240, 480, 960, 1920, 7680,
)  # fmt: skip
NUM_TOKENS = (
    1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000,
)  # fmt: skip


class Histogram:
    """Counts by upper bound. `bounds` ascend; what is above the last goes to +Inf."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def observe_known(self, value: float | None) -> None:
        if value is not None:
            self.observe(value)

    def buckets(self) -> list[tuple[str, float]]:
        """Cumulative counts by the label `le`, as Prometheus wants them."""
        labels = [*(str(float(bound)) for bound in self.bounds), "+Inf"]
        return list(zip(labels, accumulate(self.counts), strict=True))


@dataclass(slots=True)
class ModelStats:
    """The StatsSink of one model; outlives its replicas, so that counters never go back."""

    num_prompt_tokens: int = 0
    num_generation_tokens: int = 0
    ends: Counter[str] = field(default_factory=Counter)  # by finish_reason
    rows: Counter[str] = field(default_factory=Counter)  # by kind
    time_to_first_token: Histogram = field(default_factory=lambda: Histogram(TTFT_S))
    inter_token: Histogram = field(default_factory=lambda: Histogram(INTER_TOKEN_S))
    step: Histogram = field(default_factory=lambda: Histogram(STEP_S))
    latency: Histogram = field(default_factory=lambda: Histogram(LATENCY_S))
    queue: Histogram = field(default_factory=lambda: Histogram(LATENCY_S))
    prefill: Histogram = field(default_factory=lambda: Histogram(LATENCY_S))
    decode: Histogram = field(default_factory=lambda: Histogram(LATENCY_S))
    prompt_tokens: Histogram = field(default_factory=lambda: Histogram(NUM_TOKENS))
    generation_tokens: Histogram = field(default_factory=lambda: Histogram(NUM_TOKENS))
    step_tokens: Histogram = field(default_factory=lambda: Histogram(NUM_TOKENS))

    def on_step(self, stats: StepStats) -> None:
        self.step.observe(stats.duration_s)
        self.step_tokens.observe(stats.num_decode_rows + stats.num_prefill_tokens)
        self.rows["decode"] += stats.num_decode_rows
        self.rows["prefill"] += stats.num_prefill_rows
        self.num_prompt_tokens += stats.num_prefill_tokens
        self.num_generation_tokens += len(stats.inter_token_s)
        for gap_s in stats.inter_token_s:
            self.inter_token.observe(gap_s)

    def on_request(self, stats: RequestStats) -> None:
        self.ends[stats.finish_reason.value] += 1
        self.queue.observe_known(stats.queue_s)
        self.prefill.observe_known(stats.prefill_s)
        self.latency.observe(stats.latency_s)
        self.prompt_tokens.observe(stats.num_prompt_tokens)
        self.generation_tokens.observe(stats.num_output_tokens)
        if stats.time_to_first_token_s is not None:
            # Steps count the further tokens as they come; the first one has no gap before it.
            self.num_generation_tokens += 1
            self.time_to_first_token.observe(stats.time_to_first_token_s)
            self.decode.observe(stats.latency_s - stats.time_to_first_token_s)
