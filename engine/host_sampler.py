"""Draws on the CPU with the kernel of `engine.kernels.cpu.draw`. Imported only where numba is.

Knows the numbers of each seat's request; penalties, constraints and grammars stay with the sampler.

Legend: R rows, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.kernels.cpu.draw import LEAST, SEATS, SOUND, UNKNOWN, UNSOUND, draw_rows
from engine.penalties import Entries, Floats, Integers
from engine.types import SamplingParams

LEAST_TEMPERATURE = 1e-30  # of those that are not 0; float32 has no lesser one to divide by
ROWS_PER_THREAD = 4  # at least: fewer take no longer than waking somebody

Masks = np.ndarray[tuple[int, int], np.dtype[np.uint8]]


class HostSampler:
    """All seats of one replica."""

    def __init__(self, num_seats: int, banned_ids: Sequence[int], num_threads: int = 1) -> None:
        """Compiles, or loads what was compiled. Many rows are shared out among the threads."""
        self._num_threads = num_threads
        self._others = ThreadPoolExecutor(max(1, num_threads - 1), "draws")
        self._seats = np.zeros(num_seats, SEATS)
        self._banned = np.array(sorted(set(banned_ids)), np.int64)
        self._no_masks = np.zeros((1, 1), np.uint8)
        self._compile()

    def start(self, seat: int, params: SamplingParams) -> None:
        temperature = 0.0 if params.is_greedy else max(params.temperature, LEAST_TEMPERATURE)
        least = max(LEAST, math.log(params.min_p)) if params.min_p > 0 else LEAST
        self._seats[seat] = (params.seed, params.top_p, params.top_k, temperature, least)

    def can_draw(self, logits_RV: Tensor) -> bool:
        """Whatever is more exact is for the specification."""
        return (
            logits_RV.dtype == torch.float32
            and logits_RV.device.type == "cpu"
            and logits_RV.is_contiguous()
        )

    def draw(
        self,
        logits_RV: Tensor,
        seats: Sequence[int],
        positions: Sequence[int],
        *,
        masks: Sequence[bytes | None],
        penalties: Sequence[Entries | None],
        is_sound: Sequence[bool | None],
    ) -> list[int]:
        """One token per row, or BAD_TOKEN or NO_TOKEN. Overwrites the logits.

        `is_sound` tells of rows whose logits have been changed whether they were finite before;
        None of others.
        """
        num_rows, vocab_size = logits_RV.shape
        mask_rows, masks_GM = self._masks(masks, -(-vocab_size // 8))
        starts, ids, values = _joined(penalties)
        soundness = [UNKNOWN if told is None else SOUND if told else UNSOUND for told in is_sound]
        tokens = np.empty(num_rows, np.int64)
        rows: tuple[Any, ...] = (
            logits_RV.numpy(), self._seats[np.array(seats, np.int64)],
            np.array(positions, np.int64), np.array(soundness, np.int64),
            mask_rows, masks_GM, self._banned, starts, ids, values, tokens,
        )  # fmt: skip
        num_parts = max(1, min(self._num_threads, num_rows // ROWS_PER_THREAD))
        ends = [num_rows * (part + 1) // num_parts for part in range(num_parts)]
        others = [self._others.submit(draw_rows, *part, *rows) for part in pairwise(ends)]
        draw_rows(0, ends[0], *rows)
        for other in others:
            other.result()
        return tokens.tolist()

    def _masks(self, masks: Sequence[bytes | None], num_bytes: int) -> tuple[Integers, Masks]:
        """Which mask each row has, and those there are."""
        rows = np.full(len(masks), -1, np.int64)
        places = [i for i, mask in enumerate(masks) if mask is not None]
        if not places:
            return rows, self._no_masks
        rows[places] = np.arange(len(places))
        joined = bytearray().join(mask[:num_bytes] for mask in masks if mask is not None)
        return rows, np.frombuffer(joined, np.uint8).reshape(len(places), num_bytes)

    def _compile(self) -> None:
        self.draw(torch.zeros(0, 1), (), (), masks=(), penalties=(), is_sound=())


def _joined(penalties: Sequence[Entries | None]) -> tuple[Integers, Integers, Floats]:
    """Where those of each row begin, and those of all rows behind each other."""
    starts = np.zeros(len(penalties) + 1, np.int64)
    found = [entries for entries in penalties if entries is not None]
    if not found:
        return starts, np.zeros(0, np.int64), np.zeros(0, np.float32)
    np.cumsum([0 if entries is None else len(entries[0]) for entries in penalties], out=starts[1:])
    ids, values = zip(*found, strict=True)
    return starts, np.concatenate(ids), np.concatenate(values)
