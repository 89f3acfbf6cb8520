"""One TOML table to the arguments of its config dataclass. Reads no TOML, knows no table.

Everything that can be said about a single key is checked here: its name, its type and bounds;
what holds between keys is checked by the dataclasses themselves.
"""

from __future__ import annotations

import difflib
import math
import re
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Literal

import msgspec

from config.errors import NO_VALUE, ConfigError
from config.key import KeySpec, keys_of
from config.schema import WORLD_VOCAB

Table = dict[str, object]

MAX_GUESSED_CHARS = 100  # of an unknown word; the search for a close one takes time for each


def convert_table(table: Mapping[str, object], config_class: type, folder: Path) -> Table:
    """Typed values by field name, defaults included. Paths start at `folder`.

    Raises ConfigError, with the key but not yet the file, for the first key that is wrong.
    """
    specs = keys_of(config_class)
    given = canonical_names(table, config_class)
    for name, spec in specs.items():
        if name not in given and spec.is_required:
            raise ConfigError(f"missing ({spec.key.doc})", key=name)
        if name not in given and spec.key.is_path and isinstance(spec.default, str | Path):
            given[name] = str(spec.default)
    return {name: convert_value(specs[name], value, folder) for name, value in given.items()}


def canonical_names(table: Mapping[str, object], config_class: type) -> Table:
    """The table with every alias replaced. Raises ConfigError for an unknown or doubled key."""
    named: Table = {}
    for key, value in table.items():
        name = canonical_name(key, config_class)
        if name in named:
            raise ConfigError(f"is another spelling of {name}, which is given as well", key=key)
        named[name] = value
    return named


def canonical_name(key: str, config_class: type) -> str:
    specs = keys_of(config_class)
    for name, spec in specs.items():
        if key == name or key in spec.key.aliases:
            return name
    raise unknown_key(key, specs)


def convert_value(spec: KeySpec, value: object, folder: Path) -> object:
    """The value in the key's type. Raises ConfigError naming the key, value and what fits."""
    shown_value = NO_VALUE if spec.key.is_secret else value
    for synonym, meaning in spec.key.synonyms.items():
        if type(value) is type(synonym) and value == synonym:
            value = meaning
    reason = _bad_text_or_number(value)
    if reason:
        raise ConfigError(reason, key=spec.name, value=shown_value)
    if spec.key.is_path and isinstance(value, list):
        value = [str(resolve(item, folder)) if isinstance(item, str) else item for item in value]
    elif spec.key.is_path and isinstance(value, str) and value not in ("", WORLD_VOCAB):
        value = str(resolve(value, folder))
    try:
        return msgspec.convert(value, spec.type, dec_hook=_to_path)
    except msgspec.ValidationError as error:
        what, _, place = str(error).partition(" - at `$")
        reason = _readable(what, value, spec)
        if place and isinstance(value, list):  # place is "[index]`": no key holds deeper lists
            index = int(place.strip("[]`"))
            shown_item = NO_VALUE if spec.key.is_secret else value[index]
            raise ConfigError(reason, key=f"{spec.name}[{index}]", value=shown_item) from None
        raise ConfigError(reason, key=spec.name, value=shown_value) from None


def resolve(text: str, folder: Path) -> Path:
    """An absolute path. Its folder is real; the file itself may be a link and stays one."""
    path = folder / Path(text).expanduser()
    return path.resolve() if path.name in ("", "..") else path.parent.resolve() / path.name


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """How a sentence about an unknown word ends: with the closest known one, and with all."""
    known = list(known)
    return f"{_guess(word, known) or ';'} there are: {', '.join(known) or 'none'}"


def unknown_key(key: str, known: Iterable[str]) -> ConfigError:
    """There are many keys, so they are listed only when none is close."""
    known = list(known)
    return ConfigError(f"unknown key{_guess(key, known) or did_you_mean(key, known)}", key=key)


def _guess(word: str, known: list[str]) -> str:
    close = difflib.get_close_matches(word[:MAX_GUESSED_CHARS], known, n=1)
    return f'; did you mean "{close[0]}"?' if close else ""


def _bad_text_or_number(value: object) -> str | None:
    """What no key of any table accepts, although TOML can write it."""
    if isinstance(value, str) and value != value.strip():
        return "must not begin or end with white space"
    if isinstance(value, str) and not value.isprintable():
        return "must not contain control characters"
    if isinstance(value, float) and not math.isfinite(value):
        return "must be a finite number"
    return None


def _to_path(expected: type, value: object) -> object:
    if expected is not Path:  # msgspec asks only for types it does not know
        raise NotImplementedError(expected)
    if not isinstance(value, str):
        raise ValueError(f"Expected `str`, got `{type(value).__name__}`")
    if not value:
        raise ValueError("must not be empty; leave the key out instead")
    return Path(value)


def _readable(what: str, value: object, spec: KeySpec) -> str:
    """msgspec's message in the words of a TOML user."""
    choices = [str(choice) for choice in [*_choices(spec.type), *spec.key.synonyms]]
    if choices:
        return f"not one of these{did_you_mean(str(value), choices)}"
    if what == "Expected `str` of length >= 1":
        return "must not be empty"
    what = (
        what.replace(" | null", "").replace("`array`", "an array").replace("Expected", "expected")
    )
    return re.sub("`object`", "a table", what)


def _choices(expected: object) -> list[object]:
    """The values of the Literal inside a type expression, if there is one."""
    if typing.get_origin(expected) is Literal:
        return list(typing.get_args(expected))
    return [choice for part in typing.get_args(expected) for choice in _choices(part)]
