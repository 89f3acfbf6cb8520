"""What a configuration is: every TOML key with type, default and meaning. Reads no files.

The keys and their spelling are those of rwkv-rs; keys that it lacks are marked "(new)".
Fields without a `Key` are not in the TOML: the loader fills them in. Objects built by hand are
held to the same rules between keys as files are; types and bounds of single values are
checked by the loader.
"""

from config.schema_infer import WORLD_VOCAB, InferConfig, IpcConfig, ModelTable
from config.schema_model import LoraRanks, ModelConfig
from config.schema_train import TrainConfig

__all__ = [
    "WORLD_VOCAB",
    "InferConfig",
    "IpcConfig",
    "LoraRanks",
    "ModelConfig",
    "ModelTable",
    "TrainConfig",
]
