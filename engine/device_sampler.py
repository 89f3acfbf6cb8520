"""The sampler whose seats live on the device: draws tokens without the host knowing them.

Importing it needs triton. It knows what requests ask for as numbers in arrays, no words, no
grammars and no text; `engine.sampler` has the rest, and says what a draw means.

Legend: B rows, S seats, V vocabulary, W words of 32 tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.kernels.gpu import draw as columns
from engine.kernels.gpu.sampler import SeatArrays, draw
from engine.types import SamplingParams

MAX_PENALTY = 1e9  # divided by the least scale, float32 still holds a thousand million of them
LARGEST = float(np.finfo(np.float32).max)


class DeviceSampler:
    """The sampling state of all seats, on one device.

    `draw` neither waits for the device nor reads from it, and its launches do not depend on what
    the seats hold: a CUDA graph may capture it for a number of rows. Seats may start between two
    replays, on the same stream.
    """

    def __init__(
        self, num_seats: int, vocab_size: int, device: torch.device, banned_ids: Sequence[int]
    ) -> None:
        """`banned_ids` are never drawn. Takes 512 KiB for each seat at 65,536 tokens: a row of
        biases and one of penalties, which are there whether or not a request has any."""

        def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self._vocab_size, self._device = vocab_size, device
        self._banned = frozenset(banned_ids)
        num_words = -(-vocab_size // 32)
        self.arrays = SeatArrays(
            floats=zeros(num_seats, columns.NUM_FLOATS.value),
            integers=zeros(num_seats, columns.NUM_INTEGERS.value, dtype=torch.int64),
            allowed=zeros(2, num_seats, num_words, dtype=torch.int32),
            biases=zeros(num_seats, vocab_size),
            penalties=zeros(num_seats, vocab_size),
            scales=zeros(num_seats),
            num_drawn=zeros(num_seats, dtype=torch.int64),
        )

    def can_draw(self, params: SamplingParams) -> bool:
        """Not what has to be told more than its token's log probability, nor what watches words.

        A grammar is no matter: whoever follows it gives the masks.
        """
        return (
            not params.bad_words
            and not params.has_top_logprobs
            and 0.0 <= params.penalty_decay <= 1.0
            and abs(params.presence_penalty) <= MAX_PENALTY
            and abs(params.repetition_penalty) <= MAX_PENALTY
        )

    def start(self, seat: int, params: SamplingParams, output_ids: Sequence[int] = ()) -> None:
        """A request takes the seat; nothing of the previous one remains.

        `output_ids` are the tokens it has drawn before, in another seat or process.
        """
        assert self.can_draw(params), params
        arrays = self.arrays
        self._put(arrays.floats[seat], np.array(self._floats(params), dtype=np.float32))
        self._put(arrays.integers[seat], np.array(self._integers(params), dtype=np.int64))
        self._put(arrays.allowed[:, seat], self._allowed(params))
        arrays.num_drawn[seat] = len(output_ids)
        if params.logit_bias:
            self._scatter(arrays.biases[seat], dict(params.logit_bias))
        if params.has_penalties:
            entries, scale = replayed(params, output_ids)
            self._scatter(arrays.penalties[seat], entries)
            arrays.scales[seat] = float(scale)

    def draw(
        self,
        logits_BV: Tensor,
        seats_B: Tensor,
        positions_B: Tensor,
        masks_BW: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Tokens [B] and their log probabilities [B]; BAD_TOKEN where logits are not finite,
        NO_TOKEN where everything is forbidden. As `engine.kernels.gpu.sampler.draw` has it."""
        return draw(logits_BV, seats_B, positions_B, self.arrays, masks_BW)

    def masks(self, masks: Sequence[bytes | None]) -> Tensor:
        """Masks of `engine.grammar` for `draw`, one per row [B, W]; None allows everything."""
        num_bytes = 4 * self.arrays.allowed.shape[2]
        rows = (b"\xff" * num_bytes if m is None else m[:num_bytes] for m in masks)
        joined = bytearray().join(row.ljust(num_bytes, b"\0") for row in rows)
        masks_BW = torch.frombuffer(joined, dtype=torch.int32).view(len(masks), -1)
        return masks_BW.to(self._device)

    def _floats(self, params: SamplingParams) -> Sequence[float]:
        """In the order of the kernels' columns."""
        return (
            min(1.0 / params.temperature, LARGEST) if params.temperature else 1.0,
            params.top_p,
            math.log(params.min_p) if params.min_p > 0.0 else -math.inf,
            params.presence_penalty,
            params.repetition_penalty,
            params.penalty_decay,
        )

    def _integers(self, params: SamplingParams) -> Sequence[int]:
        """Likewise."""
        top_k = params.top_k if 0 < params.top_k < self._vocab_size else self._vocab_size
        flags = {
            columns.IS_GREEDY: params.is_greedy,
            columns.IS_LIMITED: top_k < self._vocab_size or params.top_p < 1.0,
            columns.HAS_BIASES: bool(params.logit_bias),
            columns.HAS_PENALTIES: params.has_penalties,
        }
        seed = params.seed - (1 << 64 if params.seed >> 63 else 0)
        bits: int = sum(flag.value for flag, is_set in flags.items() if is_set)
        return (seed, top_k, params.min_tokens, bits)

    def _allowed(self, params: SamplingParams) -> NDArray[np.int32]:
        """[2, W]: once `min_tokens` are drawn, and before."""
        late = np.zeros(32 * self.arrays.allowed.shape[2], dtype=bool)
        if params.allowed_token_ids:
            late[list(params.allowed_token_ids)] = True
        else:
            late[: self._vocab_size] = True
        late[[*self._banned, *params.banned_token_ids]] = False
        early = late.copy()
        early[list(params.stop_token_ids)] = False
        return np.packbits(np.stack([late, early]), axis=-1, bitorder="little").view(np.int32)

    def _scatter(self, row_V: Tensor, values: dict[int, float] | dict[int, np.float32]) -> None:
        row_V.zero_()
        if values:
            ids = torch.tensor(list(values), dtype=torch.int64, device=self._device)
            row_V[ids] = torch.tensor(
                [float(value) for value in values.values()], device=self._device
            )

    def _put(self, place: Tensor, value: NDArray[np.generic]) -> None:
        place.copy_(torch.from_numpy(value))


def replayed(
    params: SamplingParams, tokens: Iterable[int]
) -> tuple[dict[int, np.float32], np.float32]:
    """Entries and scale of the penalties after these draws, as `_penalise` in
    engine/kernels/gpu/draw.py leaves them, to the last bit."""
    entries: dict[int, np.float32] = {}
    zero, one = np.float32(0), np.float32(1)
    presence, repetition = (
        np.float32(params.presence_penalty),
        np.float32(params.repetition_penalty),
    )
    decay, scale = np.float32(params.penalty_decay), one
    is_lost = bool(decay <= 0.5)
    for token in tokens:
        scale *= decay
        if scale < columns.LEAST_SCALE.value:
            entries = {id_: _rescaled(value, scale, is_lost) for id_, value in entries.items()}
            scale = one
        old = entries.get(token, zero)
        is_first = (old * scale if is_lost else old) == 0
        entries[token] = old + (presence if is_first else repetition) / scale
    return entries, scale


def _rescaled(value: np.float32, scale: np.float32, is_lost: bool) -> np.float32:
    new: np.float32 = value * scale
    least = np.float32(columns.LEAST_PENALTY.value)
    if is_lost or value == 0 or abs(new) >= least:
        return new
    smallest: np.float32 = np.copysign(least, value)
    return smallest
