"""Draws one token per row from logits, with the sampling state of each seat.

Order and meaning are those of Rapid-Sampling (Triang-jyed-driung, used by rwkv-rs): penalties,
temperature, softmax, then one threshold that satisfies top-k and top-p together, the tokens at
the threshold scaled so that the kept mass is exactly what was asked for. It knows seats and
logits, not sequences or slots.

Legend: R rows, A those of them that ask for log probabilities, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from engine.kernels.philox import uniform
from engine.plan import BAD_TOKEN
from engine.types import SamplingParams

CANDIDATES = 512  # as many as nearly every nucleus needs; sorting the rest is rarely worth it


class Draws(NamedTuple):
    """What a step drew, one entry per row: see `StepResult`, which takes it as it is."""

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...] = ()

    def picked(self, rows: Sequence[int]) -> Draws:
        """Those of some rows, in their order."""
        logprobs = tuple(self.logprobs[i] for i in rows) if self.logprobs else ()
        return Draws(tuple(self.tokens[i] for i in rows), logprobs)


class Penalties:
    """What each generated token costs next time: value per token, decaying with every draw.

    Kept sparse, in order of first generation: ids grow with the distinct tokens of an answer,
    not with the vocabulary. Kept on the host in float32, where the drawn tokens are known anyway:
    so an answer that comes back after 10,000 tokens gets its penalties, to the last bit, by
    drawing them again, in some 20 ms.
    """

    def __init__(self, params: SamplingParams) -> None:
        self._decay = np.float32(params.penalty_decay)
        self._presence = np.float32(params.presence_penalty)
        self._repetition = np.float32(params.repetition_penalty)
        self._index: dict[int, int] = {}
        self._ids = np.zeros(16, dtype=np.int64)
        self._values = np.zeros(16, dtype=np.float32)

    def apply(self, logits_V: Tensor) -> None:
        """Subtract the penalties, in place."""
        n = len(self._index)
        ids = torch.from_numpy(self._ids[:n]).to(logits_V.device)
        values = torch.from_numpy(self._values[:n]).to(logits_V.device, logits_V.dtype)
        logits_V.index_add_(0, ids, values, alpha=-1)

    def update(self, tokens: Sequence[int]) -> None:
        """For each drawn token in turn: decay all; then it gets presence if its entry is zero,
        else repetition."""
        for token in tokens:
            np.multiply(self._values, self._decay, out=self._values)
            index = self._index.get(token)
            if index is None:
                index = self._add(token)
            is_first = self._values[index] == 0
            self._values[index] += self._presence if is_first else self._repetition

    def _add(self, token: int) -> int:
        index = self._index[token] = len(self._index)
        if index == len(self._ids):
            self._ids = np.concatenate([self._ids, np.zeros_like(self._ids)])
            self._values = np.concatenate([self._values, np.zeros_like(self._values)])
        self._ids[index] = token
        return index


@dataclass(slots=True)
class _Seat:
    params: SamplingParams
    penalties: Penalties | None
    banned: Tensor | None


class Sampler:
    """The sampling state of all seats of one replica. Lives on the device thread."""

    def __init__(self, num_seats: int, banned_ids: Sequence[int], device: torch.device) -> None:
        """`banned_ids` have no text and are never drawn, whatever a request says."""
        self._device = device
        self._banned = self._ids(banned_ids)
        self._seats: list[_Seat | None] = [None] * num_seats

    def start(self, seat: int, params: SamplingParams, output_ids: Sequence[int] = ()) -> None:
        """A request takes the seat; nothing of the previous one remains.

        `output_ids` are the tokens it has drawn before, in another seat or process.
        """
        penalties = Penalties(params) if params.has_penalties else None
        if penalties is not None:
            penalties.update(output_ids)
        self._seats[seat] = _Seat(
            params=params,
            penalties=penalties,
            banned=self._ids(params.banned_token_ids) if params.banned_token_ids else None,
        )

    def sample(self, logits_RV: Tensor, seats: Sequence[int], positions: Sequence[int]) -> Draws:
        """One token per row, or BAD_TOKEN where logits are not finite. Overwrites the logits."""
        rows = [self._seat(seat) for seat in seats]
        asking = [i for i, row in enumerate(rows) if row.params.has_logprobs]
        logprobs_AV = logits_RV[asking].log_softmax(dim=-1) if asking else None
        tokens = self._pick(logits_RV, rows, positions)
        if logprobs_AV is None:
            return Draws(tuple(tokens))
        picks_A1 = self._ids([max(tokens[i], 0) for i in asking]).unsqueeze(-1)
        picked = logprobs_AV.gather(-1, picks_A1).squeeze(-1).tolist()
        logprobs = [math.nan] * len(rows)
        for i, logprob in zip(asking, picked, strict=True):
            if tokens[i] != BAD_TOKEN:
                logprobs[i] = logprob
        return Draws(tuple(tokens), tuple(logprobs))

    def _pick(
        self, logits_RV: Tensor, rows: Sequence[_Seat], positions: Sequence[int]
    ) -> list[int]:
        is_bad = (~torch.isfinite(logits_RV).all(dim=-1)).tolist()
        logits_RV.index_fill_(-1, self._banned, -torch.inf)
        for row, logits_V in zip(rows, logits_RV, strict=True):
            if row.banned is not None:
                logits_V.index_fill_(0, row.banned, -torch.inf)
            if row.penalties is not None:
                row.penalties.apply(logits_V)
        tokens: list[int] = logits_RV.argmax(dim=-1).tolist()
        drawn = [i for i, row in enumerate(rows) if not row.params.is_greedy and not is_bad[i]]
        if drawn:
            uniforms = [uniform(rows[i].params.seed, positions[i]) for i in drawn]
            picks = draw(logits_RV[drawn], [rows[i].params for i in drawn], uniforms)
            for i, token in zip(drawn, picks, strict=True):
                tokens[i] = token
        for i, row in enumerate(rows):
            if is_bad[i]:
                tokens[i] = BAD_TOKEN
            elif row.penalties is not None:
                row.penalties.update((tokens[i],))
        return tokens

    def _seat(self, index: int) -> _Seat:
        seat = self._seats[index]
        assert seat is not None, f"row for seat {index}, which nobody took"
        return seat

    def _ids(self, ids: Sequence[int]) -> Tensor:
        return torch.tensor(ids, dtype=torch.int64, device=self._device)


def draw(
    logits_RV: Tensor, params: Sequence[SamplingParams], uniforms: Sequence[float]
) -> list[int]:
    """Temperature, softmax, threshold, and the draw by inverse cumulative mass in id order."""

    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, device=logits_RV.device, dtype=torch.float32).unsqueeze(-1)

    temperatures = column([p.temperature for p in params])
    # The maximum goes first: logits / 1e-3 must not overflow before it is subtracted.
    scaled = (logits_RV.float() - logits_RV.amax(-1, keepdim=True).float()) / temperatures
    probs_RV = scaled.softmax(dim=-1)
    limited = [i for i, p in enumerate(params) if p.top_k > 0 or p.top_p < 1.0]
    if limited:
        subset = [params[i] for i in limited]
        probs_RV[limited] = limit(probs_RV[limited], subset)
    mass_RV = probs_RV.double().cumsum(dim=-1)
    goals = column(list(uniforms)).double() * mass_RV[:, -1:]
    # The first id whose running mass exceeds the goal; ids without mass cannot be hit.
    picks = torch.searchsorted(mass_RV, goals, right=True).squeeze(-1)
    return picks.clamp_(max=logits_RV.shape[-1] - 1).tolist()


def limit(probs_RV: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """Weights after top-k and top-p: probabilities above the threshold as they are, those equal
    to it scaled to fill exactly `top_p` of mass or `top_k` of count, the others zero.

    The threshold is the largest probability t with count(p >= t) >= k or mass(p >= t) >= top_p;
    `top_p` is of the whole mass, not of what top-k leaves.
    """
    vocab_size = probs_RV.shape[-1]
    top_k = torch.tensor(
        [p.top_k if 0 < p.top_k < vocab_size else vocab_size for p in params],
        device=probs_RV.device,
    ).unsqueeze(-1)
    top_p = torch.tensor([p.top_p for p in params], device=probs_RV.device).unsqueeze(-1)
    size = min(CANDIDATES, vocab_size)
    while True:
        sorted_RK = probs_RV.topk(size, dim=-1).values
        ranks = torch.arange(1, size + 1, device=probs_RV.device)
        reached = (ranks >= top_k) | (sorted_RK.double().cumsum(-1) >= top_p)
        if size == vocab_size or bool(reached[:, -1].all()):
            break
        size = vocab_size
    reached[:, -1] = True  # rounding may leave a mass of 1 just below top_p = 1
    threshold = sorted_RK.gather(-1, reached.int().argmax(-1, keepdim=True))
    above, equal = probs_RV > threshold, probs_RV == threshold
    num_equal = equal.sum(-1, keepdim=True)
    missing_p = top_p - (probs_RV * above).sum(-1, keepdim=True)
    missing_k = (top_k - above.sum(-1, keepdim=True)).float()
    share = torch.minimum(missing_p / (threshold * num_equal), missing_k / num_equal)
    # Without a limit in p the mass left over is rounding only: do not let it thin the last tokens.
    share = torch.where(top_p >= 1.0, missing_k / num_equal, share).nan_to_num(1.0).clamp_(0, 1)
    return torch.where(above, probs_RV, torch.where(equal, threshold * share, 0.0))
