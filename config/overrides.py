"""`--set key=value`: changes to a parsed TOML file. Knows no files.

Values are written as in TOML (`--set decode_first=false`), and quotes may be left out. A key of
the [[models]] tables applies to all of them, or to one as `models.NAME.key=value`.
Relative paths start at the working folder, as they do for any other command.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import tomli

from config.convert import Table, canonical_name, convert_value, did_you_mean, resolve, unknown_key
from config.errors import ConfigError
from config.key import KeySpec, keys_of
from config.schema import WORLD_VOCAB, InferConfig, ModelTable, TrainConfig

MODELS_PREFIX = "models."


def override_train(table: Table, overrides: Iterable[str]) -> None:
    """Change `table` in place. Raises ConfigError that names the override."""
    for override in overrides:
        key, value = _split(override)
        _put(table, TrainConfig, key, value)


def override_infer(table: Table, overrides: Iterable[str]) -> None:
    """Change `table` in place. Raises ConfigError that names the override."""
    for override in overrides:
        key, value = _split(override)
        if key.startswith(MODELS_PREFIX):
            name, _, key = key.removeprefix(MODELS_PREFIX).rpartition(".")
            models = _models_named(name, _models(table), override)
            is_model_key = True
        else:
            models = _models(table)
            is_model_key = key in _spellings(ModelTable)
        if is_model_key:
            for model in models:
                _put(model, ModelTable, key, value)
        else:
            _put_server_key(table, key, value)


def _split(override: str) -> tuple[str, str]:
    key, equals, value = override.partition("=")
    if not equals:
        word = re.split(r"[^\w.]", override)[0]  # what follows may be a secret
        raise ConfigError(f"expected key=value, got {word!r} and no =", file="--set")
    if not key.strip():
        raise ConfigError("expected key=value, got no key in front of the =", file="--set")
    return key.strip(), value.strip()


def _put_server_key(table: Table, key: str, value: str) -> None:
    if key in ("models", "ipc"):
        raise ConfigError("is a table: change it in the file", key=key, file="--set")
    if key not in _spellings(InferConfig):
        known = [*_spellings(InferConfig), *_spellings(ModelTable)]
        raise unknown_key(key, known).located("--set")
    _put(table, InferConfig, key, value)


def _put(table: Table, config_class: type, key: str, text: str) -> None:
    """Set one key, after a trial conversion: so an error names the override and not the file."""
    try:
        name = canonical_name(key, config_class)
        spec = keys_of(config_class)[name]
        value = _parse(spec, text)
    except ConfigError as error:
        raise error.located("--set") from None
    for spelling in (name, *spec.key.aliases):
        table.pop(spelling, None)
    table[name] = _absolute(spec, value)


def _parse(spec: KeySpec, text: str) -> object:
    """The value as TOML if that fits the key, else the bare text."""
    folder = Path.cwd()
    try:
        parsed = tomli.loads(f"value = {text}")
    except tomli.TOMLDecodeError:
        parsed = {"value": text}
    value = parsed["value"] if parsed.keys() == {"value"} else text
    try:
        convert_value(spec, value, folder)
    except ConfigError:
        if isinstance(value, str) or not _fits(spec, text, folder):
            raise
        return text
    return value


def _fits(spec: KeySpec, text: str, folder: Path) -> bool:
    """Whether the bare text is meant, as in `--set api_key=1234`."""
    try:
        convert_value(spec, text, folder)
    except ConfigError:
        return False
    return True


def _absolute(spec: KeySpec, value: object) -> object:
    is_path = spec.key.is_path or (spec.name == "model_cfg" and is_file_name(value))
    if is_path and isinstance(value, list):
        return [_absolute(spec, item) for item in value]
    if is_path and isinstance(value, str) and value != WORLD_VOCAB:
        return str(resolve(value, Path.cwd()))
    return value


def is_file_name(model_cfg: object) -> bool:
    """Whether a `model_cfg` is a path; else it is the bare name of a model config."""
    return isinstance(model_cfg, str) and ("/" in model_cfg or model_cfg.endswith(".toml"))


def _models(table: Table) -> list[Table]:
    """The [[models]] tables; anything else the loader will complain about."""
    models = table.get("models")
    return (
        [model for model in models if isinstance(model, dict)] if isinstance(models, list) else []
    )


def _models_named(name: str, models: list[Table], override: str) -> list[Table]:
    chosen = [model for model in models if model.get("model_name") == name]
    if not chosen:
        known = [str(model.get("model_name")) for model in models]
        reason = f"no model of this name{did_you_mean(name, known)} (models.NAME.key=value)"
        raise ConfigError(reason, key=override.partition("=")[0], file="--set")
    return chosen


def _spellings(config_class: type) -> list[str]:
    specs = keys_of(config_class)
    return [spelling for name, spec in specs.items() for spelling in (name, *spec.key.aliases)]
