"""Where sequences lie among packed tokens."""

from __future__ import annotations

import torch

from engine.kernels.backend import Batch
from engine.kernels.gpu.packed import PackedRows


def test_starts_are_counted_in_tokens_and_in_chunks() -> None:
    rows = PackedRows.of((17, 1, 0, 16), torch.device("cpu"))
    assert (rows.num_tokens, rows.num_chunks, rows.num_sequences) == (34, 4, 4)
    assert rows.starts.tolist() == [0, 17, 18, 18, 34]
    assert rows.chunk_starts.tolist() == [0, 2, 3, 3, 4]
    assert rows.sequences.tolist() == [0] * 17 + [1] + [3] * 16
    assert rows.chunk_tokens.tolist() == [0, 16, 17, 18, 34]


def test_all_layers_of_a_batch_share_them_and_no_other_batch_does() -> None:
    slots = torch.tensor([1, 2])
    batch, other = Batch((3, 1), slots, slots), Batch((1, 3), slots, slots)
    rows = PackedRows.of_batch(batch)
    assert PackedRows.of_batch(batch) is rows
    assert PackedRows.of_batch(other).starts.tolist() == [0, 1, 4]
