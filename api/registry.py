"""ModelRegistry: which replica serves which model now, and the ones on their way out.

Swapping is one assignment on the event loop, so a request sees the old models or the new ones.
Knows engines through EngineClient only.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace

from api.errors import ApiError, invalid
from config import ModelTable
from engine.client import EngineClient
from engine.limits import limits_of
from engine.types import EngineSnapshot

logger = logging.getLogger(__name__)

RETIRE_TIMEOUT_S = 3600.0  # a replaced replica finishes what it runs; this only bounds a leak


@dataclass(frozen=True, slots=True)
class Replica:
    """A model table and the engine built from it. `created` is in unix seconds."""

    table: ModelTable
    client: EngineClient
    created: int = field(default_factory=lambda: int(time.time()))


class ModelRegistry:
    """Owns the replicas: what is put in here is closed here."""

    def __init__(self) -> None:
        self._replicas: dict[str, Replica] = {}
        self._retiring: dict[asyncio.Task[None], Replica] = {}

    @property
    def names(self) -> list[str]:
        return sorted(self._replicas)

    @property
    def replicas(self) -> Collection[Replica]:
        """In the order of the configuration."""
        return self._replicas.values()

    def get(self, model_name: str | None) -> Replica:
        """Raises ApiError: 400 where no model is named, 404 where it is not served."""
        available = ", ".join(self.names)
        if model_name is None or not model_name.strip():
            raise invalid(f"'model' is missing; available models: {available}", "model")
        replica = self._replicas.get(model_name)
        if replica is None:
            raise ApiError(
                404,
                f"the model {model_name!r} is not served here; available models: {available}",
                param="model",
                code="model_not_found",
            )
        return replica

    @property
    def has_dead(self) -> bool:
        """A model is out of service."""
        return any(replica.client.snapshot().is_dead for replica in self._replicas.values())

    def snapshots(self) -> dict[str, list[EngineSnapshot]]:
        """Of each model: its replica first, then those it has replaced and that still run."""
        found = {name: [replica.client.snapshot()] for name, replica in self._replicas.items()}
        for replica in self._retiring.values():
            found.setdefault(replica.table.model_name, []).append(replica.client.snapshot())
        return found

    def replace(self, tables: Iterable[ModelTable], incoming: Mapping[str, Replica]) -> None:
        """Serve exactly these tables from now on: with `incoming` replicas where there are any.

        The others keep theirs and take over the live part of their table. Replicas left over
        finish what they run; what waits there moves to the successor.
        """
        before = self._replicas
        after = {}
        for table in tables:
            name = table.model_name
            after[name] = incoming.get(name) or _reconfigured(before[name], table)
        self._replicas = after
        for name, old in before.items():
            new = after.get(name)
            if new is None or new.client is not old.client:
                self._retire(old, new)

    async def drain(self, timeout_s: float) -> bool:
        """Let every request finish, resumable ones on disk; abort the rest. True if none was."""
        clients = [replica.client for replica in self._all()]
        drains = (client.drain(timeout_s, suspends=True) for client in clients)
        return all(await asyncio.gather(*drains))

    async def close(self) -> None:
        """Stop all engines; running requests are aborted."""
        replicas = self._all()
        self._replicas = {}
        for task in list(self._retiring):
            task.cancel()
        await asyncio.gather(*(replica.client.close() for replica in replicas))

    def _all(self) -> list[Replica]:
        return [*self._replicas.values(), *self._retiring.values()]

    def _retire(self, old: Replica, successor: Replica | None) -> None:
        if successor is not None and _speak_same_tokens(old, successor):
            for request, stream in old.client.take_waiting():
                successor.client.adopt(request, stream)
        task = asyncio.create_task(_finish(old, successor), name=f"retire {old.table.model_name}")
        self._retiring[task] = old
        task.add_done_callback(self._retiring.pop)


def _reconfigured(replica: Replica, table: ModelTable) -> Replica:
    if replica.table == table:
        return replica
    replica.client.reconfigure(limits_of(table))
    return replace(replica, table=table)


def _speak_same_tokens(old: Replica, new: Replica) -> bool:
    """Whether the token ids of a waiting request mean the same to both."""
    return old.client.tokenizer.fingerprint == new.client.tokenizer.fingerprint


async def _finish(replica: Replica, successor: Replica | None) -> None:
    name = replica.table.model_name
    if not await replica.client.drain(RETIRE_TIMEOUT_S):
        logger.error("requests of the replaced %s did not end in time and were aborted", name)
    await replica.client.close()
    if successor is not None:
        successor.client.rescan()  # the states that the other one has left on disk
    logger.info("the replaced replica of %s is closed", name)
