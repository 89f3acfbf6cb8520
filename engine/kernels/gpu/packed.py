"""Where each sequence lies among the packed tokens, on the device. Knows no kernels.

Worked out once for a batch and kept with it, so that all layers of a forward share one copy.
Decoding needs none of it: where every sequence is one token long, row and sequence are the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from engine.kernels.backend import Batch

CHUNK_LEN = 16  # the shortest tl.dot takes; the solution loses accuracy with every doubling


@dataclass(frozen=True, slots=True)
class PackedRows:
    """For T packed tokens of S sequences; all tensors int64."""

    num_tokens: int
    num_chunks: int
    starts: Tensor  # [S + 1]: first token of each sequence, and the end
    chunk_starts: Tensor  # [S + 1], counted in chunks, of which none spans two sequences
    sequences: Tensor  # [T]: whose token it is
    chunk_tokens: Tensor  # [chunks + 1]: first token of each chunk, and the end

    @staticmethod
    def of(lengths: tuple[int, ...], device: torch.device) -> PackedRows:
        starts = list(accumulate(lengths, initial=0))
        chunk_starts = list(accumulate((-(-n // CHUNK_LEN) for n in lengths), initial=0))
        chunk_tokens = [
            token
            for start, length in zip(starts, lengths, strict=False)
            for token in range(start, start + length, CHUNK_LEN)
        ]
        starts_S = _on_device(starts, device)
        # `output_size` is what spares a wait for the device.
        order = torch.arange(len(lengths), device=device)
        return PackedRows(
            num_tokens=starts[-1],
            num_chunks=chunk_starts[-1],
            starts=starts_S,
            chunk_starts=_on_device(chunk_starts, device),
            sequences=order.repeat_interleave(starts_S.diff(), output_size=starts[-1]),
            chunk_tokens=_on_device([*chunk_tokens, starts[-1]], device),
        )

    @staticmethod
    def of_batch(batch: Batch) -> PackedRows:
        """Made at the first call for a batch, the same object from then on."""
        rows = batch.notes.get(PackedRows)
        if not isinstance(rows, PackedRows):
            rows = batch.notes[PackedRows] = PackedRows.of(batch.lengths, batch.src_slot.device)
        return rows

    @property
    def num_sequences(self) -> int:
        return self.starts.shape[0] - 1


def _on_device(values: list[int], device: torch.device) -> Tensor:
    """From pinned memory, so that nobody waits for the device."""
    host = torch.tensor(values, dtype=torch.int64, pin_memory=device.type == "cuda")
    return host.to(device, non_blocking=True)
