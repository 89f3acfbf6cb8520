"""What a changed InferConfig means for a running server. Decides only; api/reload.py acts."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from config.files import model_files
from config.key import Reload, keys_of
from config.schema import InferConfig, ModelTable

AnyTable = InferConfig | ModelTable


class Change(StrEnum):
    """What happens to one model."""

    UNCHANGED = "unchanged"
    LIVE = "live"  # new limits between two steps, same replica
    REBUILD = "rebuild"  # a new replica takes over when it is warm
    ADDED = "added"
    REMOVED = "removed"


@dataclass(frozen=True, slots=True)
class ModelChange:
    model_name: str
    change: Change
    keys: tuple[str, ...] = ()  # what differs; "model" is the content of the model config


@dataclass(frozen=True, slots=True)
class ReloadPlan:
    """Models of the new config in its order, then the removed ones."""

    models: tuple[ModelChange, ...]
    live_keys: tuple[str, ...]  # server keys that take effect at once
    restart_keys: tuple[str, ...]  # server keys that changed in vain until a restart

    def names(self, change: Change) -> tuple[str, ...]:
        return tuple(model.model_name for model in self.models if model.change is change)

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to do and nothing to warn about."""
        is_same = all(model.change is Change.UNCHANGED for model in self.models)
        return is_same and not self.live_keys and not self.restart_keys


def diff(old: InferConfig, new: InferConfig, replaced_files: Collection[Path] = ()) -> ReloadPlan:
    """Models are matched by name. `replaced_files` have new content under their old name."""
    old_tables = {table.model_name: table for table in old.models}
    new_names = {table.model_name for table in new.models}
    changes = [
        _model_change(old_tables.get(table.model_name), table, replaced_files)
        for table in new.models
    ]
    changes += [ModelChange(name, Change.REMOVED) for name in old_tables if name not in new_names]
    server = [name for name in _changed_keys(old, new) if name != "models"]
    return ReloadPlan(
        models=tuple(changes),
        live_keys=tuple(name for name in server if _reload_of(new, name) == "live"),
        restart_keys=tuple(name for name in server if _reload_of(new, name) != "live"),
    )


def _model_change(
    old: ModelTable | None, new: ModelTable, replaced_files: Collection[Path]
) -> ModelChange:
    if old is None:
        return ModelChange(new.model_name, Change.ADDED)
    keys = _changed_keys(old, new)
    needs_rebuild = any(_reload_of(new, name) != "live" for name in keys)
    if old.model != new.model:
        keys.append("model")
        needs_rebuild = True
    for key, path in model_files(new):
        if path in replaced_files and key not in keys:
            keys.append(key)
            needs_rebuild = True
    if needs_rebuild:
        return ModelChange(new.model_name, Change.REBUILD, tuple(keys))
    return ModelChange(new.model_name, Change.LIVE if keys else Change.UNCHANGED, tuple(keys))


def _changed_keys(old: AnyTable, new: AnyTable) -> list[str]:
    return [name for name in keys_of(type(new)) if getattr(old, name) != getattr(new, name)]


def _reload_of(config: AnyTable, name: str) -> Reload:
    return keys_of(type(config))[name].key.reload
