"""Drawing tokens on the CPU: the kernel beside the specification in torch, a sort, multinomial.

Times are the least of alternating repetitions, per row, with what Python does; the others are
ratios to the kernel's.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from itertools import count

import torch
from torch import Tensor

from benchmarks.gpu_sampler import sorted_draw
from benchmarks.record import finish
from engine.sampler import Sampler, choose_host_sampler
from engine.types import SamplingParams

CPU = torch.device("cpu")
CASES = {
    "greedy": SamplingParams(temperature=0.0),
    "plain": SamplingParams(),
    "top_p": SamplingParams(top_p=0.5),
    "top_k": SamplingParams(top_k=50),
    "min_p": SamplingParams(min_p=0.05),
    "penalties": SamplingParams(top_p=0.5, presence_penalty=0.4, repetition_penalty=0.2),
    "banned": SamplingParams(top_p=0.5, banned_token_ids=(5, 7)),
    "logprobs": SamplingParams(top_p=0.5, has_logprobs=True),
    "mask": SamplingParams(top_p=0.5),
}


class EveryOther:
    """A matcher that allows half of the tokens, whatever was drawn."""

    def __init__(self, vocab_size: int) -> None:
        self._mask = bytes([0x55]) * (vocab_size // 8)

    def allowed(self) -> bytes:
        return self._mask

    def update(self, tokens: Sequence[int]) -> None: ...


def least_seconds(ways: dict[str, Callable[[Tensor], object]], logits: Tensor) -> dict[str, float]:
    """Of each way, in turn; what it overwrites is a copy."""
    least = dict.fromkeys(ways, float("inf"))
    for repetition in range(12):
        for name, way in ways.items():
            rows = logits.clone()
            begun = time.perf_counter()
            way(rows)
            if repetition >= 2:
                least[name] = min(least[name], time.perf_counter() - begun)
    return least


def drawing(
    case: str, num_rows: int, vocab_size: int, *, by_kernel: bool
) -> Callable[[Tensor], object]:
    on_host = choose_host_sampler(num_rows, CPU, (0,)) if by_kernel else None
    sampler = Sampler(num_rows, (0,), CPU, on_host=on_host)
    past = range(1, 301) if case == "penalties" else ()
    for seat in range(num_rows):
        sampler.start(seat, CASES[case], past)
        if case == "mask":
            sampler._seats[seat].matcher = EveryOther(vocab_size)  # type: ignore[union-attr, assignment]
    positions = count()
    return lambda rows: sampler.sample(rows, range(num_rows), [next(positions)] * num_rows)


def measure(vocab_size: int, num_rows: int, scale: float) -> list[dict[str, object]]:
    logits = scale * torch.randn(num_rows, vocab_size, generator=torch.manual_seed(0))
    found: list[dict[str, object]] = []
    for case in CASES:
        ways: dict[str, Callable[[Tensor], object]] = {
            "kernel": drawing(case, num_rows, vocab_size, by_kernel=True),
            "torch": drawing(case, num_rows, vocab_size, by_kernel=False),
        }
        if case == "top_p":
            ways["sort"] = sorted_draw
        if case == "plain":
            ways["multinomial"] = lambda rows: torch.multinomial(rows.softmax(-1), 1)
        seconds = least_seconds(ways, logits)
        kernel_s = seconds.pop("kernel")
        row: dict[str, object] = {"case": case, "rows": num_rows, "spread": scale}
        row["us_per_row"] = round(kernel_s / num_rows * 1e6, 1)
        row |= {name: round(other_s / kernel_s, 2) for name, other_s in seconds.items()}
        print(row)
        found.append(row)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vocab-size", type=int, default=65_536)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--save", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    begun = time.perf_counter()
    choose_host_sampler(1, CPU, ())
    ready_s = time.perf_counter() - begun
    rows = [
        row
        for num_rows in arguments.rows
        for row in measure(arguments.vocab_size, num_rows, scale=3.0)
    ]
    figures: dict[str, object] = {
        "vocabulary": arguments.vocab_size,
        "threads": 1,
        "seconds_to_compile_or_load": round(ready_s, 2),
        "rows": rows,
    }
    finish("sampler", figures, save=arguments.save)


if __name__ == "__main__":
    main()
