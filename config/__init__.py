"""The TOML configuration and the Python that reads it. Knows neither torch nor HTTP."""

from config.bind import BindAddress
from config.diff import Change, ModelChange, ReloadPlan, diff
from config.edit import patch, write_atomic
from config.errors import ConfigError
from config.files import FileStamp, check_files, file_stamps, replaced_files
from config.loader import config_path, load_infer, load_model, load_train, parse_infer, read_text
from config.schema import (
    WORLD_VOCAB,
    InferConfig,
    IpcConfig,
    LoraRanks,
    ModelConfig,
    ModelTable,
    TrainConfig,
)

__all__ = [
    "WORLD_VOCAB",
    "BindAddress",
    "Change",
    "ConfigError",
    "FileStamp",
    "InferConfig",
    "IpcConfig",
    "LoraRanks",
    "ModelChange",
    "ModelConfig",
    "ModelTable",
    "ReloadPlan",
    "TrainConfig",
    "check_files",
    "config_path",
    "diff",
    "file_stamps",
    "load_infer",
    "load_model",
    "load_train",
    "parse_infer",
    "patch",
    "read_text",
    "replaced_files",
    "write_atomic",
]
