"""Small models, datasets and configs for the trainer's tests."""

from __future__ import annotations

import dataclasses
import io
import random
from collections.abc import Iterable
from pathlib import Path

import torch
from rich.console import Console

from config.schema import ModelConfig, TrainConfig
from engine.model.rwkv7 import RWKV7, ModelDims
from train.binidx import DatasetWriter
from train.init import init_weights
from train.trainer import Trainer

TINY = ModelConfig(
    name="test",
    num_cells=2,
    vocab_size=40,
    embedded_dim=32,
    num_heads=2,
    w_lora_rank=8,
    a_lora_rank=8,
    v_lora_rank=8,
    g_lora_rank=8,
)


def tiny_model(cfg: ModelConfig = TINY) -> RWKV7:
    return RWKV7(ModelDims.from_config(cfg))


def shaken_model(seed: int = 0, scale: float = 0.1) -> RWKV7:
    """A float64 model in which no parameter is zero, so that every gradient is alive."""
    model = tiny_model().double()
    init_weights(model, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=scale)
    return model


def write_dataset(prefix: Path, documents: Iterable[Iterable[int]]) -> None:
    with DatasetWriter(prefix) as writer:
        for document in documents:
            writer.add(document)


def random_documents(count: int, seed: int = 0, vocab_size: int = 40) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(1, vocab_size) for _ in range(rng.randint(5, 40))] for _ in range(count)]


def train_config(tmp_path: Path, **changes: object) -> TrainConfig:
    """A run of 12 steps of 2 x 16 tokens over a dataset that is made if it is not there."""
    if not (tmp_path / "data" / "toy.bin").exists():
        write_dataset(tmp_path / "data" / "toy", random_documents(60))
    cfg = TrainConfig(
        model=TINY,
        model_cfg="test",
        experiment_name="run",
        experiment_log_base_path=tmp_path / "runs",
        dataset_base_path=tmp_path / "data",
        filename_without_extensions="toy",
        device_type="cpu",
        num_steps=12,
        batch_size_per_device=2,
        context_length=16,
        grad_checkpoint=False,
        optimizer="adam_w",
        learning_rate_start=1e-2,
        learning_rate_end=1e-3,
        warmup_steps=2,
        weight_decay=0.1,
        save_every_steps=4,
        log_every_steps=1,
    )
    return dataclasses.replace(cfg, **changes)  # type: ignore[arg-type]


def quiet_console() -> Console:
    return Console(file=io.StringIO(), width=200)


def trainer(cfg: TrainConfig) -> Trainer:
    return Trainer(cfg, quiet_console())
