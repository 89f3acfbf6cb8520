"""What the tokens of an answer cost when they come again. Knows one request and no draws.

Legend: V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from engine.types import SamplingParams

Integers = np.ndarray[tuple[int], np.dtype[np.int64]]
Floats = np.ndarray[tuple[int], np.dtype[np.float32]]
Entries = tuple[Integers, Floats]  # token ids, each once, and what is subtracted from their logits


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

    @property
    def entries(self) -> Entries:
        """Token ids, each once, and what is subtracted from their logits."""
        n = len(self._index)
        return self._ids[:n], self._values[:n]

    def apply(self, logits_V: Tensor) -> None:
        """Subtract the penalties, in place."""
        entries = self.entries
        ids = torch.from_numpy(entries[0]).to(logits_V.device)
        values = torch.from_numpy(entries[1]).to(logits_V.device, logits_V.dtype)
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
