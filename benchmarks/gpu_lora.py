"""Low-rank products of few rows beside torch's of the same."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from benchmarks.gpu_device import Bench, Row
from engine.kernels import reference
from engine.kernels.backend import LoraWeights


def lora_rows(bench: Bench) -> Iterator[Row]:
    """Those of one layer of the 7.2B."""
    width, ranks = (64, (8, 8, 8, 16)) if bench.is_tiny else (4096, (128, 128, 96, 480))
    for num_rows in (1, 3) if bench.is_tiny else (1, 4, 8, 16):
        x, weights = lora_inputs(bench, num_rows, width, ranks)
        ours, torchs = (
            bench.seconds(lambda k=kernels, x=x, w=weights: k.lora(*x, w))
            for kernels in (bench.kernels, reference)
        )
        yield {
            "name": "low-rank products",
            "rows": num_rows,
            "us": ours * 1e6,
            "torch_us": torchs * 1e6,
        }


def lora_inputs(
    bench: Bench, num_rows: int, width: int, ranks: tuple[int, ...]
) -> tuple[list[Tensor], LoraWeights]:
    """Four kinds of mixed rows, and weights whose products keep their size."""
    sizes = dict(zip("wavg", ranks, strict=True))
    into = {f"{name}1": bench.randn(width, rank) * width**-0.5 for name, rank in sizes.items()}
    out_of = {f"{name}2": bench.randn(rank, width) * rank**-0.5 for name, rank in sizes.items()}
    biases = {f"{name}0": bench.randn(width) for name in "wav"}
    return [bench.randn(num_rows, width) for _ in range(4)], LoraWeights(**into, **out_of, **biases)
