"""The learning rate of each step, as in RWKV-LM. Knows numbers only."""

from __future__ import annotations

import math
from dataclasses import dataclass

from config.errors import ConfigError

WARMUP_FLOOR = 0.01


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """Linear warm-up from 1 %, then a cosine from `start` to `end` at the last step.

    Steps are counted from the beginning of the run. RWKV-LM counts warm-up from the start of
    the process instead, which warms up again after every resume.
    """

    start: float
    end: float
    warmup_steps: int
    num_steps: int

    def __post_init__(self) -> None:
        if self.warmup_steps >= self.num_steps:
            raise ConfigError(
                f"leaves nothing of a run of {self.num_steps} steps; lower it or train longer",
                key="warmup_steps",
                value=self.warmup_steps,
            )

    def learning_rate(self, step: int) -> float:
        """Of step `step`, counted from 0."""
        progress = (step - self.warmup_steps) / (self.num_steps - self.warmup_steps)
        cosine = math.cos(math.pi * min(1.0, max(0.0, progress)))
        rate = (self.start + self.end) / 2 + (self.start - self.end) / 2 * cosine
        if step < self.warmup_steps:
            rate *= WARMUP_FLOOR + (1 - WARMUP_FLOOR) * step / self.warmup_steps
        return rate
