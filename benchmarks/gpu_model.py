"""Whole models with random weights: decoding by graphs, and prompts.

Shares are of the roofline: the larger of two times, that of moving the bytes of a step at the copy
bandwidth measured in the same run, and that of its products at the rate of a large one. Weights,
but for the embedding, are read once per step, and each state is read and written.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import cycle, islice
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.gpu_device import Bench, Row
from config.schema import ModelConfig
from engine import plan
from engine.cuda_graph import Recorder
from engine.decode_graphs import DecodeGraphs
from engine.kernels.backend import Batch
from engine.model.rwkv7 import RWKV7
from engine.model.weights import dummy_model
from engine.sampler import SeatsOnDevice, choose_device_sampler
from engine.state.frames import HostFrames
from engine.state.storage import StateStorage
from engine.types import SamplingParams

MODELS = Path(__file__).parents[1] / "config" / "model"
STEPS_AT_ONCE = 8  # asked of the device before one is waited for, as a server does


def model_config(name: str) -> ModelConfig:
    table = tomllib.loads((MODELS / f"rwkv-lm-{name}.toml").read_text())
    table.pop("model_type")
    return ModelConfig(name=name, **table)


def random_model(
    bench: Bench, name: str, dtype: torch.dtype | None = None, *, is_int8: bool = False
) -> RWKV7:
    """Its weights are drawn on the device in the type they stay in."""
    model = dummy_model(model_config(name), bench.device, dtype or bench.dtype, is_int8=is_int8)
    model.kernels = bench.kernels
    return model


def streamed(model: RWKV7) -> tuple[int, int]:
    """Parameters, and bytes, of all but the embedding, of which only rows are read."""
    tensors = [*model.parameters(), *model.buffers()]
    num_bytes = sum(x.nbytes for x in tensors) - model.emb.weight.nbytes
    return model.num_parameters - model.emb.weight.numel(), num_bytes


class Decoding:
    """A model, states in slots from 1 on, seats that draw, and the steps recorded for all sizes."""

    def __init__(
        self,
        bench: Bench,
        model: RWKV7,
        num_seats: int,
        *,
        recorder: Recorder | None = None,
        state: str = "float32",
        draws: bool = True,
    ) -> None:
        dims, device = model.dims, bench.device
        layout = replace(model.layout, wkv_dtype=state)
        frames = HostFrames(layout, 0, is_pinned=False)
        self.storage = StateStorage(layout, num_seats, device, frames)
        for tensor in (self.storage.state.wkv, self.storage.state.shift):
            tensor.zero_()
        self._known = bench.tokens(dims.vocab_size, num_seats + 1)
        self._tokens: list[int] = self._known.tolist()
        sampler = None
        if draws:
            sampler = choose_device_sampler(num_seats, dims.vocab_size, device, ())
        for seat in range(num_seats if sampler is not None else 0):
            _start(sampler, seat)
        self.graphs = DecodeGraphs(
            model, self.storage, self._known, num_seats, recorder or bench.recorder(), sampler
        )

    def rows_of(self, slots: Sequence[int]) -> list[plan.Row]:
        """One token for each slot: its seat's newest one where seats draw, else a random one."""
        return [
            plan.Row(
                seq_id=slot,
                seat=slot - 1,
                tokens=None if self.graphs.has_draws else (self._tokens[slot],),
                num_tokens=1,
                position=0,
                src=plan.SlotRef(slot, 0),
                dst=plan.SlotRef(slot, 0),
                sample=True,
            )
            for slot in slots
        ]

    def step(self, rows: Sequence[plan.Row]) -> None:
        if self.graphs.has_draws:
            self.graphs.to_tokens(rows)
        else:
            self.graphs.to_logits(rows)


def _start(sampler: SeatsOnDevice | None, seat: int) -> None:
    assert sampler is not None
    sampler.start(seat, SamplingParams(temperature=1.0, top_p=0.9, seed=seat))


def serving_rows(bench: Bench) -> Iterator[Row]:
    """Decoding with states in float32 and float16, prompts, and int8 weights."""
    for name in ("tiny",) if bench.is_tiny else ("1.5b", "7.2b", "0.1b"):
        model = random_model(bench, name)
        for state in ("float32", "float16"):
            yield from decode_rows(bench, model, name, state)
        yield from prefill_rows(bench, model, name)
        del model
    for name in ("tiny",) if bench.is_tiny else ("1.5b", "7.2b"):
        model = random_model(bench, name, is_int8=True)
        yield from decode_rows(bench, model, name, "float32", what="decode, int8")
        del model


@torch.inference_mode()
def decode_rows(
    bench: Bench, model: RWKV7, name: str, state: str, what: str = "decode"
) -> Iterator[Row]:
    """Steps of all layers, the head and, on a GPU, the draws; other slots in each of them."""
    sizes = (1, 4) if bench.is_tiny else (1, 8, 32, 128, 256, 512)
    decoding = Decoding(bench, model, max(sizes), state=state)
    num_weights, weight_bytes = streamed(model)
    storage = decoding.storage
    row_bytes = 2 * (storage.state.wkv[0].nbytes + storage.state.shift[0].nbytes)
    for size in sizes:
        seconds = _step_seconds(bench, decoding, size, max(sizes))
        share = bench.share_of_roofline(
            weight_bytes + size * row_bytes, 2 * num_weights * size, seconds
        )
        yield {"name": what, "model": name, "batch": size, "state": state,
               "tokens_per_s": size / seconds, "roofline": share,
               "draws": decoding.graphs.has_draws}  # fmt: skip


def _step_seconds(bench: Bench, decoding: Decoding, size: int, num_slots: int) -> float:
    starts = range(1, num_slots + 2 - size, size)
    groups = [decoding.rows_of(range(start, start + size)) for start in starts]
    steps = list(islice(cycle(groups), 2 if bench.is_tiny else STEPS_AT_ONCE))

    def run() -> None:
        for rows in steps:
            decoding.step(rows)

    return bench.seconds(run, 7) / len(steps)


@torch.inference_mode()
def prefill_rows(bench: Bench, model: RWKV7, name: str) -> Iterator[Row]:
    """One long sequence, and several; logits of last tokens only."""
    for num_sequences, length in ((1, 20), (2, 6)) if bench.is_tiny else ((1, 4096), (16, 256)):
        tokens = bench.tokens(model.dims.vocab_size, num_sequences * length)
        slots = torch.arange(num_sequences, device=bench.device)
        state = model.new_state(num_sequences, bench.device)
        batch = Batch((length,) * num_sequences, slots, slots)
        lasts = torch.arange(1, num_sequences + 1, device=bench.device) * length - 1

        def read(tokens: Tensor = tokens, batch: Batch = batch, lasts: Tensor = lasts) -> Tensor:
            logits: Tensor = model.head(model(tokens, batch, state)[lasts])  # noqa: B023
            return logits

        seconds = bench.seconds(read, 5)
        num_weights, weight_bytes = streamed(model)
        num_products = num_weights - model.dims.vocab_size * model.dims.embedded_dim
        share = bench.share_of_roofline(weight_bytes, 2 * num_products * len(tokens), seconds)
        yield {"name": "prefill", "model": name, "sequences": num_sequences, "tokens": len(tokens),
               "tokens_per_s": len(tokens) / seconds, "roofline": share}  # fmt: skip
