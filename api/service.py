"""Service: what the routes, the reloader and the server share. Knows no HTTP.

`config` and the registry change by assignment on the event loop; nobody else keeps a copy.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

from api.background import BackgroundResponses
from api.errors import ApiError
from api.metrics import Metrics
from api.recent import RecentResponses
from api.registry import ModelRegistry, Replica
from api.response_database import LostState
from api.response_store import ResponseStore
from api.running import RunningRequests
from config import InferConfig, ModelTable
from engine.client import EngineClient
from engine.errors import EngineError
from engine.types import StatsSink

logger = logging.getLogger(__name__)

ResultT = TypeVar("ResultT")
Build = Callable[[ModelTable, StatsSink], EngineClient]


@dataclass(frozen=True, slots=True)
class ReloadReport:
    """How the last reload ended. `file` and `key` say what was wrong, where that is known."""

    result: str  # "applied" or "rejected"
    source: str  # "file" or "admin"
    at_unix_s: float
    message: str
    file: str | None = None
    key: str | None = None


class Service:
    def __init__(self, config: InferConfig, build: Build) -> None:
        self.config = config
        self.registry = ModelRegistry()
        self.recent = RecentResponses()
        self.responses = ResponseStore(self._response_folders, self._release_state)
        self.background = BackgroundResponses()
        self.running = RunningRequests()
        self.metrics = Metrics(self.registry.snapshots, has_vllm_names=config.enable_vllm_metrics)
        self.is_draining = False
        self.last_reload: ReloadReport | None = None
        self._build = build

    async def open(self) -> None:
        """Build every model of the configuration."""
        self.registry.replace(self.config.models, await self.build(self.config.models))

    async def build(self, tables: Iterable[ModelTable]) -> dict[str, Replica]:
        """New replicas, warm and started, one after the other. All of them, or an error."""
        built: dict[str, Replica] = {}
        try:
            for table in tables:
                sink = self.metrics.sink(table.model_name)
                client = await in_daemon_thread(partial(self._build, table, sink))
                client.start()
                built[table.model_name] = Replica(table, client)
                logger.info("%s is ready on %s", table.model_name, client.info.device)
        except BaseException:
            await asyncio.gather(*(replica.client.close() for replica in built.values()))
            raise
        return built

    async def close(self) -> None:
        await self.registry.close()
        await self.background.close()
        await self.responses.close()

    def _response_folders(self) -> set[Path | None]:
        return {table.state_dir for table in self.config.models}

    def _release_state(self, lost: LostState) -> None:
        """It may have gone already, and its model too."""
        with suppress(ApiError, EngineError):
            self.registry.get(lost.model_name).client.states.delete(lost.owner, lost.state_id)


async def in_daemon_thread(function: Callable[[], ResultT]) -> ResultT:
    """Run blocking work beside the loop. Unlike an executor's, the thread never delays the exit."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[ResultT] = loop.create_future()

    def settle(result: ResultT | None, error: BaseException | None) -> None:
        if future.cancelled():
            return
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(result)  # type: ignore[arg-type]

    def run() -> None:
        result, failure = None, None
        try:
            result = function()
        except BaseException as error:
            failure = error
        try:
            loop.call_soon_threadsafe(settle, result, failure)
        except RuntimeError:
            logger.warning("the result of %s came after the end of the server", function)

    threading.Thread(target=run, name="build", daemon=True).start()
    return await future
