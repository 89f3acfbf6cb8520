"""`python -m train` as a process: it trains, stops on a signal, resumes, and says what is wrong."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.train.runs import random_documents, write_dataset
from train import checkpoint
from train import evaluate as evaluation
from train.__main__ import main
from train.report import Report
from train.trainer import Trainer

MODEL = """
num_cells = 2
vocab_size = 40
embedded_dim = 32
num_heads = 2
"""
RUN = """
model_cfg = "toy"
experiment_name = "run"
experiment_log_base_path = "../runs"
dataset_base_path = "../data"
filename_without_extensions = "toy"
device_type = "cpu"
grad_checkpoint = false
num_steps = 100000
batch_size_per_device = 2
context_length = 16
optimizer = "adam_w"
learning_rate_start = 1e-3
learning_rate_end = 1e-4
warmup_steps = 2
log_every_steps = 1
level = "info"
"""


@pytest.fixture
def config_dir(tmp_path: Path) -> Path:
    for folder, text in (("model", MODEL), ("train", RUN)):
        (tmp_path / "config" / folder).mkdir(parents=True)
        (tmp_path / "config" / folder / "toy.toml").write_text(text)
    write_dataset(tmp_path / "config" / "data" / "toy", random_documents(60))
    return tmp_path / "config"


def arguments(config_dir: Path, *more: str) -> list[str]:
    return ["--config-dir", str(config_dir), "--train-cfg", "toy", *more]


def test_sigterm_saves_the_step_and_exits_zero(config_dir: Path) -> None:
    command = [sys.executable, "-m", "train", *arguments(config_dir)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("step 3/"):
                break
        process.send_signal(signal.SIGTERM)
        rest = process.stdout.read()
        assert process.wait(timeout=30) == 0
    last = max([3, *(int(x) for x in re.findall(r"^step (\d+)/", rest, re.M))])
    found = checkpoint.load_newest(config_dir / "runs" / "run")
    assert found is not None
    assert found.step == last


def test_sigint_does_the_same(config_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    train_step = Trainer._train_step

    def interrupted(self: Trainer, report: Report) -> None:
        if self.step == 2:
            os.kill(os.getpid(), signal.SIGINT)
        train_step(self, report)

    monkeypatch.setattr(Trainer, "_train_step", interrupted)
    try:
        assert main(arguments(config_dir)) == 0
        assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL  # the next one ends at once
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    found = checkpoint.load_newest(config_dir / "runs" / "run")
    assert found is not None
    assert found.step == 3


def test_a_killed_run_goes_on_from_its_checkpoint(config_dir: Path) -> None:
    command = [sys.executable, "-m", "train", *arguments(config_dir, "--set", "save_every_steps=2")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("step 5/"):
                break
        process.kill()
    found = checkpoint.load_newest(config_dir / "runs" / "run")
    assert found is not None
    assert found.step >= 4
    assert main(arguments(config_dir, "--steps", "2")) == 0
    again = checkpoint.load_newest(config_dir / "runs" / "run")
    assert again is not None
    assert again.step == found.step + 2


def test_steps_and_set_are_honoured(config_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = arguments(config_dir, "--steps", "3", "--set", "num_steps=7")
    assert main(given) == 0
    assert main(given) == 0
    out = capsys.readouterr().out
    assert re.search(r"run: 7 steps of 2 x 16 tokens = 224 tokens, .*; 0 done", out)
    assert "; 3 done" in out
    steps = [int(x) for x in re.findall(r"^step (\d+)/7", out, re.M)]
    assert steps == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    ("more", "what"),
    [
        (["--set", "learning_rate_star=1"], "learning_rate_start"),
        (["--steps", "0"], "--steps"),
        (["--set", "filename_without_extensions=nope"], "nope.bin: no such file"),
        (["--set", "warmup_steps=100000"], "warmup_steps = 100000"),
        (["--set", "record_path=nope.pth"], "nope.pth"),
        (["--set", "context_length=9000"], "too few for context_length = 9000"),
        (["--set", "optimizer=sgd"], "adam_w"),
    ],
)
def test_mistakes_are_named_on_stderr(
    config_dir: Path, capsys: pytest.CaptureFixture[str], more: list[str], what: str
) -> None:
    assert main(arguments(config_dir, *more)) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert what in error


def test_an_unknown_config_is_named(config_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--config-dir", str(config_dir), "--train-cfg", "tox"]) == 1
    assert "tox" in capsys.readouterr().err


def test_a_run_with_validation_shows_bits_per_byte(
    config_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_dataset(config_dir / "data" / "toy_val", random_documents(5, seed=9))
    lines = "".join(f"{i + 1} {bytes([i])!r} 1\n" for i in range(256))
    (config_dir / "vocab.txt").write_text(lines)
    more = ["val_dataset=toy_val", f"tokenizer_vocab_path={config_dir / 'vocab.txt'}",
            "eval_every_steps=2", "num_steps=3"]  # fmt: skip
    assert main(arguments(config_dir, *(x for key in more for x in ("--set", key)))) == 0
    out = capsys.readouterr().out
    assert re.findall(r"^step (\d)  held out: loss \d\.\d+, \d\.\d+ bits per byte", out, re.M) == [
        "2",
        "3",
    ]
    last_line = [x for x in out.splitlines() if "held out" in x][-1]
    run_dir = config_dir / "runs" / "run"
    weights = checkpoint.folder(run_dir) / "step-00000003" / "model.safetensors"
    prefix = config_dir / "data" / "toy_val"
    evaluate = ["--train-cfg", "toy", "--config-dir", str(config_dir), str(weights), str(prefix)]
    (config_dir / "train" / "toy.toml").write_text(RUN + 'tokenizer_vocab_path = "../vocab.txt"\n')
    assert evaluation.main(evaluate) == 0
    shown = float(re.findall(r"([\d.]+) bits per byte", last_line)[0])
    of_file = float(re.findall(r"([\d.]+) bits per byte", capsys.readouterr().out)[0])
    assert of_file == pytest.approx(shown, rel=1e-2)  # the file is bf16
    assert evaluation.main([*evaluate, str(prefix) + "x"]) == 1
    assert "no such file" in capsys.readouterr().err


def test_a_finished_run_says_so(config_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = arguments(config_dir, "--set", "num_steps=3")
    assert main(given) == 0
    assert "the run is finished" not in capsys.readouterr().out
    assert main(given) == 0
    assert "the run is finished" in capsys.readouterr().out
