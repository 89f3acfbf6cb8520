"""One training run: weights, optimiser, data and checkpoints brought together step by step.

Knows neither the command line nor signals; whoever runs it sets `stop_requested`.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from torch import Tensor

from config.errors import ConfigError
from config.schema import TrainConfig
from engine.kernels.choice import choose_backend
from engine.model.rwkv7 import RWKV7, ModelDims
from engine.model.weights import load_model
from engine.tokenizer import WORLD_VOCAB, Tokenizer
from train import checkpoint
from train.binidx import Dataset, open_dataset
from train.checkpoint import CheckpointError
from train.evaluate import evaluate, num_bytes_of
from train.init import init_weights
from train.optim import AdamW, Outcome
from train.report import Progress, Report
from train.sampler import MINI_EPOCH_SAMPLES, Sampler
from train.schedule import Schedule
from train.utilization import peak_tokens_per_s

logger = logging.getLogger(__name__)

MAX_SKIPPED_IN_A_ROW = 5


class TrainingError(Exception):
    """The run cannot go on; what was saved stays."""


class Trainer:
    """A run as its config says, continued from the newest checkpoint of its folder if any."""

    def __init__(self, cfg: TrainConfig, console: Console) -> None:
        self.cfg, self.console = cfg, console
        self.stop_requested = False
        self.device = _device(cfg.device_type)
        self.data = open_dataset(cfg.data_prefix)
        self.sampler = Sampler.for_dataset(self.data, cfg.context_length)
        self.num_steps = cfg.num_steps or max(
            1, cfg.num_dataset_repeats * self.sampler.prime // cfg.batch_size
        )
        self.schedule = Schedule(
            start=cfg.learning_rate_start,
            end=cfg.learning_rate_end,
            warmup_steps=cfg.warmup_steps,
            num_steps=self.num_steps,
        )
        self.val = _validation(cfg)
        self.model = RWKV7(ModelDims.from_config(cfg.model))
        self.step = self.saved_step = 0  # optimiser steps done; of them in a checkpoint
        self.progress = Progress()
        found = checkpoint.load_newest(cfg.run_dir)
        if found is None:
            self._start_new()
        else:
            self._refuse_other_run(found.meta)
        self.model.to(self.device)
        self.model.kernels = choose_backend(self.device, self.model.dims.head_size)
        self.optimizer = AdamW(self.model, cfg)
        if found is not None:
            self._resume(found)

    def run(self, max_steps: int | None = None) -> None:
        """Train to the end, for `max_steps` more steps, or until `stop_requested`; then save.

        Raises TrainingError after too many steps without a finite gradient, and
        CheckpointError when the last checkpoint cannot be written.
        """
        last = self.num_steps if max_steps is None else min(self.num_steps, self.step + max_steps)
        cfg = self.cfg
        with self._report() as report:
            while self.step < last and not self.stop_requested:
                self._train_step(report)
                if self.val is not None and self._is_due(cfg.eval_every_steps):
                    self._evaluate(report)
                if self.step % cfg.save_every_steps == 0 and self.step < last:
                    self._try_save()
        if self.step > self.saved_step:
            try:
                self._save()
            except OSError as error:
                raise CheckpointError(
                    f"the last checkpoint, of step {self.step}, was not saved: {error}; the newest "
                    f"one is of step {self.saved_step}. Free some space in {cfg.run_dir} and run "
                    "the same command again"
                ) from error

    def _report(self) -> Report:
        return Report(
            self.cfg.run_dir,
            first_step=self.step,
            first_mini_epoch=self._mini_epoch,
            num_steps=self.num_steps,
            log_every=self.cfg.log_every_steps,
            console=self.console,
            peak_tokens_per_s=peak_tokens_per_s(self.model, self.device, self.cfg.dtype),
        )

    @property
    def _mini_epoch(self) -> int:
        return self.step * self.cfg.batch_size // MINI_EPOCH_SAMPLES

    def _start_new(self) -> None:
        record = self.cfg.record_path
        if record is None:
            init_weights(self.model, self.cfg.random_seed)
            return
        path = record / checkpoint.MODEL if record.is_dir() else record
        loaded = load_model(path, self.cfg.model, "cpu", torch.float32)
        self.model.load_state_dict(loaded.state_dict())
        logger.info("starting from the weights of %s", path)

    def _train_step(self, report: Report) -> None:
        cfg = self.cfg
        lr = self.schedule.learning_rate(self.step)
        outcome = self.optimizer.step(self._accumulate_gradients(), lr)
        if outcome.is_finite:
            self.progress.add(outcome.loss, cfg.num_tokens_per_step)
        else:
            self._skip(outcome)
        number = self._mini_epoch
        self.step += 1
        report.step(self.step, self.progress, lr, outcome.grad_norm, cfg.num_tokens_per_step)
        if self._mini_epoch > number or self.step == self.num_steps:
            report.mini_epoch(number, self.progress, lr)

    def _accumulate_gradients(self) -> Tensor:
        """Gradients of the mean loss over all micro-batches, and that loss, on the device."""
        cfg = self.cfg
        self.optimizer.zero_grad()
        total = torch.zeros((), device=self.device)
        for micro in range(cfg.num_accumulation_steps_per_device):
            first = self.step * cfg.batch_size + micro * cfg.batch_size_per_device
            window = self.sampler.batch(self.data, first, cfg.batch_size_per_device)
            self._check_vocabulary(window, first)
            tokens_BT = self._on_device(window)
            loss = self._loss(tokens_BT) / cfg.num_accumulation_steps_per_device
            loss.backward()
            total += loss.detach()
        return total

    def _on_device(self, window: NDArray[np.int64]) -> Tensor:
        """From pinned memory where there is a GPU, so that nobody waits for the copy."""
        tokens = torch.from_numpy(window)
        if self.device.type != "cuda":
            return tokens.to(self.device)
        return tokens.pin_memory().to(self.device, non_blocking=True)

    def _check_vocabulary(self, window: NDArray[np.int64], first_sample: int) -> None:
        largest, vocab_size = int(window.max()), self.cfg.model.vocab_size
        if largest >= vocab_size:
            raise TrainingError(
                f"{self.data.prefix}: token id {largest} among samples {first_sample} to "
                f"{first_sample + len(window) - 1}, but vocab_size = {vocab_size}; make the data "
                "with the model's vocabulary"
            )

    def _loss(self, tokens_BT: Tensor) -> Tensor:
        with self._autocast():
            hidden = self.model.hidden(tokens_BT[:, :-1], self.cfg.grad_checkpoint)
        return self.model.kernels.cross_entropy_l2wrap(
            hidden.flatten(0, 1).to(torch.float32 if self._is_exact else torch.bfloat16),
            self.model.head.weight,
            tokens_BT[:, 1:].flatten(),
            self.cfg.enable_l2wrap,
        )

    @property
    def _is_exact(self) -> bool:
        return self.cfg.dtype == "float32"

    def _autocast(self) -> AbstractContextManager[object]:
        if self._is_exact:
            return nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)

    def _skip(self, outcome: Outcome) -> None:
        self.progress.skip(self.cfg.num_tokens_per_step)
        samples = range(self.step * self.cfg.batch_size, (self.step + 1) * self.cfg.batch_size)
        slots = [self.sampler.slot(sample) for sample in samples]
        what = f"step {self.step + 1}: loss {outcome.loss}, gradient norm {outcome.grad_norm}"
        logger.warning("%s: weights left as they are; data slots %s", what, slots)
        if self.progress.num_skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
            raise TrainingError(
                f"{what}, not finite for {MAX_SKIPPED_IN_A_ROW} steps in a row; the newest "
                f"checkpoint is of step {self.saved_step}. Lower learning_rate_start or "
                "gradient_clip_val, or look at the data of these slots"
            )

    def _evaluate(self, report: Report) -> None:
        assert self.val is not None
        dataset, num_bytes = self.val
        result = evaluate(self.model, dataset, num_bytes)
        report.evaluation(self.step, result.loss, result.bits_per_byte)

    def _is_due(self, every: int) -> bool:
        return self.step % every == 0 or self.step == self.num_steps

    def _try_save(self) -> None:
        try:
            self._save()
        except OSError as error:
            logger.error(
                "no checkpoint of step %d: %s; the newest one is of step %d. Training goes on; "
                "free some space in %s",
                self.step, error, self.saved_step, self.cfg.run_dir,
            )  # fmt: skip

    def _save(self) -> None:
        weights = self.model.state_dict()
        meta: checkpoint.Meta = {"identity": self._identity(), "progress": self.progress.to_meta()}
        path = checkpoint.save(
            self.cfg.run_dir,
            self.step,
            weights,
            {**weights, **self.optimizer.moments()},
            meta,
            self.cfg.keep_checkpoints,
        )
        self.saved_step = self.step
        logger.info("saved %s", path)

    def _resume(self, found: checkpoint.Checkpoint) -> None:
        names = self.model.state_dict().keys()
        self.model.load_state_dict({name: found.tensors[name] for name in names})
        self.optimizer.load_moments(found.tensors)
        progress = found.meta["progress"]
        assert isinstance(progress, Mapping)
        self.progress = Progress(**progress)
        self.step = self.saved_step = found.step
        logger.info("resumed from %s", found.path)

    def _identity(self) -> dict[str, object]:
        """What must be the same for a resumed run to see the same data with the same weights."""
        shapes = {name: list(tensor.shape) for name, tensor in self.model.state_dict().items()}
        return {
            "shapes": shapes,
            "data": self.data.fingerprint,
            "context_length": self.cfg.context_length,
            "batch_size": self.cfg.batch_size,
        }

    def _refuse_other_run(self, meta: checkpoint.Meta) -> None:
        saved, now = meta["identity"], self._identity()
        assert isinstance(saved, Mapping)
        for key, value in now.items():
            if saved.get(key) != value:
                shown = "" if key == "shapes" else f" ({saved.get(key)} then, {value} now)"
                raise ConfigError(
                    f"{self.cfg.run_dir} holds a run with other {key}{shown}; give this one "
                    "another name, or restore what was changed",
                    key="experiment_name",
                    value=self.cfg.experiment_name,
                )


def _device(device_type: str) -> torch.device:
    if device_type == "auto":
        device_type = "cuda" if torch.cuda.is_available() else "cpu"
    if device_type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "no CUDA device is available; use auto or cpu", key="device_type", value=device_type
        )
    return torch.device(device_type)


def _validation(cfg: TrainConfig) -> tuple[Dataset, int] | None:
    if cfg.val_prefix is None:
        return None
    dataset = open_dataset(cfg.val_prefix)
    tokenizer = Tokenizer.load(cfg.tokenizer_vocab_path or WORLD_VOCAB)
    return dataset, num_bytes_of(dataset, tokenizer)
