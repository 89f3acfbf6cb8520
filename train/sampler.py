"""Which tokens a training step sees: a pure function of the step number.

RWKV-LM's sampler: the token stream is cut into slots of `context_length`, and a cubic map modulo
a prime visits every slot once before any comes again. No state to save, no shuffle to store.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from train.binidx import Dataset, DatasetError

MINI_EPOCH_SAMPLES = 40_320  # 8!, RWKV-LM's unit of progress
GOLDEN = (math.sqrt(5) - 1) / 2


def is_prime(n: int) -> bool:
    return n >= 2 and all(n % i for i in range(2, math.isqrt(n) + 1))


def magic_prime(num_tokens: int, context_length: int) -> int:
    """The largest prime p = 3n + 2 below num_tokens / context_length - 1 (RWKV-LM).

    p = 2 (mod 3) makes i -> i**3 mod p a bijection. Raises DatasetError when there is none.
    """
    p = -(-num_tokens // context_length) - 2  # the largest integer strictly below
    while p >= 2 and not (p % 3 == 2 and is_prime(p)):
        p -= 1
    if p < 2:
        raise DatasetError(
            f"{num_tokens} tokens are too few for context_length = {context_length}: at least "
            f"{3 * context_length + 1} are needed; add data or use a shorter context"
        )
    return p


@dataclass(frozen=True, slots=True)
class Sampler:
    """Windows of context_length + 1 tokens; sample i is the i-th one drawn, counted from 0."""

    prime: int
    context_length: int

    @staticmethod
    def for_dataset(dataset: Dataset, context_length: int) -> Sampler:
        return Sampler(magic_prime(dataset.num_tokens, context_length), context_length)

    def slot(self, sample: int) -> int:
        i = sample + 1
        factor = int(self.prime * GOLDEN)
        return factor * pow(i, 3, self.prime) % self.prime

    def start(self, sample: int) -> int:
        """First token of the window.

        The first pass over the data uses RWKV-LM's slots as they are. Each further pass moves
        all of them by another part of a slot, so that repeated text is cut at other places.
        """
        shift = int((sample // self.prime) * GOLDEN % 1.0 * self.context_length)
        return self.slot(sample) * self.context_length + shift

    def batch(self, dataset: Dataset, first_sample: int, count: int) -> NDArray[np.int64]:
        """Samples first_sample .. first_sample + count - 1, as [count, context_length + 1]."""
        rows = []
        for sample in range(first_sample, first_sample + count):
            start = self.start(sample)
            rows.append(dataset.tokens[start : start + self.context_length + 1])
        return np.stack(rows).astype(np.int64)
