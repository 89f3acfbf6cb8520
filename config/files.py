"""The files an InferConfig points at: are they there, and have they been replaced?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from config.errors import ConfigError
from config.schema import WORLD_VOCAB, InferConfig, ModelTable

CHECKPOINTS_URL = "https://huggingface.co/BlinkDL/rwkv7-g1"


class FileStamp(NamedTuple):
    """Differs between two files of one name, unless somebody forges times."""

    inode: int
    num_bytes: int
    mtime_ns: int


def check_files(config: InferConfig) -> None:
    """Raise ConfigError for the first file that is missing, saying where people get it."""
    for index, table in enumerate(config.models):
        for key, path in model_files(table):
            if not path.is_file():
                raise ConfigError(
                    f"there is no such file; {_remedy(key)}",
                    key=f"models[{index}].{key}",
                    value=path,
                    file=config.source or "",
                )


def model_files(table: ModelTable) -> Iterator[tuple[str, Path]]:
    """Key and path of each file that a model is loaded from."""
    if table.weights_path is not None and table.load_format != "dummy":
        yield "weights_path", table.weights_path
    if table.tokenizer_vocab_path != WORLD_VOCAB:
        yield "tokenizer_vocab_path", Path(table.tokenizer_vocab_path)
    for path in table.initial_states:
        yield "initial_states", path


def file_stamps(config: InferConfig) -> dict[Path, FileStamp]:
    """Stamps of the files that exist. Take them before loading: `replaced_files` compares."""
    stamps = {}
    for table in config.models:
        for _, path in model_files(table):
            try:
                stat = path.stat()
            except OSError:
                continue  # missing files are what check_files is for
            stamps[path] = FileStamp(stat.st_ino, stat.st_size, stat.st_mtime_ns)
    return stamps


def replaced_files(old: Mapping[Path, FileStamp], new: Mapping[Path, FileStamp]) -> frozenset[Path]:
    """Files that are in both and not the same any more."""
    return frozenset(path for path in old.keys() & new.keys() if old[path] != new[path])


def _remedy(key: str) -> str:
    if key == "initial_states":
        return "name a .pth of time_state tensors or an exported state, or leave it out"
    if key == "tokenizer_vocab_path":
        return f'"{WORLD_VOCAB}" names the World vocabulary, which needs no file'
    return (
        f"official checkpoints are at {CHECKPOINTS_URL} (any RWKV-7 .pth or .safetensors of this"
        " size), and --set load_format=dummy does without, for load tests"
    )
