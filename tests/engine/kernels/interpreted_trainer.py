"""Whole training steps with the GPU's kernels and with the reference; `test_triton` runs this."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from engine.kernels import optimizer, reference
from engine.kernels.gpu import adamw as gpu_adamw
from engine.kernels.gpu import backend as gpu
from tests.train.runs import train_config, trainer
from train.trainer import Trainer

NUM_STEPS = 3
# AdamW divides a gradient by its own size, so with a small epsilon what is nothing but rounding
# moves a weight as far as any gradient does. With this one, small gradients make small steps.
EPS = 1e-2


def shaken(run: Trainer) -> Trainer:
    """No weight is zero, so that every gradient is alive."""
    generator = torch.Generator().manual_seed(0)
    run.optimizer.weights += 0.1 * torch.randn(run.optimizer.weights.shape, generator=generator)
    return run


def metrics(run: Trainer, key: str) -> list[float]:
    lines = (run.cfg.run_dir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)[key] for line in lines]


def forbidden(*_arguments: object) -> None:
    raise AssertionError("the reference was asked")


def test_steps_are_those_of_the_reference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_adamw, "NUM_PARTIALS", 2)  # programs; the interpreter is slow
    runs: list[Trainer] = []
    for name in ("reference", "gpu"):
        cfg = train_config(
            tmp_path,
            experiment_name=name,
            num_steps=NUM_STEPS,
            context_length=3,
            batch_size_per_device=1,
            grad_checkpoint=False,
            adam_eps=EPS,
            gradient_clip_val=0.5,
        )
        runs.append(shaken(trainer(cfg)))
    start = runs[0].optimizer.weights.clone()
    runs[0].run()
    for name in ("norm_mix", "time_mix", "cross_entropy_l2wrap", "adamw", "clip_factor"):
        monkeypatch.setattr(reference, name, forbidden)
    monkeypatch.setattr(optimizer, "adamw", forbidden)
    runs[1].model.kernels = gpu
    runs[1].run()
    wanted, got = runs
    assert got.step == NUM_STEPS
    assert got.progress.num_skipped == 0
    assert min(metrics(wanted, "grad_norm")) > 0.5  # all were clipped
    for key in ("loss", "grad_norm"):
        assert metrics(got, key) == pytest.approx(metrics(wanted, key), rel=1e-5, abs=0)
    assert not torch.equal(got.optimizer.weights, wanted.optimizer.weights)
    # Both in float32, whose sums are made in another order: of what three steps have changed.
    moved = wanted.optimizer.weights - start
    assert moved.norm() > 1e-3 * start.norm()
    for name in ("exp_avg", "exp_avg_sq"):
        expected = getattr(wanted.optimizer, name)
        error = (getattr(got.optimizer, name) - expected).norm() / expected.norm()
        assert error < 1e-5, (name, error)
    error = (got.optimizer.weights - wanted.optimizer.weights).norm() / moved.norm()
    assert error < 1e-4, error
