"""Steps of running answers, one token each, recorded for some batch sizes and replayed.

A step of fewer rows than were recorded has padding rows. Knows slots, seats and tokens, neither
sequences nor what a recorder is.

Legend: B rows of the recorded size, V vocabulary, C channels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from engine.cuda_graph import Recorder
from engine.kernels.backend import Batch
from engine.model.rwkv7 import RWKV7
from engine.plan import ZERO_SLOT, Row
from engine.state.storage import StateStorage
from engine.transfers import to_device

# Close enough for little padding, few enough to be recorded in seconds; from 512 on every 128.
SIZES = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256, 320, 384, 448, 512)
KNOWN_ON_DEVICE = -1  # in place of a token: the seat's newest one
NO_SEAT, NO_SLOT = -1, -1  # of padding rows
NUM_COLUMNS = 5


class DeviceDraws(Protocol):
    """The part of a sampler on the device that needs no host."""

    def draw(
        self, logits_BV: Tensor, seats_B: Tensor, positions_B: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Tokens [B] int64 and log probabilities [B]; undefined where the seat is negative."""
        ...


def sizes_up_to(max_batch_size: int) -> list[int]:
    """Batch sizes to record, the last one being `max_batch_size` itself."""
    beyond = range(SIZES[-1] + 128, max_batch_size, 128)
    return [size for size in (*SIZES, *beyond) if size < max_batch_size] + [max_batch_size]


class DecodeGraphs:
    """Replays of one step for each size, up to the logits or, with `draws`, to the next tokens.

    What a replay leaves in `logits`, `hidden`, `tokens` and `logprobs` lasts until the next one.
    """

    def __init__(
        self,
        model: RWKV7,
        storage: StateStorage,
        next_token: Tensor,
        max_batch_size: int,
        recorder: Recorder,
        draws: DeviceDraws | None = None,
    ) -> None:
        """Record all sizes. `next_token` holds one token for each seat and a place for padding."""
        self._model, self._storage, self._next_token = model, storage, next_token
        self._draws = draws
        self._sizes = sizes_up_to(max_batch_size)
        dims, device = model.dims, storage.device

        def zeros(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(max_batch_size, *shape, dtype=dtype, device=device)

        self._inputs = zeros(NUM_COLUMNS, dtype=torch.int64).flatten()
        self.logits = zeros(dims.vocab_size, dtype=storage.logits.dtype)
        self.hidden = zeros(dims.embedded_dim, dtype=model.emb.weight.dtype)
        self.tokens = zeros(dtype=torch.int64)
        self.logprobs = zeros(dtype=torch.float64)  # float32 ones, or those of a float64 model
        self._replays: dict[tuple[int, bool], Callable[[], None]] = {}
        for size in reversed(self._sizes):
            self._fill([], size)
            self._replays[size, False] = recorder.record(partial(self._to_logits, size))
            if draws is not None:
                self._replays[size, True] = recorder.record(partial(self._to_tokens, size, draws))

    @property
    def num_graphs(self) -> int:
        return len(self._replays)

    @property
    def has_draws(self) -> bool:
        return self._draws is not None

    def to_logits(self, rows: Sequence[Row]) -> None:
        """One step of `rows`, one token each; `logits` and `hidden` of row i in place i."""
        self._replay(rows, with_draws=False)

    def to_tokens(self, rows: Sequence[Row]) -> None:
        """Likewise; `tokens` and `logprobs`, and each seat's next token is the one drawn."""
        self._replay(rows, with_draws=True)

    def _replay(self, rows: Sequence[Row], *, with_draws: bool) -> None:
        size = next(size for size in self._sizes if size >= len(rows))
        self._fill(rows, size)
        self._replays[size, with_draws]()

    def _fill(self, rows: Sequence[Row], size: int) -> None:
        """The inputs of a step, in one copy."""
        num_padding = size - len(rows)
        columns = (
            [KNOWN_ON_DEVICE if row.tokens is None else row.tokens[0] for row in rows]
            + [0] * num_padding,
            [row.seat for row in rows] + [NO_SEAT] * num_padding,
            [row.position for row in rows] + [0] * num_padding,
            [row.src.slot for row in rows] + [ZERO_SLOT] * num_padding,
            [row.dst.slot for row in rows] + [NO_SLOT] * num_padding,
        )
        values = [value for column in columns for value in column]
        self._inputs[: len(values)].copy_(to_device(values, self._storage.device))

    def _columns(self, size: int) -> tuple[Tensor, ...]:
        """Views of tokens, seats, positions, src and dst slots [B]: as `_fill` orders them."""
        return self._inputs[: NUM_COLUMNS * size].view(NUM_COLUMNS, size).unbind()

    def _forward(self, size: int) -> Tensor:
        tokens_B, seats_B, _, src_B, dst_B = self._columns(size)
        fed_B = torch.where(tokens_B == KNOWN_ON_DEVICE, self._next_token[seats_B], tokens_B)
        batch = Batch((1,) * size, src_B, dst_B)
        hidden_BC: Tensor = self._model(fed_B, batch, self._storage.state)
        return hidden_BC

    def _to_logits(self, size: int) -> None:
        hidden_BC = self._forward(size)
        self.hidden[:size].copy_(hidden_BC)
        self.logits[:size].copy_(self._model.head(hidden_BC))

    def _to_tokens(self, size: int, draws: DeviceDraws) -> None:
        logits_BV = self._model.head(self._forward(size))
        _, seats_B, positions_B, _, _ = self._columns(size)
        tokens_B, logprobs_B = draws.draw(logits_BV, seats_B, positions_B + 1)
        self._next_token[seats_B] = tokens_B.clamp(min=0)  # padding's seat is the last one
        self.tokens[:size].copy_(tokens_B)
        self.logprobs[:size].copy_(logprobs_B)
