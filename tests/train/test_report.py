"""What a run writes down."""

from __future__ import annotations

import io
import json
import math
import re
from pathlib import Path

import pytest
from rich.console import Console

from train.report import Progress, Report


def make_report(
    run_dir: Path, first_step: int = 0, first_mini_epoch: int = 0, is_terminal: bool = False
) -> tuple[Report, io.StringIO]:
    out = io.StringIO()
    console = Console(file=out, width=200, force_terminal=is_terminal)
    report = Report(
        run_dir,
        first_step=first_step,
        first_mini_epoch=first_mini_epoch,
        num_steps=100,
        log_every=2,
        console=console,
    )
    return report, out


def steps(report: Report, progress: Progress, numbers: range) -> None:
    for step in numbers:
        progress.add(float(step), 32)
        report.step(step, progress, 1e-3, 0.5, 32)


def lines(run_dir: Path) -> list[dict[str, float | None]]:
    return [json.loads(x) for x in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_metrics_hold_the_mean_loss_of_their_interval(tmp_path: Path) -> None:
    report, _ = make_report(tmp_path)
    with report:
        steps(report, Progress(), range(1, 6))
    assert [(x["step"], x["loss"], x["tokens"]) for x in lines(tmp_path)] == [
        (2, 1.5, 64),
        (4, 3.5, 128),
    ]
    assert all((x["tokens_per_s"] or 0) > 0 for x in lines(tmp_path))


def test_smooth_loss_starts_at_the_first_loss_and_follows() -> None:
    progress = Progress()
    assert math.isnan(progress.smooth_loss)
    progress.add(5.0, 1)
    assert progress.smooth_loss == pytest.approx(5.0)
    for _ in range(2000):
        progress.add(3.0, 1)
    assert progress.smooth_loss == pytest.approx(3.0)


def test_skipped_steps_count_tokens_but_no_loss() -> None:
    progress = Progress()
    progress.add(5.0, 32)
    progress.skip(32)
    assert (progress.num_tokens, progress.num_skipped, progress.num_skipped_in_a_row) == (64, 1, 1)
    assert progress.smooth_loss == pytest.approx(5.0)
    progress.add(5.0, 32)
    assert (progress.num_skipped, progress.num_skipped_in_a_row) == (1, 0)


def test_an_interval_of_skipped_steps_has_no_loss(tmp_path: Path) -> None:
    report, _ = make_report(tmp_path)
    progress = Progress()
    with report:
        for step in (1, 2):
            progress.skip(32)
            report.step(step, progress, 1e-3, math.nan, 32)
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()
    (line,) = lines(tmp_path)
    assert [line[key] for key in ("loss", "loss_ema", "grad_norm")] == [None] * 3
    assert line["skipped"] == 2


def test_plain_output_has_one_line_per_interval(tmp_path: Path) -> None:
    report, out = make_report(tmp_path)
    with report:
        steps(report, Progress(), range(1, 5))
    shown = out.getvalue().splitlines()
    assert len(shown) == 2
    assert re.fullmatch(
        r"step 2/100  loss 1\.\d{4}  lr 1\.000e-03  grad 0\.500  [\d,]+ tok/s  ETA \d+:\d\d:\d\d",
        shown[0],
    )


def test_utilisation_is_shown_and_written_where_the_peak_is_known(tmp_path: Path) -> None:
    out = io.StringIO()
    report = Report(
        tmp_path,
        first_step=0,
        first_mini_epoch=0,
        num_steps=100,
        log_every=2,
        console=Console(file=out, width=200),
        peak_tokens_per_s=1e9,
    )
    with report:
        steps(report, Progress(), range(1, 3))
    (line,) = lines(tmp_path)
    speed, mfu = line["tokens_per_s"], line["mfu"]
    assert speed is not None
    assert mfu == pytest.approx(speed / 1e9, abs=6e-5)
    assert f" tok/s  MFU {mfu:.1%}  ETA" in out.getvalue()


def test_a_terminal_gets_a_line_that_is_redrawn(tmp_path: Path) -> None:
    report, out = make_report(tmp_path, is_terminal=True)
    with report:
        steps(report, Progress(), range(1, 5))
    assert "step 4/100" in out.getvalue()
    assert "\x1b[2K" in out.getvalue()


def test_the_mini_epoch_line_is_rwkv_lms(tmp_path: Path) -> None:
    report, _ = make_report(tmp_path)
    progress = Progress()
    with report:
        steps(report, progress, range(1, 4))
        report.mini_epoch(7, progress, 6e-4)
    (line,) = (tmp_path / "train_log.txt").read_text().splitlines()
    pattern = r"7 2\.000000 7\.3891 0\.00060000 \d{4}-\d\d-\d\d \d\d:\d\d:\d\d 7"
    assert re.fullmatch(pattern, line)
    assert progress.mini_epoch_steps == 0


def test_lines_of_steps_that_will_be_done_again_are_dropped(tmp_path: Path) -> None:
    report, _ = make_report(tmp_path)
    progress = Progress()
    with report:
        steps(report, progress, range(1, 9))
        report.evaluation(8, 2.0, 1.0)
        for number in range(3):
            report.mini_epoch(number, progress, 1e-3)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 1')  # a kill in the middle of a line
    make_report(tmp_path, first_step=5, first_mini_epoch=1)
    assert [x["step"] for x in lines(tmp_path)] == [2, 4]
    assert [x[0] for x in (tmp_path / "train_log.txt").read_text().splitlines()] == ["0"]


def test_evaluations_are_shown_and_written(tmp_path: Path) -> None:
    report, out = make_report(tmp_path)
    with report:
        report.evaluation(8, 2.0, 1.25)
    assert lines(tmp_path) == [{"step": 8, "val_loss": 2.0, "val_bits_per_byte": 1.25}]
    assert "1.2500 bits per byte" in out.getvalue()


def test_a_line_that_cannot_be_written_does_not_end_the_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    report, _ = make_report(tmp_path)
    (tmp_path / "metrics.jsonl").mkdir()  # nothing can be appended to a folder
    with report:
        steps(report, Progress(), range(1, 3))
    assert "metrics.jsonl" in caplog.text
    assert "lost the line" in caplog.text
