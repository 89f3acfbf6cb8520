"""What a GPU has, on a CPU: replays that compute again, and draws into tensors.

A replay calls the function again on the same buffers, so buckets, padding, buffers, the feedback
of tokens and the order of results are those of a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

import engine.engine
from engine.sampler import Sampler
from engine.types import SamplingParams


class Replays:
    """A Recorder."""

    def __init__(self) -> None:
        self.num_recorded = self.num_replayed = 0

    def record(self, function: Callable[[], None]) -> Callable[[], None]:
        function()
        self.num_recorded += 1

        def replay() -> None:
            self.num_replayed += 1
            function()

        return replay


class HostDraws:
    """A sampler that draws where the tensors are: behind it, the host's."""

    def __init__(self, num_seats: int, banned_ids: Sequence[int]) -> None:
        self._sampler = Sampler(num_seats, banned_ids, torch.device("cpu"))
        self.num_drawn = 0

    def can_draw(self, params: SamplingParams) -> bool:
        is_free = params.grammar is None and not params.bad_words
        return is_free and not params.has_top_logprobs

    def start(self, seat: int, params: SamplingParams, output_ids: Sequence[int] = ()) -> None:
        self._sampler.start(seat, params, output_ids)

    def draw(
        self, logits_BV: Tensor, seats_B: Tensor, positions_B: Tensor, masks: None = None
    ) -> tuple[Tensor, Tensor]:
        """Rows of no seat get what would do harm if anybody used it."""
        tokens_B = torch.full_like(seats_B, 2**40)
        logprobs_B = torch.full(seats_B.shape, torch.inf, dtype=torch.float64)
        rows = [i for i, seat in enumerate(seats_B.tolist()) if seat >= 0]
        if rows:
            self.num_drawn += len(rows)
            draws = self._sampler.sample(
                logits_BV[rows].clone(), seats_B[rows].tolist(), positions_B[rows].tolist()
            )
            tokens_B[rows] = torch.tensor(draws.tokens)
            if draws.logprobs:
                logprobs_B[rows] = torch.tensor(draws.logprobs, dtype=torch.float64)
        return tokens_B, logprobs_B


class Switched:
    """Every engine that is built replays its decode steps, with draws or without."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, with_draws: bool) -> None:
        self.recorders: list[Replays] = []
        self.draws: list[HostDraws] = []

        def make_recorder() -> Replays:
            self.recorders.append(Replays())
            return self.recorders[-1]

        def make_sampler(num_seats: int, banned_ids: Sequence[int], **keys: object) -> Sampler:
            self.draws.append(HostDraws(num_seats, banned_ids))
            keys["on_device"] = self.draws[-1] if with_draws else None
            return Sampler(num_seats, banned_ids, **keys)  # type: ignore[arg-type]

        monkeypatch.setattr(engine.engine, "pick_recorder", lambda table, device: make_recorder)
        monkeypatch.setattr(engine.engine, "Sampler", make_sampler)

    @property
    def num_replayed(self) -> int:
        return sum(recorder.num_replayed for recorder in self.recorders)
