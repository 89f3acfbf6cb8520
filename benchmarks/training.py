"""A training step on a CPU: the time mix by numba, in chunks, and token by token in plain torch.

    python -m benchmarks.training [--model rwkv-lm-tiny ...] [--rounds N] [--save]

The three take turns in one process, so that ratios hold on a machine whose speed drifts: a round
is one measurement of each, a ratio the median of those within rounds, a time the median of all.
Weights and tokens are random; all three begin with the same, and their losses are shown.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks.record import finish
from config import TrainConfig, load_train
from engine.kernels import reference
from engine.kernels.backend import Backend, Batch, TimeMixRows, TimeMixWeights
from engine.kernels.cpu import backend as numba
from engine.model.rwkv7 import RWKV7, ModelDims
from train.init import init_weights
from train.optim import AdamW

Row = dict[str, object]
CONFIG = Path(__file__).parents[1] / "config"
# Sequences and tokens of each that a step takes: the embedded model's own; of 0.1B what three
# steps fit into memory and a minute with.
SHAPES = {"rwkv-lm-tiny": (4, 512), "rwkv-lm-0.1b": (1, 256)}


def token_by_token(
    r: Tensor,
    lw: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    lengths: tuple[int, ...],
    state: Tensor,
) -> tuple[Tensor, Tensor]:
    """`reference.wkv7` of sequences of equal length as a loop over their tokens."""
    inputs = (x.unflatten(0, (len(lengths), -1)) for x in (r, lw, k, v, a, b))
    y, state = reference.wkv7_recurrent(*inputs, state)
    return y.flatten(0, 1), state


@dataclass(frozen=True, slots=True)
class Engine:
    """A way to compute the time mix."""

    name: str
    kernels: Backend
    is_loop: bool = False

    def chosen(self) -> AbstractContextManager[object]:
        return patch.object(reference, "wkv7", token_by_token) if self.is_loop else nullcontext()


CHUNKED = "torch, chunks of 32"
ENGINES = (
    Engine("numba", numba),
    Engine(CHUNKED, reference),
    Engine("torch, token by token", reference, is_loop=True),
)


class Training:
    """One model and its optimiser, stepping over the same tokens."""

    def __init__(self, cfg: TrainConfig) -> None:
        self._cfg = cfg
        self.model = RWKV7(ModelDims.from_config(cfg.model))
        init_weights(self.model, cfg.random_seed)
        self._optimizer = AdamW(self.model, cfg)
        generator = torch.Generator().manual_seed(0)
        shape = (cfg.batch_size_per_device, cfg.context_length + 1)
        self._tokens = torch.randint(cfg.model.vocab_size, shape, generator=generator)

    def gradients(self, engine: Engine) -> Tensor:
        self.model.kernels = engine.kernels
        self._optimizer.zero_grad()
        with engine.chosen():
            hidden = self.model.hidden(self._tokens[:, :-1])
            loss = engine.kernels.cross_entropy_l2wrap(
                hidden.flatten(0, 1), self.model.head.weight, self._tokens[:, 1:].flatten()
            )
            loss.backward()
        return loss.detach()

    def step(self, engine: Engine) -> None:
        outcome = self._optimizer.step(self.gradients(engine), self._cfg.learning_rate_end)
        assert outcome.is_finite


def time_mix_alone(cfg: TrainConfig) -> Callable[[Engine], None]:
    """Forward and backward of one layer's time mix, gradients of all inputs included."""
    dims = ModelDims.from_config(cfg.model)
    H, N = dims.num_heads, dims.head_size
    lengths = (cfg.context_length,) * cfg.batch_size_per_device
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).requires_grad_()

    T = sum(lengths)
    rows = TimeMixRows(**{name: draw(T, H * N) for name in ("r", "k", "v", "d", "a", "g")},
                       v_first=draw(T, H * N), m=draw(T, H * N))  # fmt: skip
    weights = TimeMixWeights(k_k=draw(H * N), k_a=draw(H * N), r_k=draw(H, N),
                             norm_weight=draw(H * N), norm_bias=draw(H * N))  # fmt: skip
    slots = torch.zeros(len(lengths), dtype=torch.int64)
    pool = torch.zeros(1, H, N, N)
    d_out = torch.randn(T, H * N, generator=generator)

    def run(engine: Engine) -> None:
        with engine.chosen():
            batch = Batch(lengths=lengths, src_slot=slots, dst_slot=slots)
            engine.kernels.time_mix(rows, weights, batch, pool).backward(d_out)

    return run


def measured(action: Callable[[Engine], None], rounds: int) -> list[dict[str, float]]:
    """Of each engine: median milliseconds, and how many times as fast as chunks."""
    for engine in ENGINES:
        action(engine)
    times: dict[str, list[float]] = {engine.name: [] for engine in ENGINES}
    for number in range(rounds):
        for engine in ENGINES if number % 2 else reversed(ENGINES):
            started = time.perf_counter()
            action(engine)
            times[engine.name].append(time.perf_counter() - started)
    found = []
    for own in times.values():
        ratios = [c / t for c, t in zip(times[CHUNKED], own, strict=True)]
        found.append(
            {"ms": 1e3 * statistics.median(own), "speedup_over_chunks": statistics.median(ratios)}
        )
    return found


def rows_of(cfg: TrainConfig, rounds: int) -> Iterator[Row]:
    shape: Row = {
        "model": cfg.model.name,
        "layers": cfg.model.num_cells,
        "batch": cfg.batch_size_per_device,
        "context": cfg.context_length,
        "threads": torch.get_num_threads(),
    }
    num_tokens = cfg.num_tokens_per_step
    for engine, row in zip(ENGINES, measured(time_mix_alone(cfg), rounds), strict=True):
        yield {"case": "time mix", "engine": engine.name, **shape, **row}
    training = Training(cfg)
    losses = [float(training.gradients(engine)) for engine in ENGINES]
    results = measured(training.step, rounds)
    for engine, loss, row in zip(ENGINES, losses, results, strict=True):
        rate = 1e3 * num_tokens / row["ms"]
        yield {
            "case": "step", "engine": engine.name, **shape, **row, "tokens_per_s": rate,
            "loss": loss,
        }  # fmt: skip


def config_of(name: str) -> TrainConfig:
    batch_size, context_length = SHAPES[name]
    cfg = load_train(CONFIG, name)
    return replace(
        cfg,
        batch_size_per_device=batch_size,
        context_length=context_length,
        num_accumulation_steps_per_device=1,
        dtype="float32",
        device_type="cpu",
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--model", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--save", action="store_true", help="keep the result in results/")
    args = parser.parse_args(argv)
    rows: list[Row] = []
    for name in args.model:
        for row in rows_of(config_of(name), args.rounds):
            rows.append(row)
            cells = (f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values())
            print("  ".join(cells), flush=True)
    finish("training", {"rows": rows}, save=args.save)


if __name__ == "__main__":
    main()
