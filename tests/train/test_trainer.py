"""The training loop: gradients, learning, resuming, and what it does when things go wrong."""

from __future__ import annotations

import dataclasses
import errno
import json
import logging
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from config.errors import ConfigError
from engine.kernels.reference import cross_entropy_l2wrap
from engine.model.rwkv7 import RWKV7
from engine.model.weights import load_model
from tests.train.runs import (
    TINY,
    random_documents,
    shaken_model,
    train_config,
    trainer,
    write_dataset,
)
from train import checkpoint
from train.binidx import Dataset
from train.checkpoint import CheckpointError
from train.sampler import Sampler
from train.trainer import TrainingError


class OneBatch(Sampler):
    """The first batch again and again."""

    def batch(self, dataset: Dataset, first_sample: int, count: int) -> NDArray[np.int64]:
        return super().batch(dataset, 0, count)


def metrics(run_dir: Path) -> list[dict[str, float]]:
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    timing = ("tokens_per_s", "seconds")
    return [{k: v for k, v in json.loads(x).items() if k not in timing} for x in lines]


def test_every_gradient_equals_its_finite_difference() -> None:
    model = shaken_model()
    tokens = torch.randint(0, 40, (2, 20), generator=torch.Generator().manual_seed(0))

    def loss_of() -> torch.Tensor:
        hidden = model.hidden(tokens[:, :-1]).flatten(0, 1)
        return cross_entropy_l2wrap(hidden, model.head.weight, tokens[:, 1:].flatten(), False)

    loss_of().backward()
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if parameter.grad is None:
            assert name.startswith("blocks.0.att.v"), name
            continue
        direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        slope = (parameter.grad * direction).sum().item()
        losses = []
        with torch.no_grad():
            for offset in (1e-5, -1e-5):
                parameter.add_(direction, alpha=offset)
                losses.append(loss_of().item())
                parameter.sub_(direction, alpha=offset)
        assert slope == pytest.approx((losses[0] - losses[1]) / 2e-5, rel=1e-5, abs=1e-8), name
        assert slope != 0, name


def test_recomputed_layers_give_the_same_gradients(tmp_path: Path) -> None:
    grads = []
    for recompute in (False, True):
        run = trainer(train_config(tmp_path, grad_checkpoint=recompute))
        run._accumulate_gradients()
        grads.append([p.grad for p in run.model.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_accumulated_passes_equal_one_large_pass(tmp_path: Path) -> None:
    grads, losses = [], []
    for size, passes in ((8, 1), (2, 4)):
        cfg = train_config(
            tmp_path, batch_size_per_device=size, num_accumulation_steps_per_device=passes
        )
        run = trainer(cfg)
        with torch.no_grad():
            for parameter in run.model.parameters():
                parameter.add_(0.05)
        run.step = 3
        losses.append(run._accumulate_gradients().item())
        grads.append([p.grad for p in run.model.parameters() if p.grad is not None])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_each_step_takes_the_next_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    batch = Sampler.batch

    def spy(self: Sampler, dataset: Dataset, first: int, count: int) -> NDArray[np.int64]:
        taken.extend(range(first, first + count))
        return batch(self, dataset, first, count)

    monkeypatch.setattr(Sampler, "batch", spy)
    run = trainer(train_config(tmp_path, num_accumulation_steps_per_device=3))
    run.run(2)
    run.run(1)
    assert taken == list(range(18))


def test_one_batch_is_learned_by_heart(tmp_path: Path) -> None:
    cfg = train_config(tmp_path, num_steps=90, weight_decay=0.0, learning_rate_start=2e-2)
    run = trainer(cfg)
    run.sampler = OneBatch(run.sampler.prime, run.sampler.context_length)
    first = run._accumulate_gradients().item()
    assert first == pytest.approx(math.log(40), abs=0.4)
    run.run()
    assert run._accumulate_gradients().item() < 0.1


def test_resuming_equals_never_having_stopped_bit_by_bit(tmp_path: Path) -> None:
    whole = train_config(tmp_path, experiment_name="whole", log_every_steps=5)
    parts = train_config(tmp_path, experiment_name="parts", log_every_steps=5)
    trainer(whole).run()
    for steps in (3, 4, None):
        trainer(parts).run(steps)
    a, b = (checkpoint.load_newest(cfg.run_dir) for cfg in (whole, parts))
    assert a is not None
    assert b is not None
    assert a.step == b.step == 12
    assert a.tensors.keys() == b.tensors.keys()
    assert len([name for name in a.tensors if name.endswith(":exp_avg_sq")]) > 30
    assert all(torch.equal(a.tensors[name], b.tensors[name]) for name in a.tensors)
    assert a.meta["progress"] == b.meta["progress"]
    assert metrics(whole.run_dir) == metrics(parts.run_dir)
    assert [x["step"] for x in metrics(whole.run_dir)] == [5, 10, 12]


def test_steps_done_but_not_saved_are_done_again_the_same(tmp_path: Path) -> None:
    cfg = train_config(tmp_path, save_every_steps=4)
    run = trainer(cfg)
    run.run(7)
    expected = metrics(cfg.run_dir)
    path = checkpoint.folder(cfg.run_dir) / "step-00000007" / "state.safetensors"
    path.write_bytes(b"damaged")
    again = trainer(cfg)
    assert again.step == 4
    again.run(3)
    assert metrics(cfg.run_dir) == expected


def test_a_checkpoint_without_moments_of_unused_parameters_is_resumed_to_the_bit(
    tmp_path: Path,
) -> None:
    """As checkpoints were before all moments shared a buffer: none of what had no gradient."""
    whole = train_config(tmp_path, experiment_name="whole")
    trainer(whole).run()
    cfg = train_config(tmp_path, experiment_name="old")
    trainer(cfg).run(5)
    found = checkpoint.load_newest(cfg.run_dir)
    assert found is not None
    unused = ("blocks.0.att.v0:", "blocks.0.att.v1:", "blocks.0.att.v2:")
    old = {name: x for name, x in found.tensors.items() if not name.startswith(unused)}
    assert len(found.tensors) - len(old) == 9
    weights = {name: x for name, x in old.items() if ":" not in name}
    checkpoint.save(cfg.run_dir, 5, weights, old, found.meta, cfg.keep_checkpoints)
    run = trainer(cfg)
    assert run.step == run.optimizer.num_steps == 5
    run.run()
    a, b = (checkpoint.load_newest(x.run_dir) for x in (whole, cfg))
    assert a is not None
    assert b is not None
    assert a.tensors.keys() == b.tensors.keys()
    assert all(torch.equal(a.tensors[name], b.tensors[name]) for name in a.tensors)
    assert metrics(whole.run_dir) == metrics(cfg.run_dir)


def test_a_finished_run_has_nothing_to_do(tmp_path: Path) -> None:
    cfg = train_config(tmp_path)
    trainer(cfg).run()
    before = metrics(cfg.run_dir)
    trainer(cfg).run()
    assert metrics(cfg.run_dir) == before


def test_stopping_finishes_the_step_and_saves(tmp_path: Path) -> None:
    cfg = train_config(tmp_path)
    run = trainer(cfg)
    run.stop_requested = True
    run.run()
    assert checkpoint.load_newest(cfg.run_dir) is None  # nothing done, nothing to save
    run.stop_requested = False
    run.run(1)
    found = checkpoint.load_newest(cfg.run_dir)
    assert found is not None
    assert found.step == 1


def test_the_saved_file_is_what_was_trained(tmp_path: Path) -> None:
    cfg = train_config(tmp_path)
    run = trainer(cfg)
    run.run()
    path = checkpoint.folder(cfg.run_dir) / "step-00000012" / "model.safetensors"
    served = load_model(path, TINY, "cpu", torch.float32)
    tokens = torch.randint(0, 40, (1, 30), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        trained = run.model.head(run.model.hidden(tokens))
        exported = served.head(served.hidden(tokens))
    assert trained.std() > 0.3
    assert (trained - exported).abs().max() < 0.02 * trained.abs().max()
    assert not torch.equal(trained, exported)  # bf16 rounding; zeros would be equal


def test_a_new_run_starts_from_the_weights_of_record_path(tmp_path: Path) -> None:
    first = train_config(tmp_path)
    trainer(first).run()
    folder = checkpoint.folder(first.run_dir) / "step-00000012"
    for record in (folder, folder / "model.safetensors"):
        run = trainer(train_config(tmp_path, experiment_name="next", record_path=record))
        served = load_model(folder / "model.safetensors", TINY, "cpu", torch.float32)
        assert run.step == 0
        assert _same_used_weights(run.model, served)


def _same_used_weights(a: RWKV7, b: RWKV7) -> bool:
    return all(torch.equal(value, b.state_dict()[name]) for name, value in a.state_dict().items())


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"context_length": 8}, "context_length"),
        ({"batch_size_per_device": 4}, "batch_size"),
        ({"model": dataclasses.replace(TINY, vocab_size=41)}, "shapes"),
        ({"filename_without_extensions": "other"}, "data"),
    ],
)
def test_resuming_another_run_is_refused(
    tmp_path: Path, changes: dict[str, object], what: str
) -> None:
    cfg = train_config(tmp_path)
    trainer(cfg).run(1)
    write_dataset(tmp_path / "data" / "other", random_documents(70, seed=5))
    with pytest.raises(ConfigError, match=f"other {what}") as caught:
        trainer(dataclasses.replace(cfg, **changes))  # type: ignore[arg-type]
    assert "experiment_name" in str(caught.value)


def test_a_step_without_finite_loss_changes_nothing_and_five_end_the_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cfg = train_config(tmp_path, save_every_steps=2)
    run = trainer(cfg)
    run.run(2)
    before = [p.detach().clone() for p in run.model.parameters()]
    kept = run.model.ln_out.bias.data.clone()
    run.model.ln_out.bias.data[0] = math.nan
    with pytest.raises(TrainingError, match=r"step 7: loss nan.*5 steps in a row.*of step 6"):
        run.run()
    run.model.ln_out.bias.data.copy_(kept)
    assert all(torch.equal(a, b) for a, b in zip(before, run.model.parameters(), strict=True))
    assert caplog.text.count("weights left as they are") == 5
    assert run.progress.num_skipped == 5


def test_one_bad_step_is_skipped_and_counted(tmp_path: Path) -> None:
    cfg = train_config(tmp_path)
    run = trainer(cfg)
    run.run(2)
    kept = run.model.ln_out.bias.data.clone()
    run.model.ln_out.bias.data[0] = math.inf
    run.run(1)
    run.model.ln_out.bias.data.copy_(kept)
    run.run()
    assert run.step == 12
    assert run.progress.num_skipped == 1
    assert run.progress.num_skipped_in_a_row == 0
    assert metrics(cfg.run_dir)[-1]["skipped"] == 1


def test_a_full_disk_in_the_middle_is_reported_and_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cfg = train_config(tmp_path)
    run = trainer(cfg)
    run.run(4)

    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch, caplog.at_level(logging.ERROR):
        patch.setattr(os, "fsync", full)
        with pytest.raises(CheckpointError, match=r"of step 9, was not saved.*newest one is of"):
            run.run(5)
    assert "no checkpoint of step 8" in caplog.text
    assert "of step 4" in caplog.text
    found = checkpoint.load_newest(cfg.run_dir)
    assert found is not None
    assert found.step == 4


def test_a_token_beyond_the_vocabulary_is_named_with_its_sample(tmp_path: Path) -> None:
    write_dataset(tmp_path / "data" / "wide", [[i % 45 + 1 for i in range(400)]])
    run = trainer(train_config(tmp_path, filename_without_extensions="wide"))
    with pytest.raises(TrainingError, match=r"token id 45 among samples \d+.*vocab_size = 40"):
        run.run()


def test_the_length_follows_from_the_passes_over_the_data(tmp_path: Path) -> None:
    run = trainer(train_config(tmp_path, num_steps=0, num_dataset_repeats=3))
    assert run.num_steps == 3 * run.sampler.prime // 2


def test_the_learning_rate_of_the_run_is_in_the_metrics(tmp_path: Path) -> None:
    cfg = train_config(tmp_path)
    trainer(cfg).run()
    rates = [x["lr"] for x in metrics(cfg.run_dir)]
    assert rates[0] == pytest.approx(1e-4)
    assert rates[2] == pytest.approx(1e-2)
    assert rates[-1] == pytest.approx(1e-3, rel=0.3)
    assert rates[2:] == sorted(rates[2:], reverse=True)


def test_bfloat16_products_give_nearly_the_same_loss(tmp_path: Path) -> None:
    losses = []
    for dtype in ("float32", "bfloat16"):
        run = trainer(train_config(tmp_path, dtype=dtype))
        with torch.no_grad():
            for parameter in run.model.parameters():
                parameter.add_(0.05)
        losses.append(run._accumulate_gradients().item())
        assert all(
            p.grad.dtype == torch.float32 for p in run.model.parameters() if p.grad is not None
        )
    assert losses[0] == pytest.approx(losses[1], rel=0.02)
    assert losses[0] != losses[1]


def test_no_cuda_is_said_plainly(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    with pytest.raises(ConfigError, match="no CUDA device"):
        trainer(train_config(tmp_path, device_type="cuda"))
