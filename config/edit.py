"""Edits the text of an infer TOML and writes it. Knows keys, not what their values mean."""

from __future__ import annotations

import contextlib
import os
import stat
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tomli
import tomlkit
import tomlkit.exceptions
from tomlkit.items import AbstractTable, AoT, Array

from config.convert import canonical_names
from config.errors import ConfigError
from config.key import keys_of
from config.schema import ModelTable

Models = AoT | Array  # [[models]], or models = [{...}]


def patch(
    text: str, upsert: Sequence[Mapping[str, object]] = (), remove: Sequence[str] = ()
) -> str:
    """The TOML `text` with [[models]] tables merged, appended and removed; all else stays.

    A table of `upsert` changes the given keys of the model of the same model_name (None takes
    a key out, so its default holds again), or appends a model. Names in `remove` that are not
    there are ignored, so a removal can be repeated. Comments, order and untouched values are
    kept to the byte; a comment goes only with a model whose keys it stands between.
    Raises ConfigError. The result is TOML, but whether it is a config is for the loader to say.
    """
    changes = _checked(upsert, remove)
    try:
        document = tomlkit.parse(text if not text or text.endswith("\n") else text + "\n")
    except (tomlkit.exceptions.TOMLKitError, ValueError) as error:
        raise ConfigError(f"is not TOML: {error}") from None
    before = document.unwrap()
    models = _models_of(document)
    for name, change in changes.items():
        _upsert(models, name, change)
    for name in remove:
        _remove(models, name)
    if not models:
        document.remove("models")
    edited = document.as_string()
    if tomli.loads(edited) != _expected(before, changes, remove):
        raise ConfigError("cannot be edited as it is laid out: keep all [[models]] together")
    return edited


def write_atomic(path: str | Path, text: str) -> None:
    """Replace the file: readers see the old text or the new one, also after a crash.

    A link stays a link, the mode stays the mode. On OSError (a full disk, say) the old file is
    as it was and nothing is left behind.
    """
    target = Path(os.path.realpath(path))
    descriptor, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            _copy_owner_and_mode(target, descriptor)
            file.write(text.encode())
            file.flush()
            os.fsync(descriptor)
        os.replace(temporary, target)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    _sync_folder(target.parent)


def _checked(
    upsert: Sequence[Mapping[str, object]], remove: Sequence[str]
) -> dict[str, dict[str, object]]:
    """Changes by model name, under canonical key names."""
    changes: dict[str, dict[str, object]] = {}
    for index, table in enumerate(upsert):
        place = f"upsert[{index}]"
        try:
            change = canonical_names(table, ModelTable)
        except ConfigError as error:
            raise ConfigError(error.reason, key=f"{place}.{error.key}") from None
        name = change.get("model_name")
        if not isinstance(name, str):
            reason = "must be the name of a model, to change or to add"
            raise ConfigError(reason, key=f"{place}.model_name", value=name)
        if name in changes or name in remove:
            reason = "is named twice in upsert and remove_model_names"
            raise ConfigError(reason, key=f"{place}.model_name", value=name)
        changes[name] = change
    return changes


def _models_of(document: tomlkit.TOMLDocument) -> Models:
    if "models" not in document:
        document.append("models", tomlkit.aot())
    models: object = document["models"]
    is_tables = isinstance(models, AoT | Array) and all(
        isinstance(model, AbstractTable) for model in models
    )
    if not is_tables:
        raise ConfigError("expected [[models]] tables", key="models")
    assert isinstance(models, AoT | Array)
    return models


def _upsert(models: Models, name: str, change: Mapping[str, object]) -> None:
    found = [model for model in models if model.get("model_name") == name]
    if not found:
        _append(models, change)
    for model in found:
        _merge(model, change)


def _append(models: Models, change: Mapping[str, object]) -> None:
    given = {key: value for key, value in change.items() if value is not None}
    if isinstance(models, Array):
        models.append(given)
        return
    table = tomlkit.table()
    table.update(given)
    table.trivia.indent = "\n" if len(models) else ""  # a blank line before its header
    models.append(table)


def _merge(model: AbstractTable, change: Mapping[str, object]) -> None:
    for name, value in change.items():
        spellings = (name, *keys_of(ModelTable)[name].key.aliases)
        key = next((spelling for spelling in spellings if spelling in model), name)
        if value is None:
            model.pop(key, None)
        elif key in model:
            if not _is_same(model[key], value):
                model[key] = value
        else:
            # comments at the end of a table mostly belong to the header that follows
            trivia = _cut_trivia(model)
            model[key] = value
            model.value.body.extend(trivia)


def _is_same(item: Any, value: object) -> bool:
    """Whether a TOML value may stay as it is written; 1, 1.0 and true are three values."""
    old = item.unwrap() if hasattr(item, "unwrap") else item
    return type(old) is type(value) and bool(old == value)


def _remove(models: Models, name: str) -> None:
    for index in reversed(range(len(models))):
        model = models[index]
        if model.get("model_name") != name:
            continue
        if isinstance(models, AoT):
            _keep_trivia(models, index)
        del models[index]


def _keep_trivia(models: AoT, index: int) -> None:
    """Give the comments behind a table's last key to a neighbour."""
    trivia = _cut_trivia(models[index])
    if index + 1 < len(models):
        follower = models[index + 1]
        text = "".join(item.as_string() for _, item in trivia)
        follower.trivia.indent = text + follower.trivia.indent
    elif index:
        models[index - 1].value.body.extend(trivia)


def _cut_trivia(model: AbstractTable) -> list[Any]:
    """Take white space and comments off the end of a table. They have no keys."""
    body = model.value.body
    end = len(body)
    while end and body[end - 1][0] is None:
        end -= 1
    trivia = body[end:]
    del body[end:]
    return trivia


def _expected(
    before: dict[str, Any], changes: Mapping[str, Mapping[str, object]], remove: Sequence[str]
) -> dict[str, Any]:
    """What the edited text has to say: the same edit on plain data."""
    models: list[dict[str, object]] = []
    for model in before.get("models", []):
        if model.get("model_name") not in remove:
            change = changes.get(model.get("model_name"), {})
            models.append(_merged(model, change))
    names = {model.get("model_name") for model in models}
    models += [_merged({}, change) for name, change in changes.items() if name not in names]
    rest = {key: value for key, value in before.items() if key != "models"}
    return {**rest, "models": models} if models else rest


def _merged(model: Mapping[str, object], change: Mapping[str, object]) -> dict[str, object]:
    merged = dict(model)
    for name, value in change.items():
        spellings = (name, *keys_of(ModelTable)[name].key.aliases)
        key = next((spelling for spelling in spellings if spelling in merged), name)
        merged.pop(key, None) if value is None else merged.update({key: value})
    return merged


def _copy_owner_and_mode(source: Path, descriptor: int) -> None:
    try:
        status = source.stat()
    except FileNotFoundError:
        return  # a new file stays private
    with contextlib.suppress(PermissionError):  # only root may give files away
        os.fchown(descriptor, status.st_uid, status.st_gid)
    os.fchmod(descriptor, stat.S_IMODE(status.st_mode))


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
