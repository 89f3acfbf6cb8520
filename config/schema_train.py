"""TrainConfig: one training run, config/train/NAME.toml. Reads no files."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from config.errors import ConfigError
from config.key import (
    Fraction,
    Key,
    Name,
    NonNegativeFloat,
    NonNegativeInt,
    Only,
    PositiveFloat,
    PositiveInt,
    check_only,
)
from config.schema_infer import WORLD_VOCAB
from config.schema_model import ModelConfig

ONE_DEVICE = Only(1, "only 1 is supported: several devices come later; run one process per device")
NO_WANDB = "not supported: leave the key out, and read metrics.jsonl in the run folder"


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """config/train/NAME.toml: what `python -m train` does."""

    name: str = ""  # the file's name without suffix
    model: ModelConfig  # loaded from model_cfg
    model_cfg: Annotated[
        Name,
        Key(
            "shape of the model: NAME of config/model/NAME.toml, or a path",
            aliases=("model_cfg_path",),
        ),
    ]
    experiment_name: Annotated[
        Name, Key("the run's folder below experiment_log_base_path; a run found there is resumed")
    ]
    experiment_log_base_path: Annotated[Path, Key("folder of all runs", is_path=True)] = Path(
        "logs"
    )
    record_path: Annotated[
        Path | None,
        Key(
            "weights to start a new run from: .pth, .safetensors or a checkpoint folder;"
            " unset = fresh ones",
            is_path=True,
        ),
    ] = None
    random_seed: Annotated[NonNegativeInt, Key("seed of the initial weights")] = 42
    tokenizer_vocab_path: Annotated[
        Name | None,
        Key(f'(new) vocabulary file or "{WORLD_VOCAB}"; needed with val_dataset', is_path=True),
    ] = None
    dataset_base_path: Annotated[Path, Key("folder of the data", is_path=True)]
    filename_without_extensions: Annotated[Name, Key("training data: NAME of NAME.bin, NAME.idx")]
    dataset_format: Annotated[
        Literal["rwkv_legacy", "rwkv"],
        Key(
            "format of the data",
            only=Only(
                "rwkv_legacy",
                'only "rwkv_legacy" (binidx) is supported; make it with python -m train.data',
            ),
        ),
    ] = "rwkv_legacy"
    val_dataset: Annotated[
        Name | None, Key("(new) held-out data: NAME of NAME.bin, NAME.idx; unset = none")
    ] = None
    num_dataset_repeats: Annotated[PositiveInt, Key("passes over the data")] = 1
    num_steps: Annotated[
        NonNegativeInt, Key("(new) length of the run; 0 = from num_dataset_repeats")
    ] = 0
    num_nodes: Annotated[PositiveInt, Key("machines", only=ONE_DEVICE)] = 1
    num_devices_per_node: Annotated[PositiveInt, Key("devices", only=ONE_DEVICE)] = 1
    device_type: Annotated[
        Literal["auto", "cpu", "cuda"],
        Key('(new) where to compute; "auto" takes a GPU when there is one'),
    ] = "auto"
    dtype: Annotated[
        Literal["float32", "bfloat16"],
        Key("(new) number format of the matrix products; weights are trained in float32"),
    ] = "float32"
    batch_size_per_device: Annotated[PositiveInt, Key("sequences in one pass")] = 1
    num_accumulation_steps_per_device: Annotated[
        PositiveInt, Key("passes whose gradients are added up to one step")
    ] = 1
    context_length: Annotated[
        PositiveInt, Key("tokens in one training sequence", aliases=("context_len",))
    ] = 512
    paragraph_length: Annotated[
        PositiveInt | None, Key("must equal context_length, or stay unset")
    ] = None
    grad_checkpoint: Annotated[
        bool, Key("recompute each layer in the backward pass: less memory, slower")
    ] = True
    optimizer: Annotated[Literal["adam_w"], Key("only AdamW, with RWKV-LM's parameter groups")]
    learning_rate_start: Annotated[PositiveFloat, Key("after the warm-up")]
    learning_rate_end: Annotated[NonNegativeFloat, Key("at the last step, on a cosine")]
    warmup_steps: Annotated[NonNegativeInt, Key("steps of linear warm-up")]
    weight_decay: Annotated[NonNegativeFloat, Key("on matrices only")] = 1e-3
    adam_beta1: Annotated[Fraction, Key("(new) decay of the mean of gradients")] = 0.9
    adam_beta2: Annotated[Fraction, Key("(new) decay of the mean of squared gradients")] = 0.99
    adam_eps: Annotated[PositiveFloat, Key("(new) added to the root of the squares")] = 1e-18
    gradient_clip_val: Annotated[PositiveFloat, Key("largest global norm of the gradient")] = 1.0
    enable_l2wrap: Annotated[
        bool, Key("RWKV-LM's pull on the largest logit; changes only the gradient")
    ] = True
    save_every_steps: Annotated[PositiveInt, Key("(new) steps between two checkpoints")] = 1000
    keep_checkpoints: Annotated[PositiveInt, Key("(new) how many of the newest stay")] = 3
    log_every_steps: Annotated[PositiveInt, Key("(new) steps between two lines of metrics")] = 10
    eval_every_steps: Annotated[
        PositiveInt, Key("(new) steps between two evaluations on val_dataset")
    ] = 1000
    level: Annotated[
        Literal["error", "warn", "info", "debug", "trace"], Key("how much is logged")
    ] = "warn"
    use_tui: Annotated[
        bool,
        Key(
            "full-screen display of rwkv-rs",
            only=Only(False, "not supported: progress is shown as one live line; use false"),
        ),
    ] = False
    save_freq: Annotated[
        PositiveInt,
        Key(
            "mini-epochs between two checkpoints; no effect",
            only=Only(1, "not supported: use save_every_steps, which counts steps"),
        ),
    ] = 1
    upload_to_wandb: Annotated[bool, Key("Weights & Biases", only=Only(False, NO_WANDB))] = False
    wandb_api_key: Annotated[
        str | None, Key("Weights & Biases", only=Only(None, NO_WANDB), is_secret=True)
    ] = field(default=None, repr=False)
    wandb_entity_name: Annotated[str | None, Key("Weights & Biases", only=Only(None, NO_WANDB))] = (
        None
    )
    wandb_project_name: Annotated[
        str | None, Key("Weights & Biases", only=Only(None, NO_WANDB))
    ] = None

    def __post_init__(self) -> None:
        check_only(self)
        if self.paragraph_length not in (None, self.context_length):
            reason = f"must equal context_length = {self.context_length}: passing state between"
            raise ConfigError(
                f"{reason} paragraphs comes later",
                key="paragraph_length",
                value=self.paragraph_length,
            )
        for key in ("experiment_name", "filename_without_extensions", "val_dataset"):
            name = getattr(self, key)
            if name is not None and (name in (".", "..") or "/" in name or "\\" in name):
                raise ConfigError("is a name, not a path", key=key, value=name)
        if self.val_dataset is not None and self.tokenizer_vocab_path is None:
            reason = "missing: bits per byte on val_dataset need the vocabulary of the data"
            raise ConfigError(reason, key="tokenizer_vocab_path")

    @property
    def run_dir(self) -> Path:
        return self.experiment_log_base_path / self.experiment_name

    @property
    def data_prefix(self) -> Path:
        """Path of the training data without .bin or .idx."""
        return self.dataset_base_path / self.filename_without_extensions

    @property
    def val_prefix(self) -> Path | None:
        return None if self.val_dataset is None else self.dataset_base_path / self.val_dataset

    @property
    def batch_size(self) -> int:
        """Sequences in one optimiser step."""
        return self.batch_size_per_device * self.num_accumulation_steps_per_device

    @property
    def num_tokens_per_step(self) -> int:
        return self.batch_size * self.context_length
