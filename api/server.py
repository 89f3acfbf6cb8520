"""serve(): engines, web server, watcher and signals, opened and closed in the right order.

SIGTERM or SIGINT: not ready any more and nothing new is taken; what runs may finish for
drain_timeout_s, the rest is aborted with a last event; then everything is closed. A second
signal ends the process at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import signal
from collections.abc import AsyncIterator, Callable, Iterator

import uvicorn

from api.app import create_app
from api.guard import GuardedHttp, sweep
from api.lifetime import App
from api.listener import Listener, bind_error
from api.loop_lag import observe_lag
from api.reload import Reloader
from api.service import Build, Service
from api.source import ConfigSource
from api.summary import summary
from api.watch import watch_folders
from config import BindAddress, InferConfig, file_stamps

logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGINT)
KEEP_ALIVE_S = 75  # longer than the 60 s of common load balancers, which must close first
FLUSH_S = 2.0  # for clients to read the last events of a drain
TICKS_PER_SWEEP = 2  # of uvicorn's ten per second
BACKLOG = 2048


class EmbeddedServer(uvicorn.Server):
    """uvicorn without its signal handling, calling back when it listens, sweeping its guards."""

    def __init__(self, app: App, listener: Listener, http: type[GuardedHttp]) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                uds=listener.address.unix_path,
                http=http,
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                backlog=BACKLOG,
                timeout_keep_alive=KEEP_ALIVE_S,
                timeout_graceful_shutdown=int(2 * FLUSH_S),
            )
        )
        self._listener = listener
        self._on_listening: Callable[[], None] = lambda: None

    @property
    def address(self) -> BindAddress:
        """Where it listens, with the port that was really taken."""
        return self._listener.address

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """uvicorn would raise the signal again after serving and so kill the process."""
        yield

    async def run_until_stopped(self, on_listening: Callable[[], None]) -> None:
        """Ends when `should_exit` is set. Raises ConfigError if the address was taken since."""
        self._on_listening = on_listening
        sock = self._listener.sock
        try:
            await self.serve(None if sock is None else [sock])
        except OSError as error:
            raise bind_error(self._listener.address, error) from None

    async def startup(self, sockets: list[object] | None = None) -> None:  # type: ignore[override]
        await super().startup(sockets)  # type: ignore[arg-type]
        self._on_listening()

    async def on_tick(self, counter: int) -> bool:
        if counter % TICKS_PER_SWEEP == 0:
            sweep(self.server_state.connections, asyncio.get_running_loop().time())
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[object] | None = None) -> None:  # type: ignore[override]
        asyncio.get_running_loop().call_later(FLUSH_S, self._abort_connections)
        await super().shutdown(sockets)  # type: ignore[arg-type]

    def _abort_connections(self) -> None:
        """Who has not read the end of an answer by now will not."""
        for connection in list(self.server_state.connections):
            transport = getattr(connection, "transport", None)
            if transport is not None:
                transport.abort()


@contextlib.asynccontextmanager
async def opened(
    config: InferConfig, source: ConfigSource, build: Build, http: type[GuardedHttp] = GuardedHttp
) -> AsyncIterator[tuple[Service, EmbeddedServer]]:
    """Everything ready to serve, with the configuration watched; closed again at the end.

    Raises ConfigError or EngineError.
    """
    listener = Listener(config.bind_address)
    service = Service(config, build)
    try:
        reloader = Reloader(service, source, file_stamps(config))
        await service.open()
        server = EmbeddedServer(await create_app(service, reloader), listener, http)
        watchers = [
            asyncio.create_task(watch_folders(source.folders, reloader.reload_files)),
            asyncio.create_task(observe_lag(service.metrics.loop_lag)),
        ]
        try:
            yield service, server
        finally:
            for watcher in watchers:
                watcher.cancel()
            await asyncio.wait(watchers)
    finally:
        listener.close()
        await service.close()


async def serve(
    config: InferConfig, source: ConfigSource, build: Build, announce: Callable[[str], None]
) -> bool:
    """Serve until a signal, then return whether every model still worked.

    Raises ConfigError or EngineError if it cannot start.
    """
    async with opened(config, source, build) as (service, server):
        gc.collect()
        gc.freeze()  # weights and modules live as long as the process; do not scan them again
        infos = [replica.client.info for replica in service.registry.replicas]
        text = summary(infos, server.address, bool(config.client_api_keys))
        with handle_signals(service, server):
            await server.run_until_stopped(lambda: announce(text))
        return not service.registry.has_dead


@contextlib.contextmanager
def handle_signals(service: Service, server: EmbeddedServer) -> Iterator[None]:
    """The first signal begins to drain, the second one exits."""
    loop = asyncio.get_running_loop()
    tasks = []

    def on_signal(number: int) -> None:
        if service.is_draining:
            logger.warning("second signal: exit at once")
            logging.shutdown()
            os._exit(128 + number)
        service.is_draining = True
        tasks.append(asyncio.create_task(drain(service, server)))

    for number in SIGNALS:
        loop.add_signal_handler(number, on_signal, number)
    try:
        yield
    finally:
        for number in SIGNALS:
            loop.remove_signal_handler(number)


async def drain(service: Service, server: EmbeddedServer) -> None:
    timeout_s = service.config.drain_timeout_s
    logger.info("shutting down: running requests may finish for %g s", timeout_s)
    try:
        if not await service.registry.drain(timeout_s):
            logger.warning("requests still running after %g s were aborted", timeout_s)
    finally:
        server.should_exit = True
