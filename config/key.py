"""What the schema says about one TOML key besides its type. Knows no particular key.

A field of a config dataclass is a TOML key when its annotation carries a `Key`:

    max_batch_size: Annotated[PositiveInt, Key("sequences that run at once")] = 4

Types, bounds, documentation, aliases and the effect of a hot reload are all read from there.
"""

from __future__ import annotations

import dataclasses
import functools
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from msgspec import Meta

from config.errors import NO_VALUE, ConfigError

PositiveInt = Annotated[int, Meta(ge=1)]
NonNegativeInt = Annotated[int, Meta(ge=0)]
PositiveFloat = Annotated[float, Meta(gt=0)]
NonNegativeFloat = Annotated[float, Meta(ge=0)]
Fraction = Annotated[float, Meta(ge=0, lt=1)]
Name = Annotated[str, Meta(min_length=1)]

Reload = Literal["live", "rebuild", "restart"]


@dataclass(frozen=True, slots=True)
class Only:
    """The one value that is supported, and what to say about any other."""

    value: object
    why: str


@dataclass(frozen=True, slots=True)
class Key:
    """One TOML key. `doc` is its line in docs/config.md."""

    doc: str
    aliases: tuple[str, ...] = ()  # other spellings of the key
    synonyms: Mapping[object, object] = field(default_factory=dict)  # other spellings of values
    only: Only | None = None
    is_path: bool = False  # relative to the folder of the file it is written in
    is_secret: bool = False  # never shown
    reload: Reload = "rebuild"  # what a changed value asks of a running server


@dataclass(frozen=True, slots=True)
class KeySpec:
    """A key together with what the dataclass says about its field."""

    name: str
    type: Any  # a type expression, which has no static type of its own
    key: Key
    is_required: bool
    default: object


def keys_of(config_class: type) -> Mapping[str, KeySpec]:
    """The TOML keys of a config dataclass, by name, in the order they are declared."""
    return _read_keys(config_class)


@functools.cache  # resolving annotations takes most of the time of loading a file
def _read_keys(config_class: type) -> Mapping[str, KeySpec]:
    hints = typing.get_type_hints(config_class, include_extras=True)
    specs = {}
    for entry in dataclasses.fields(config_class):
        extras = getattr(hints[entry.name], "__metadata__", ())
        key = next((extra for extra in extras if isinstance(extra, Key)), None)
        if key is not None:
            specs[entry.name] = KeySpec(
                entry.name, hints[entry.name], key, _is_required(entry), _default(entry)
            )
    return specs


def check_only(config: object) -> None:
    """Raise ConfigError for a key whose value is not the only supported one."""
    for name, spec in keys_of(type(config)).items():
        value = getattr(config, name)
        if spec.key.only is not None and value != spec.key.only.value:
            shown_value = NO_VALUE if spec.key.is_secret else value
            raise ConfigError(spec.key.only.why, key=name, value=shown_value)


def _is_required(entry: dataclasses.Field[Any]) -> bool:
    return entry.default is dataclasses.MISSING and entry.default_factory is dataclasses.MISSING


def _default(entry: dataclasses.Field[Any]) -> object:
    if entry.default_factory is not dataclasses.MISSING:
        return entry.default_factory()
    return None if entry.default is dataclasses.MISSING else entry.default
