"""Draws one token per row from logits, with the sampling state of each seat.

Order and meaning are those of Rapid-Sampling (Triang-jyed-driung, used by rwkv-rs): grammar,
penalties, temperature, softmax, then one threshold that satisfies top-k and top-p together, the
tokens at the threshold scaled so that the kept mass is exactly what was asked for. What that has
not: biases and forbidden tokens (engine/constraints.py) come with the penalties, `min_p` before
the threshold. It knows seats and logits, not sequences or slots.

Where there is a `DeviceSampler`, it draws for the seats it can, and where there is a `HostSampler`,
it draws from float32 on the CPU; the code here is the specification.

Legend: R rows, A those of them that ask for log probabilities, V vocabulary.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor

from engine.constraints import Constraints
from engine.grammar import GrammarCompiler, Matcher
from engine.kernels.choice import reason_against_triton
from engine.kernels.philox import uniform
from engine.logprobs import score
from engine.masks import Masks
from engine.penalties import Penalties
from engine.plan import BAD_TOKEN, NO_TOKEN, Scores
from engine.tokenizer import Tokenizer
from engine.types import SamplingParams, TopLogprobs

if TYPE_CHECKING:  # needs numba
    from engine.host_sampler import HostSampler

logger = logging.getLogger(__name__)

Allowed = Sequence[bytes | None]  # a mask of each row, None where all tokens are allowed
CANDIDATES = 512  # as many as nearly every nucleus needs; sorting the rest is rarely worth it


class Draws(NamedTuple):
    """What a step drew, one entry per row, and its scores: as in `StepResult`."""

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...] = ()
    tops: tuple[TopLogprobs, ...] = ()
    scores: tuple[Scores, ...] = ()
    hidden: tuple[bytes, ...] = ()  # the runner's: of rows that return it
    unsound: tuple[int, ...] = ()  # likewise

    def picked(self, rows: Sequence[int]) -> Draws:
        """The draws of some rows, in their order."""
        logprobs = tuple(self.logprobs[i] for i in rows) if self.logprobs else ()
        tops = tuple(self.tops[i] for i in rows) if self.tops else ()
        return Draws(tuple(self.tokens[i] for i in rows), logprobs, tops)


@dataclass(slots=True)
class _Seat:
    index: int
    params: SamplingParams
    penalties: Penalties | None
    constraints: Constraints | None
    matcher: Matcher | None
    is_on_device: bool  # but for the matcher: penalties and constraints are kept there

    @property
    def is_bound(self) -> bool:
        """There are tokens that may not be drawn now."""
        return self.constraints is not None or self.matcher is not None

    def update(self, tokens: Sequence[int]) -> None:
        """These were drawn."""
        if self.penalties is not None:
            self.penalties.update(tokens)
        if self.constraints is not None:
            self.constraints.update(tokens)
        if self.matcher is not None:
            self.matcher.update(tokens)


class SeatsOnDevice(Protocol):
    """A sampler that draws without the host knowing what."""

    def can_draw(self, params: SamplingParams) -> bool: ...

    def start(self, seat: int, params: SamplingParams, output_ids: Sequence[int] = ()) -> None: ...

    def masks(self, masks: Sequence[bytes | None]) -> Tensor: ...

    def draw(
        self,
        logits_BV: Tensor,
        seats_B: Tensor,
        positions_B: Tensor,
        masks_BW: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Tokens [B] and their log probabilities [B]; undefined where the seat is negative."""
        ...


class Sampler:
    """The sampling state of all seats of one replica. Lives on the device thread."""

    def __init__(
        self,
        num_seats: int,
        banned_ids: Sequence[int],
        device: torch.device,
        tokenizer: Tokenizer | None = None,
        grammars: GrammarCompiler | None = None,
        on_device: SeatsOnDevice | None = None,
        on_host: HostSampler | None = None,
    ) -> None:
        """`banned_ids` have no text and are never drawn, whatever a request says; `tokenizer` is
        needed for `bad_words`, `grammars` for requests that name one. `on_device` draws for the
        seats that it can, `on_host` for the others; they have the same seats and banned ids."""
        self.on_device = on_device
        self._on_host = on_host
        self._grammars = grammars
        self._masks = Masks(device)
        self._device = device
        self._banned = self._ids(banned_ids)
        self._tokenizer = tokenizer
        self._seats: list[_Seat | None] = [None] * num_seats

    def start(self, seat: int, params: SamplingParams, output_ids: Sequence[int] = ()) -> None:
        """A request takes the seat; nothing of the previous one remains.

        `output_ids` are the tokens it has drawn before, in another seat or process.
        """
        is_on_device = self.on_device is not None and self.on_device.can_draw(params)
        is_here = not is_on_device
        taken = self._seats[seat] = _Seat(
            index=seat,
            params=params,
            penalties=Penalties(params) if params.has_penalties and is_here else None,
            constraints=Constraints.of(params, self._tokenizer, self._device) if is_here else None,
            matcher=self._matcher(params.grammar),
            is_on_device=is_on_device,
        )
        taken.update(output_ids)
        if self.on_device is not None and is_on_device:
            self.on_device.start(seat, params, output_ids)
        if self._on_host is not None:
            self._on_host.start(seat, params)

    def is_on_device(self, seats: Sequence[int]) -> bool:
        """The device can draw for all of them, and nobody here need know what."""
        rows = [self._seat(seat) for seat in seats]
        return all(row.is_on_device and row.matcher is None for row in rows)

    def asks_logprobs(self, seat: int) -> bool:
        return self._seat(seat).params.has_logprobs

    def sample(self, logits_RV: Tensor, seats: Sequence[int], positions: Sequence[int]) -> Draws:
        """One token per row; BAD_TOKEN where logits are not finite, NO_TOKEN where everything is
        forbidden. Overwrites the logits."""
        rows = [self._seat(seat) for seat in seats]
        if self.on_device is None or not any(row.is_on_device for row in rows):
            return self._sample_here(logits_RV, rows, positions)
        drawn = self._draw_on_device(self.on_device, logits_RV, rows, seats, positions)
        here = [i for i, row in enumerate(rows) if not row.is_on_device]
        draws = Draws(())
        if here:  # while the device draws the others
            draws = self._sample_here(
                logits_RV[here], [rows[i] for i in here], [positions[i] for i in here]
            )
        return _merged(rows, drawn, draws, here)

    def _draw_on_device(
        self,
        sampler: SeatsOnDevice,
        logits_RV: Tensor,
        rows: Sequence[_Seat],
        seats: Sequence[int],
        positions: Sequence[int],
    ) -> tuple[Tensor, Tensor]:
        """Tokens and log probabilities of the rows it can draw, not waited for."""
        own = [s if row.is_on_device else -1 for s, row in zip(seats, rows, strict=True)]
        allowed = [
            row.matcher.allowed() if row.matcher is not None and row.is_on_device else None
            for row in rows
        ]
        masks = sampler.masks(allowed) if any(mask is not None for mask in allowed) else None
        return sampler.draw(logits_RV, self._ids(own), self._ids(positions), masks)

    def _sample_here(
        self, logits_RV: Tensor, rows: Sequence[_Seat], positions: Sequence[int]
    ) -> Draws:
        asking = [i for i, row in enumerate(rows) if row.params.has_logprobs]
        raw_AV = logits_RV[asking] if asking else None
        tokens = self._pick(logits_RV, rows, positions)
        if raw_AV is None:
            return Draws(tuple(tokens))
        scores = score(
            raw_AV, [max(tokens[i], 0) for i in asking], [rows[i].params for i in asking]
        )
        logprobs, tops = [math.nan] * len(rows), list[TopLogprobs]([()] * len(rows))
        for place, i in enumerate(asking):
            if tokens[i] >= 0:
                logprobs[i] = scores.logprobs[place]
                tops[i] = scores.tops[place] if scores.tops else ()
        return Draws(tuple(tokens), tuple(logprobs), tuple(tops) if scores.tops else ())

    def score(self, seat: int, logits_RV: Tensor, tokens: Sequence[int]) -> Scores:
        """Known tokens, one per row, in view of what the request in the seat asks to be told."""
        return score(logits_RV, tokens, [self._seat(seat).params] * len(tokens))

    def _pick(
        self, logits_RV: Tensor, rows: Sequence[_Seat], positions: Sequence[int]
    ) -> list[int]:
        # First of all, so that it is done while the device still computes the logits.
        allowed = [None if row.matcher is None else row.matcher.allowed() for row in rows]
        if self._on_host is not None and self._on_host.can_draw(logits_RV):
            tokens = _draw_on_host(self._on_host, logits_RV, rows, positions, allowed)
        else:
            tokens = self._draw(logits_RV, rows, positions, allowed)
        for token, row in zip(tokens, rows, strict=True):
            if token >= 0:
                row.update((token,))
        return tokens

    def _draw(
        self, logits_RV: Tensor, rows: Sequence[_Seat], positions: Sequence[int], allowed: Allowed
    ) -> list[int]:
        is_bad = (~torch.isfinite(logits_RV).all(dim=-1)).tolist()
        self._masks.apply(logits_RV, allowed)
        logits_RV.index_fill_(-1, self._banned, -torch.inf)
        for row, logits_V in zip(rows, logits_RV, strict=True):
            if row.constraints is not None:
                row.constraints.apply(logits_V)
            if row.penalties is not None:
                row.penalties.apply(logits_V)
        tokens: list[int] = logits_RV.argmax(dim=-1).tolist()
        for i, row in enumerate(rows):
            if is_bad[i]:
                tokens[i] = BAD_TOKEN
            elif row.is_bound and logits_RV[i, tokens[i]] == -torch.inf:
                tokens[i] = NO_TOKEN
        drawn = [i for i, row in enumerate(rows) if not row.params.is_greedy and tokens[i] >= 0]
        if drawn:
            uniforms = [uniform(rows[i].params.seed, positions[i]) for i in drawn]
            picks = draw(logits_RV[drawn], [rows[i].params for i in drawn], uniforms)
            for i, token in zip(drawn, picks, strict=True):
                tokens[i] = token
        return tokens

    def _matcher(self, grammar: str | None) -> Matcher | None:
        if grammar is None:
            return None
        assert self._grammars is not None, "a request was let in with a grammar"
        return self._grammars.matcher(grammar)

    def _seat(self, index: int) -> _Seat:
        seat = self._seats[index]
        assert seat is not None, f"row for seat {index}, which nobody took"
        return seat

    def _ids(self, ids: Sequence[int]) -> Tensor:
        return torch.tensor(ids, dtype=torch.int64, device=self._device)


def choose_device_sampler(
    num_seats: int, vocab_size: int, device: torch.device, banned_ids: Sequence[int]
) -> SeatsOnDevice | None:
    """One on a GPU with Triton; says in one line of the log where tokens are drawn, and why."""
    reason = reason_against_triton(device)
    if reason is not None:
        logger.info("sampler: host (%s)", reason)
        return None
    from engine.device_sampler import DeviceSampler

    logger.info("sampler: triton (host for bad_words and top_logprobs)")
    return DeviceSampler(num_seats, vocab_size, device, banned_ids)


def choose_host_sampler(
    num_seats: int, device: torch.device, banned_ids: Sequence[int], num_threads: int = 1
) -> HostSampler | None:
    """One on a CPU with numba; without, one line of the log says so."""
    if device.type != "cpu":
        return None
    if find_spec("numba") is None:
        logger.info("sampler: torch (numba is not installed)")
        return None
    from engine.host_sampler import HostSampler

    return HostSampler(num_seats, banned_ids, num_threads)


def _draw_on_host(
    sampler: HostSampler,
    logits_RV: Tensor,
    rows: Sequence[_Seat],
    positions: Sequence[int],
    allowed: Allowed,
) -> list[int]:
    """As `Sampler._draw`."""
    is_sound: list[bool | None] = [None] * len(rows)
    for i, row in enumerate(rows):
        if row.constraints is not None:
            is_sound[i] = bool(torch.isfinite(logits_RV[i]).all())
            row.constraints.apply(logits_RV[i])
    return sampler.draw(
        logits_RV,
        [row.index for row in rows],
        positions,
        masks=allowed,
        penalties=[None if row.penalties is None else row.penalties.entries for row in rows],
        is_sound=is_sound,
    )


def _merged(
    rows: Sequence[_Seat], drawn: tuple[Tensor, Tensor], other: Draws, places: Sequence[int]
) -> Draws:
    """What the device has drawn, and at their places the draws of the rows that it cannot."""
    tokens, logprobs = drawn[0].tolist(), drawn[1].tolist()
    tops = list[TopLogprobs]([()] * len(rows))
    for row, token in zip(rows, tokens, strict=True):
        if row.is_on_device and token >= 0:
            row.update((token,))
    for i, row in enumerate(rows):
        if not row.params.has_logprobs or tokens[i] < 0:
            logprobs[i] = math.nan
    for place, i in enumerate(places):
        tokens[i] = other.tokens[place]
        logprobs[i] = other.logprobs[place] if other.logprobs else math.nan
        tops[i] = other.tops[place] if other.tops else ()
    if not any(row.params.has_logprobs for row in rows):
        return Draws(tuple(tokens))
    return Draws(tuple(tokens), tuple(logprobs), tuple(tops) if other.tops else ())


def draw(
    logits_RV: Tensor, params: Sequence[SamplingParams], uniforms: Sequence[float]
) -> list[int]:
    """Temperature, `min_p`, softmax, threshold, and the draw by inverse cumulative mass in id
    order."""

    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, device=logits_RV.device, dtype=torch.float32).unsqueeze(-1)

    temperatures = column([p.temperature for p in params])
    # The maximum goes first: logits / 1e-3 must not overflow before it is subtracted.
    scaled = (logits_RV.float() - logits_RV.amax(-1, keepdim=True).float()) / temperatures
    if any(p.min_p > 0 for p in params):
        # The most probable token is at 0 here, so these are logarithms of ratios to it.
        least_R1 = column([p.min_p for p in params]).log()
        scaled = scaled.masked_fill(scaled < least_R1, -torch.inf)
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
