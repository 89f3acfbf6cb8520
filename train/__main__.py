"""`python -m train --train-cfg NAME`: train a model, or go on with a run that was stopped.

SIGTERM and SIGINT finish the step, save a checkpoint and exit 0; a second one ends at once.
"""

from __future__ import annotations

import argparse
import logging
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.logging import RichHandler

import config
from config import ConfigError, TrainConfig, load_train
from engine.errors import EngineError
from train.binidx import DatasetError
from train.checkpoint import CheckpointError
from train.trainer import Trainer, TrainingError

LOG_LEVELS = {
    "error": logging.ERROR,
    "warn": logging.WARNING,
    "info": logging.INFO,
    "debug": logging.DEBUG,
    "trace": logging.DEBUG,
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m train", description=__doc__)
    parser.add_argument("--train-cfg", required=True, help="NAME of CONFIG_DIR/train/NAME.toml")
    parser.add_argument("--config-dir", type=Path, default=Path(config.__file__).parent)
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override a config key"
    )
    parser.add_argument("--steps", type=int, help="stop after so many more steps")
    return parser


def _describe(trainer: Trainer, cfg: TrainConfig, console: Console) -> None:
    num_parameters = sum(p.numel() for p in trainer.model.parameters())
    num_tokens = trainer.num_steps * cfg.num_tokens_per_step
    console.print(
        f"{cfg.experiment_name}: {num_parameters:,} parameters, {cfg.dtype} on {trainer.device}\n"
        f"data: {trainer.data.num_tokens:,} tokens, {trainer.data.num_documents:,} documents, "
        f"magic prime {trainer.sampler.prime}\n"
        f"run: {trainer.num_steps:,} steps of {cfg.batch_size} x {cfg.context_length} tokens = "
        f"{num_tokens:,} tokens, {num_tokens / trainer.data.num_tokens:.2f} passes; "
        f"{trainer.step:,} done\n"
        f"files: {cfg.run_dir}",
        highlight=False,
        soft_wrap=True,
    )


def _stop_on_signals(trainer: Trainer) -> None:
    def stop(number: int, _frame: object) -> None:
        trainer.stop_requested = True
        signal.signal(number, signal.SIG_DFL)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    console = Console()
    try:
        if args.steps is not None and args.steps < 1:
            raise ConfigError("must be at least 1", key="--steps", value=args.steps)
        cfg = load_train(args.config_dir, args.train_cfg, args.set)
        handler = RichHandler(console=console, show_path=False)
        logging.basicConfig(level=LOG_LEVELS[cfg.level], format="%(message)s", handlers=[handler])
        trainer = Trainer(cfg, console)
        _describe(trainer, cfg, console)
        if trainer.step >= trainer.num_steps:
            console.print("the run is finished; a larger num_steps would go on with it")
        _stop_on_signals(trainer)
        trainer.run(args.steps)
    except (
        ConfigError,
        DatasetError,
        EngineError,
        CheckpointError,
        TrainingError,
        OSError,
    ) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
