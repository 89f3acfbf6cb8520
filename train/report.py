"""What a run shows and writes: a live line or plain lines, metrics.jsonl, train_log.txt.

Knows numbers, not tensors. `Progress` holds the running sums; it goes into checkpoints, so that
a resumed run writes the very lines an uninterrupted one would have.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.text import Text

logger = logging.getLogger(__name__)

EMA_DECAY = 0.98


@dataclass(slots=True)
class Progress:
    """Sums over finished steps."""

    num_tokens: int = 0
    num_skipped: int = 0  # steps whose loss or gradient was not finite
    num_skipped_in_a_row: int = 0
    loss_ema: float = 0.0
    ema_weight: float = 0.0  # of the EMA's start at 0, to correct for it
    interval_loss: float = 0.0  # since the last line
    interval_steps: int = 0
    mini_epoch_loss: float = 0.0
    mini_epoch_steps: int = 0

    def add(self, loss: float, num_tokens: int) -> None:
        self.num_tokens += num_tokens
        self.num_skipped_in_a_row = 0
        self.loss_ema = EMA_DECAY * self.loss_ema + (1 - EMA_DECAY) * loss
        self.ema_weight = EMA_DECAY * self.ema_weight + (1 - EMA_DECAY)
        self.interval_loss += loss
        self.interval_steps += 1
        self.mini_epoch_loss += loss
        self.mini_epoch_steps += 1

    def skip(self, num_tokens: int) -> None:
        self.num_tokens += num_tokens
        self.num_skipped += 1
        self.num_skipped_in_a_row += 1

    @property
    def smooth_loss(self) -> float:
        return self.loss_ema / self.ema_weight if self.ema_weight else math.nan

    def to_meta(self) -> dict[str, object]:
        return dataclasses.asdict(self)


class Report:
    """One run's output. Use as a context manager around the steps."""

    def __init__(
        self,
        run_dir: Path,
        *,
        first_step: int,
        first_mini_epoch: int,
        num_steps: int,
        log_every: int,
        console: Console,
        peak_tokens_per_s: float | None = None,
    ) -> None:
        """Lines of steps that were done but not saved are dropped: they will be done again.

        Where `peak_tokens_per_s` is known, the share of it that was reached is shown as MFU.
        """
        self._metrics_path = run_dir / "metrics.jsonl"
        self._log_path = run_dir / "train_log.txt"
        self._first_step, self._num_steps = first_step, num_steps
        self._console, self._log_every = console, log_every
        self._peak_tokens_per_s = peak_tokens_per_s
        self._live = Live(console=console, refresh_per_second=4, transient=True)
        self._started = self._interval_started = time.perf_counter()
        self._interval_first_step = first_step
        run_dir.mkdir(parents=True, exist_ok=True)
        _keep_lines(self._metrics_path, lambda x: int(json.loads(x)["step"]) <= first_step)
        _keep_lines(self._log_path, lambda x: int(x.split()[0]) < first_mini_epoch)

    def __enter__(self) -> Report:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._live.stop()

    def step(
        self, step: int, progress: Progress, lr: float, grad_norm: float, tokens_per_step: int
    ) -> None:
        """After step number `step` (counted from 1)."""
        if step % self._log_every and step != self._num_steps:
            return
        now = time.perf_counter()
        num_steps = step - self._interval_first_step
        tokens_per_s = num_steps * tokens_per_step / max(1e-9, now - self._interval_started)
        steps_per_s = (step - self._first_step) / max(1e-9, now - self._started)
        remaining_s = int((self._num_steps - step) / max(1e-9, steps_per_s))
        self._interval_started, self._interval_first_step = now, step
        timing = {"tokens_per_s": round(tokens_per_s, 1), "seconds": round(now - self._started, 1)}
        shown_mfu = ""
        if self._peak_tokens_per_s is not None:
            timing["mfu"] = round(tokens_per_s / self._peak_tokens_per_s, 4)
            shown_mfu = f"MFU {timing['mfu']:.1%}  "
        mean = progress.interval_loss / (progress.interval_steps or math.nan)
        progress.interval_loss, progress.interval_steps = 0.0, 0
        self._show(
            f"step {step}/{self._num_steps}  loss {progress.smooth_loss:.4f}  lr {lr:.3e}  "
            f"grad {grad_norm:.3f}  {tokens_per_s:,.0f} tok/s  {shown_mfu}"
            f"ETA {remaining_s // 3600}:{remaining_s // 60 % 60:02d}:{remaining_s % 60:02d}"
        )
        self._write(
            step,
            {
                "loss": _finite(mean),
                "loss_ema": _finite(progress.smooth_loss),
                "lr": lr,
                "grad_norm": _finite(grad_norm),
                "tokens": progress.num_tokens,
                "skipped": progress.num_skipped,
            },
            timing,
        )

    def evaluation(self, step: int, loss: float, bits_per_byte: float) -> None:
        self._console.print(
            f"step {step}  held out: loss {loss:.4f}, {bits_per_byte:.4f} bits per byte",
            highlight=False,
        )
        found = {"val_loss": _finite(loss), "val_bits_per_byte": _finite(bits_per_byte)}
        self._write(step, found, {})

    def mini_epoch(self, number: int, progress: Progress, lr: float) -> None:
        """RWKV-LM's line: number, mean loss, perplexity, lr, date, number within the process."""
        loss = progress.mini_epoch_loss / (progress.mini_epoch_steps or math.nan)
        progress.mini_epoch_loss, progress.mini_epoch_steps = 0.0, 0
        now = datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S")
        perplexity = math.exp(min(loss, 700))
        self._append(
            self._log_path, f"{number} {loss:.6f} {perplexity:.4f} {lr:.8f} {now} {number}"
        )

    def _show(self, line: str) -> None:
        if self._console.is_terminal:
            self._live.update(Text(line))
        else:
            self._console.print(line, highlight=False, soft_wrap=True)

    def _write(self, step: int, exact: Mapping[str, object], timing: Mapping[str, object]) -> None:
        self._append(self._metrics_path, json.dumps({"step": step, **exact, **timing}))

    def _append(self, path: Path, line: str) -> None:
        """A full disk costs the line, not the run."""
        try:
            with path.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
        except OSError as error:
            logger.error("%s: %s; lost the line %s", path, error, line)


def _finite(value: float) -> float | None:
    """JSON has no NaN."""
    return value if math.isfinite(value) else None


def _keep_lines(path: Path, is_kept: Callable[[str], bool]) -> None:
    if path.exists():
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        kept = [line for line in lines if line.endswith("\n") and is_kept(line)]
        path.write_text("".join(kept), encoding="utf-8")
