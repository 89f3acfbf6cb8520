"""Builds small config folders for the tests of this package."""

from __future__ import annotations

from pathlib import Path

from config import ConfigError, InferConfig, TrainConfig, load_infer, load_train

MODEL = """\
num_cells = 2
vocab_size = 300
embedded_dim = 128
num_heads = 2
"""
TABLE = """\
[[models]]
model_name = "a"
model_cfg = "m"
weights_path = "a.pth"
tokenizer_vocab_path = "vocab.txt"
"""
TRAIN = """\
model_cfg = "m"
experiment_name = "run"
dataset_base_path = "data"
filename_without_extensions = "text"
optimizer = "adam_w"
learning_rate_start = 1e-3
learning_rate_end = 1e-4
warmup_steps = 10
"""


def write_config(
    folder: Path, *, infer: str = TABLE, model: str = MODEL, train: str = TRAIN
) -> Path:
    """A config folder with model config "m", infer config "i" and train config "t"."""
    for kind, name, text in (("model", "m", model), ("infer", "i", infer), ("train", "t", train)):
        (folder / kind).mkdir(parents=True, exist_ok=True)
        (folder / kind / f"{name}.toml").write_text(text)
    return folder


def infer_config(
    folder: Path, infer: str = TABLE, *overrides: str, model: str = MODEL
) -> InferConfig:
    return load_infer(write_config(folder, infer=infer, model=model), "i", overrides)


def train_config(folder: Path, train: str = TRAIN, *overrides: str) -> TrainConfig:
    return load_train(write_config(folder, train=train), "t", overrides)


def message(error: ConfigError, folder: Path) -> str:
    """The message with the temporary folder taken out."""
    return str(error).replace(f"{folder.resolve()}/", "").replace(f"{folder}/", "")
