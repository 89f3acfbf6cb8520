"""TOML files to config dataclasses, with errors that say file, key, value and remedy.

Looks at no file but the TOML ones: whether weights exist is for `config.files` to say.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TypeVar

import tomli

from config.convert import Table, convert_table, did_you_mean, resolve
from config.errors import ConfigError, at
from config.overrides import is_file_name, override_infer, override_train
from config.schema import InferConfig, IpcConfig, ModelConfig, ModelTable, TrainConfig

ConfigT = TypeVar("ConfigT")


def load_model(config_dir: str | Path, name: str) -> ModelConfig:
    """config/model/NAME.toml. Raises ConfigError, as every function here does."""
    return _read_model(config_path(config_dir, "model", name))


def load_infer(config_dir: str | Path, name: str, overrides: Iterable[str] = ()) -> InferConfig:
    """config/infer/NAME.toml with the model configs it names; see `config.overrides`."""
    path = config_path(config_dir, "infer", name)
    return parse_infer(read_text(path), config_dir, path, overrides)


def parse_infer(
    text: str, config_dir: str | Path, path: Path, overrides: Iterable[str] = ()
) -> InferConfig:
    """As `load_infer`, but from a text that is to become the content of `path`."""
    table = _parse_toml(text, path)
    overrides = tuple(overrides)
    override_infer(table, overrides)
    place = _place(path, overrides)
    with at(place):
        tables = _models_of(table)
        server = convert_table({**table, "models": [], "ipc": {}}, InferConfig, path.parent)
        ipc = _ipc_of(table, path.parent)
    models = []
    for index, model in enumerate(tables):
        with at(place, f"models[{index}]"):
            models.append(_model_table(model, config_dir, path.parent))
    with at(place):
        server.update(models=tuple(models), ipc=ipc, source=path)
        return _construct(InferConfig, server)


def load_train(config_dir: str | Path, name: str, overrides: Iterable[str] = ()) -> TrainConfig:
    """config/train/NAME.toml with the model config it names; see `config.overrides`."""
    path = config_path(config_dir, "train", name)
    table = _parse_toml(read_text(path), path)
    overrides = tuple(overrides)
    override_train(table, overrides)
    with at(_place(path, overrides)):
        values = convert_table(table, TrainConfig, path.parent)
        model = _model_of(values, config_dir, path.parent)
        return _construct(TrainConfig, {**values, "name": name, "model": model})


def config_path(config_dir: str | Path, kind: str, name: str) -> Path:
    """The file of a config, which exists. `kind` is "model", "infer" or "train"."""
    folder = Path(config_dir) / kind
    path = folder / f"{name}.toml"
    if "/" not in name and path.is_file():
        return path
    if not folder.is_dir():
        raise ConfigError(f"there is no folder {folder}; --config-dir names the one above it")
    known = sorted(file.stem for file in folder.glob("*.toml"))
    raise ConfigError(f'no {kind} config "{name}" in {folder}{did_you_mean(name, known)}')


def read_text(path: Path) -> str:
    try:
        return path.read_bytes().decode()
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}", file=path) from None
    except UnicodeDecodeError as error:
        reason = f"is not UTF-8: byte {error.object[error.start]:#04x} at offset {error.start}"
        raise ConfigError(reason, file=path) from None


def _parse_toml(text: str, path: Path) -> Table:
    try:
        return tomli.loads(text)
    except tomli.TOMLDecodeError as error:
        place = f"{path}:{error.lineno}:{error.colno}"
        raise ConfigError(f"is not TOML: {error.msg}", file=place) from None


def _read_model(path: Path) -> ModelConfig:
    table = _parse_toml(read_text(path), path)
    with at(path):
        values = convert_table(table, ModelConfig, path.parent)
        return _construct(ModelConfig, {**values, "name": path.stem})


def _model_table(table: Table, config_dir: str | Path, folder: Path) -> ModelTable:
    values = convert_table(table, ModelTable, folder)
    return _construct(ModelTable, {**values, "model": _model_of(values, config_dir, folder)})


def _model_of(values: Table, config_dir: str | Path, folder: Path) -> ModelConfig:
    """The model config that a converted table names, by bare name or by path."""
    model_cfg = values["model_cfg"]
    assert isinstance(model_cfg, str), f"model_cfg was converted to {model_cfg!r}"
    try:
        if is_file_name(model_cfg):
            return _read_model(resolve(model_cfg, folder))
        return load_model(config_dir, model_cfg)
    except ConfigError as error:
        if error.file:
            raise
        raise ConfigError(error.reason, key="model_cfg", value=model_cfg) from None


def _models_of(table: Table) -> list[Table]:
    models = table.get("models", [])
    if not isinstance(models, list) or not all(isinstance(model, dict) for model in models):
        raise ConfigError("expected [[models]] tables", key="models", value=models)
    return models


def _ipc_of(table: Table, folder: Path) -> IpcConfig:
    ipc = table.get("ipc", {})
    if not isinstance(ipc, dict):
        raise ConfigError("expected an [ipc] table", key="ipc", value=ipc)
    try:
        return _construct(IpcConfig, convert_table(ipc, IpcConfig, folder))
    except ConfigError as error:
        raise ConfigError(error.reason, key=f"ipc.{error.key}", value=error.value) from None


def _place(path: Path, overrides: tuple[str, ...]) -> str:
    """What errors between keys are about: the file as it stands, or as it was overridden."""
    return f"{path} with --set" if overrides else str(path)


def _construct(config_class: Callable[..., ConfigT], values: Mapping[str, object]) -> ConfigT:
    return config_class(**values)
