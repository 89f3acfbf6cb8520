"""Reloader: a changed configuration becomes changed models, without a failed request.

New replicas are built and warm before anything is swapped; if that fails, everything stays as
it was, the file too. One reload at a time. Knows no HTTP.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from api.errors import ApiError, draining
from api.service import ReloadReport, Service
from api.source import ConfigSource
from config import (
    Change,
    ConfigError,
    FileStamp,
    InferConfig,
    ReloadPlan,
    diff,
    file_stamps,
    patch,
    read_text,
    replaced_files,
    write_atomic,
)
from engine.errors import EngineError

logger = logging.getLogger(__name__)

SETTLE_S = 0.1  # two reads so far apart must agree: an editor may be in the middle of writing
TO_BUILD = (Change.REBUILD, Change.ADDED)


@dataclass(frozen=True, slots=True)
class Patch:
    """What POST /admin/models/reload asks to change in the infer TOML."""

    upsert: Sequence[Mapping[str, object]]
    remove: Sequence[str]


@dataclass(frozen=True, slots=True)
class Proposal:
    """A configuration to change to and what that means. `write` puts it into the file."""

    config: InferConfig
    stamps: Mapping[Path, FileStamp]  # before loading: a file replaced meanwhile counts as new
    plan: ReloadPlan
    write: Callable[[], None] | None = None


class Reloader:
    """`stamps` are those of the files that the running configuration was built from."""

    def __init__(
        self, service: Service, source: ConfigSource, stamps: Mapping[Path, FileStamp]
    ) -> None:
        self._service = service
        self._source = source
        self._stamps = stamps
        self._lock = asyncio.Lock()
        self._rejected: InferConfig | ConfigError | None = None  # not to be tried again and again

    async def reload_files(self) -> None:
        """Apply what the files say now. Never raises: what is wrong is logged and reported."""
        async with self._lock:
            found = await asyncio.to_thread(self._load)
            if not self._is_news(found):
                return
            found = await self._settled(found)
            if not self._is_news(found):
                return
            if found == self._service.config:
                self._rejected = None
                self._report("applied", "file", "back to the configuration in use")
                return
            self._rejected = found
            try:
                if isinstance(found, ConfigError):
                    raise found
                await self._apply(await asyncio.to_thread(self._propose, found), "file")
            except Exception as error:
                self._reject("file", error)

    async def patch_file(self, change: Patch, *, is_dry_run: bool) -> ReloadPlan:
        """Patch the file and apply it, or only say what that would do.

        Raises ConfigError or EngineError for what the caller can mend, and OSError, ApiError and
        whatever else building raises; then nothing has changed.
        """
        async with self._lock:
            try:
                proposal = await asyncio.to_thread(self._propose_patch, change)
                if not is_dry_run:
                    await self._apply(proposal, "admin")
            except Exception as error:
                if not is_dry_run:
                    self._reject("admin", error)
                raise
            return proposal.plan

    def _propose(self, config: InferConfig, write: Callable[[], None] | None = None) -> Proposal:
        """Reads files: not for the event loop."""
        stamps = file_stamps(config)
        plan = diff(self._service.config, config, replaced_files(self._stamps, stamps))
        return Proposal(config, stamps, plan, write)

    def _propose_patch(self, change: Patch) -> Proposal:
        """Reads files: not for the event loop."""
        path = self._source.path
        text = read_text(path)
        patched = patch(text, change.upsert, change.remove)
        write = partial(write_atomic, path, patched) if patched != text else None
        return self._propose(self._source.parse(patched), write)

    async def _apply(self, proposal: Proposal, source: str) -> None:
        service, config = self._service, proposal.config
        names = [name for change in TO_BUILD for name in proposal.plan.names(change)]
        built = await service.build(table for table in config.models if table.model_name in names)
        try:
            if service.is_draining:
                raise draining()
            if proposal.write is not None:
                await asyncio.to_thread(proposal.write)
        except BaseException:
            await asyncio.gather(*(replica.client.close() for replica in built.values()))
            raise
        service.registry.replace(config.models, built)
        service.config = config
        self._stamps = proposal.stamps
        self._rejected = None
        self._report("applied", source, describe(proposal.plan))

    def _is_news(self, found: InferConfig | ConfigError) -> bool:
        """Whether the files say something else than when they were last looked at."""
        last = self._service.config if self._rejected is None else self._rejected
        return not _is_same(found, last)

    async def _settled(self, found: InferConfig | ConfigError) -> InferConfig | ConfigError:
        """The configuration, or what is wrong with it, once two reads in a row agree."""
        while True:
            await asyncio.sleep(SETTLE_S)
            again = await asyncio.to_thread(self._load)
            if _is_same(found, again):
                return found
            found = again

    def _load(self) -> InferConfig | ConfigError:
        try:
            return self._source.load()
        except ConfigError as error:
            return error

    def _reject(self, source: str, error: Exception) -> None:
        message = str(error) or type(error).__name__
        if not isinstance(error, ConfigError | EngineError | ApiError | OSError):
            logger.exception("a reload failed", exc_info=error)
            message = f"{type(error).__name__}: {message}"
        place = (error.file or None, error.key or None) if isinstance(error, ConfigError) else ()
        self._report("rejected", source, message, *place)

    def _report(
        self,
        result: str,
        source: str,
        message: str,
        file: str | None = None,
        key: str | None = None,
    ) -> None:
        level = logging.INFO if result == "applied" else logging.ERROR
        logger.log(level, "reload from %s %s: %s", source, result, message)
        self._service.metrics.count_reload(result)
        self._service.last_reload = ReloadReport(result, source, time.time(), message, file, key)


def describe(plan: ReloadPlan) -> str:
    """The plan in one line."""
    parts = [
        f"{change.value} {', '.join(names)}"
        for change in Change
        if change is not Change.UNCHANGED and (names := plan.names(change))
    ]
    if plan.live_keys:
        parts.append(f"changed {', '.join(plan.live_keys)}")
    if plan.restart_keys:
        parts.append(f"restart the server for {', '.join(plan.restart_keys)}")
    return "; ".join(parts) or "nothing to change"


def _is_same(first: InferConfig | ConfigError, second: InferConfig | ConfigError) -> bool:
    if isinstance(first, ConfigError) and isinstance(second, ConfigError):
        return str(first) == str(second)
    return first == second
