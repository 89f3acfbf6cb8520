"""Whole models with random weights: decoding, prompts, and a step of training.

Shares are of the roofline: bytes that a step must move over the copy bandwidth measured in the
same run, or its products over the rate of a large one. Weights, but for the embedding, are read
once per step, and each state is read and written.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks.gpu_device import Bench, Row
from config.schema import ModelConfig
from engine.kernels.backend import Batch
from engine.kernels.optimizer import AdamWStep
from engine.model.rwkv7 import RWKV7, ModelDims

MODELS = Path(__file__).parents[1] / "config" / "model"


def random_model(bench: Bench, name: str, dtype: torch.dtype) -> RWKV7:
    table = tomllib.loads((MODELS / f"{name}.toml").read_text())
    table.pop("model_type")
    with torch.device(bench.device):
        model = RWKV7(ModelDims.from_config(ModelConfig(name=name, **table))).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.02)
    model.kernels = bench.kernels
    return model


def num_streamed(model: RWKV7) -> int:
    """Parameters but for the embedding, of which only rows are read."""
    return sum(p.numel() for p in model.parameters()) - model.emb.weight.numel()


def serving_rows(bench: Bench) -> Iterator[Row]:
    names = ("tiny",) if bench.is_tiny else ("0.1b", "1.5b", "7.2b")
    for name in names:
        model = random_model(bench, f"rwkv-lm-{name}", bench.dtype)
        for size in (1, 4) if bench.is_tiny else (1, 8, 32, 128, 256, 512):
            yield {"model": name, **decode_row(bench, model, size)}
        for length in (20,) if bench.is_tiny else (4096,):
            yield {"model": name, **prefill_row(bench, model, length)}
        del model


def decode_row(bench: Bench, model: RWKV7, size: int) -> Row:
    """One step of all layers and the head, launched from Python."""
    tokens = torch.ones(size, dtype=torch.int64, device=bench.device)
    slots = torch.arange(size, device=bench.device)
    state = model.new_state(size, bench.device)
    batch = Batch((1,) * size, slots, slots)
    with torch.inference_mode():
        seconds = bench.seconds(lambda: model.head(model(tokens, batch, state)))
    num_bytes = num_streamed(model) * bench.dtype.itemsize
    num_bytes += 2 * (state.wkv.nbytes + state.shift.nbytes)
    share = num_bytes / bench.bytes_per_s / seconds if bench.bytes_per_s else None
    return {"name": "decode", "batch": size, "tokens_per_s": size / seconds, "roofline": share}


def prefill_row(bench: Bench, model: RWKV7, length: int) -> Row:
    """One sequence; logits of its last token only."""
    tokens = torch.ones(length, dtype=torch.int64, device=bench.device)
    slots = torch.zeros(1, dtype=torch.int64, device=bench.device)
    state = model.new_state(1, bench.device)
    batch = Batch((length,), slots, slots)
    with torch.inference_mode():
        seconds = bench.seconds(lambda: model.head(model(tokens, batch, state)[-1:]), 5)
    flop = 2 * (num_streamed(model) - model.head.weight.numel()) * length
    share = flop / bench.flop_per_s / seconds if bench.flop_per_s else None
    return {"name": "prefill", "tokens": length, "tokens_per_s": length / seconds,
            "roofline": share}  # fmt: skip


def training_flop_per_token(model: RWKV7) -> int:
    """Six per parameter of a product, forward and backward; and the recurrence, three times nine
    per element of its states."""
    dims = model.dims
    num_state = dims.num_cells * dims.embedded_dim * dims.head_size
    return 6 * num_streamed(model) + 3 * 9 * num_state


def training_rows(bench: Bench) -> Iterator[Row]:
    """Forward and backward of 0.1B in bf16 under autocast, clipping and AdamW, without data.

    AdamW works on buffers of the model's size that are not the model's.
    """
    name, batch_size, length = ("tiny", 1, 16) if bench.is_tiny else ("0.1b", 16, 4096)
    model = random_model(bench, f"rwkv-lm-{name}", torch.float32)
    flat = torch.zeros(4, sum(p.numel() for p in model.parameters()), device=bench.device)
    tokens = torch.ones(batch_size, length + 1, dtype=torch.int64, device=bench.device)
    step = AdamWStep(
        learning_rate=0.0, weight_decay=0.0, beta1=0.9, beta2=0.99, eps=1e-18, number=1
    )

    def train() -> None:
        with torch.autocast(bench.device.type, torch.bfloat16):
            hidden = model.hidden(tokens[:, :-1])
        loss = bench.kernels.cross_entropy_l2wrap(
            hidden.flatten(0, 1).bfloat16(), model.head.weight, tokens[:, 1:].flatten()
        )
        loss.backward()
        factor, norm = bench.kernels.clip_factor(flat[1], loss, 1.0)
        bench.kernels.adamw(flat[0], flat[1], flat[2], flat[3], factor, step)
        norm.item()

    seconds = bench.seconds(train, 5)
    rate = batch_size * length / seconds
    flop = rate * training_flop_per_token(model)
    share = flop / bench.flop_per_s if bench.flop_per_s else None
    yield {"name": "training step", "model": name, "tokens_per_s": rate, "share_of_matmul": share}
