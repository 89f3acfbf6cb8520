"""The key tables of docs/config.md, from the schema: `python -m config.docs docs/config.md`."""

from __future__ import annotations

import dataclasses
import re
import sys
import types
import typing
from pathlib import Path
from typing import Annotated, Literal

from msgspec import Meta

from config.errors import shown
from config.key import KeySpec, keys_of
from config.schema import InferConfig, IpcConfig, ModelConfig, ModelTable, TrainConfig

TABLES = (ModelConfig, InferConfig, ModelTable, IpcConfig, TrainConfig)
RELOADED = (InferConfig, ModelTable)
PLAIN_TYPES = {bool: "true/false", int: "integer", float: "number", str: "string", Path: "path"}


def update(text: str) -> str:
    """The text with each table between its `keys of` and `end` comments made anew."""
    for config_class in TABLES:
        start = f"<!-- keys of {config_class.__name__} -->"
        pattern = re.compile(f"{re.escape(start)}.*?<!-- end -->", re.DOTALL)
        table = f"{start}\n{render(config_class)}\n<!-- end -->"
        text, count = pattern.subn(lambda _, table=table: table, text)  # type: ignore[misc]
        if count != 1:
            raise ValueError(f'expected one "{start}" followed by "<!-- end -->", found {count}')
    return text


def render(config_class: type) -> str:
    """One Markdown table: a row for each key."""
    is_reloaded = config_class in RELOADED
    titles = ["key", "type", "default", *(["when changed"] if is_reloaded else []), "meaning"]
    rows = [titles, ["---"] * len(titles)]
    for spec in keys_of(config_class).values():
        effect = [spec.key.reload] if is_reloaded else []
        rows.append([_names(spec), _type(spec), _default(spec), *effect, _meaning(spec)])
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in rows)


def _names(spec: KeySpec) -> str:
    aliases = "".join(f" (or `{alias}`)" for alias in spec.key.aliases)
    return f"`{spec.name}`{aliases}"


def _type(spec: KeySpec) -> str:
    return "path" if spec.key.is_path else _type_text(spec.type)


def _type_text(expected: object) -> str:
    origin, parts = typing.get_origin(expected), typing.get_args(expected)
    if origin is Annotated:
        bounds = [_bounds(part) for part in parts[1:] if isinstance(part, Meta)]
        return " ".join([_type_text(parts[0]), *filter(None, bounds)])
    if origin is Literal:
        return ", ".join(f"`{shown(choice)}`" for choice in parts)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_type_text(part) for part in parts if part is not types.NoneType)
    if origin is tuple:
        return f"list of {_type_text(parts[0])}"
    return PLAIN_TYPES.get(typing.cast(type, expected), "table")


def _bounds(meta: Meta) -> str:
    signs = {"≥": meta.ge, ">": meta.gt, "<": meta.lt}
    return " ".join(f"{sign} {bound}" for sign, bound in signs.items() if bound is not None)


def _default(spec: KeySpec) -> str:
    if spec.is_required:
        return "required"
    if spec.default is None:
        return "unset"
    return "" if dataclasses.is_dataclass(spec.default) else f"`{shown(spec.default)}`"


def _meaning(spec: KeySpec) -> str:
    only = spec.key.only
    if only is None:
        return spec.key.doc
    return f"{spec.key.doc}; {'must stay unset' if only.value is None else 'no other value'}"


def main() -> None:
    for path in map(Path, sys.argv[1:]):
        path.write_text(update(path.read_text()))


if __name__ == "__main__":
    main()
