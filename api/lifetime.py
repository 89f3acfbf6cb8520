"""The life of one HTTP request around the routes: id, access, bounded body, early end, log line.

An ASGI wrapper: it knows headers and bytes, no routes and no engine. ASGI servers cancel nothing
when a client goes away, so a task per request waits for that and cancels the handler; what
the handler registered with `Lifetime.on_end` runs in any case, at once and synchronously.
"""

from __future__ import annotations

import asyncio
import logging
import re
import uuid
from collections.abc import Awaitable, Callable, MutableMapping
from contextlib import suppress
from time import perf_counter
from typing import Any, cast

from blacksheep import Request

from api.access import OPEN_PATHS, Caller, caller_of, cors_headers, header, preflight_headers
from api.body_writer import BODY_WRITER_KEY, BodyWriter
from api.dialect import error_body, request_id_headers
from api.errors import ApiError, Headers
from config import InferConfig

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

logger = logging.getLogger("api.access")

LIFETIME_KEY = "rwkv.lifetime"
PROBE_PATHS = OPEN_PATHS | {"/metrics"}
CLIENT_GONE = 499  # nginx's code for a client that closed first; only ever logged
SAFETY: Headers = ((b"x-content-type-options", b"nosniff"),)  # JSON that quotes HTML stays JSON
LINGER_S = 1.0  # a refused upload is read on for so long, or a reset could overtake the answer
MAX_LOGGED_PATH = 1000  # bytes
REQUEST_ID = re.compile(rb"[!-~]{1,128}")


class ClientGone(Exception):
    """The client closed the connection before its request was complete."""


class Lifetime:
    """What a route may know of its request's life. Found in the ASGI scope at LIFETIME_KEY."""

    __slots__ = ("_callbacks", "body_writer", "caller", "request_id")

    def __init__(
        self, request_id: str, caller: Caller, body_writer: BodyWriter | None = None
    ) -> None:
        self.request_id = request_id
        self.caller = caller
        self.body_writer = body_writer
        self._callbacks: list[Callable[[], None]] = []

    @property
    def owner(self) -> str:
        return self.caller.owner

    def on_end(self, callback: Callable[[], None]) -> None:
        """Call back when the answer is out, or failed, or nobody waits for it any more."""
        self._callbacks.append(callback)

    def end(self) -> None:
        self.body_writer = None  # it refers to the scope, in which this lifetime is
        while self._callbacks:
            self._callbacks.pop()()


def lifetime_of(request: Request) -> Lifetime:
    """The lifetime that the guard put into a request's scope."""
    scope = cast(Message, request.scope)
    lifetime = scope[LIFETIME_KEY]
    assert isinstance(lifetime, Lifetime), "the application runs behind a LifetimeGuard"
    return lifetime


class LifetimeGuard:
    """The ASGI application in front of the routes. `config` is asked anew for every request."""

    def __init__(self, app: App, config: Callable[[], InferConfig]) -> None:
        self._app = app
        self._config = config

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        assert scope["type"] == "http", "websockets and lifespan are switched off"
        config = self._config()
        writer: BodyWriter | None = scope.pop(BODY_WRITER_KEY, None)
        headers: Headers = tuple(scope["headers"])
        cors = cors_headers(config.allowed_origins, headers)
        answer = Answer(send, scope["path"], _request_id(headers), cors)
        started_s = perf_counter()
        try:
            preflight = preflight_headers(config.allowed_origins, headers)
            if scope["method"] == "OPTIONS" and preflight is not None:
                answer.extra = ()  # the preflight's headers hold them already
                await answer.send_whole(204, preflight)
                return
            caller = caller_of(config, scope["path"], headers)
            body = await _read_body(receive, headers, config.request_body_limit_bytes)
            lifetime = Lifetime(answer.request_id, caller, writer)
            await self._run(scope, lifetime, body, receive, answer)
        except ApiError as error:
            await _refuse(error, receive, answer)
        except ClientGone:
            answer.status = CLIENT_GONE
        finally:
            # Probes come every second and say nothing.
            level = logging.DEBUG if scope["path"] in PROBE_PATHS else logging.INFO
            logger.log(
                level,
                "%s %s %d %.1f ms %s",
                scope["method"],
                scope["raw_path"][:MAX_LOGGED_PATH].decode("ascii", "backslashreplace"),
                answer.status,
                1000 * (perf_counter() - started_s),
                answer.request_id,
            )

    async def _run(
        self, scope: Message, lifetime: Lifetime, body: bytes, receive: Receive, answer: Answer
    ) -> None:
        """Run the routes; raise ClientGone as soon as the client has gone."""
        handler = asyncio.current_task()
        assert handler is not None, "ASGI applications run in a task"
        scope[LIFETIME_KEY] = lifetime
        is_gone = False

        async def watch() -> None:
            nonlocal is_gone
            while (await receive())["type"] != "http.disconnect":
                pass
            if not answer.is_complete:
                is_gone = True
                lifetime.end()
                handler.cancel()

        async def receive_body() -> Message:
            return {"type": "http.request", "body": body, "more_body": False}

        watcher = asyncio.create_task(watch())
        try:
            await self._app(scope, receive_body, answer.send)
        except asyncio.CancelledError:
            if not is_gone:
                raise
            handler.uncancel()
            raise ClientGone from None
        finally:
            watcher.cancel()
            lifetime.end()


class Answer:
    """ASGI `send` with our headers added, and what was sent so far."""

    def __init__(self, send: Send, path: str, request_id: str, extra: Headers) -> None:
        self._send = send
        self.path = path
        self.request_id = request_id
        self.extra = extra
        self.status = 0  # none yet
        self.is_complete = False

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            ids = request_id_headers(self.path, self.request_id)
            message["headers"] = [*message["headers"], *SAFETY, *ids, *self.extra]
        else:
            self.is_complete = not message.get("more_body", False)
        await self._send(message)

    async def send_whole(self, status: int, headers: Headers, body: bytes = b"") -> None:
        await self.send({"type": "http.response.start", "status": status, "headers": headers})
        await self.send({"type": "http.response.body", "body": body})


async def _read_body(receive: Receive, headers: Headers, limit: int) -> bytes:
    """The whole body. Raises ApiError 413 as soon as it is known to be too long."""
    declared = header(headers, b"content-length")
    if declared is not None and declared.isdigit() and int(declared) > limit:
        raise _too_large(limit)
    parts, num_bytes = [], 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        part = message.get("body", b"")
        num_bytes += len(part)
        if num_bytes > limit:
            raise _too_large(limit)
        parts.append(part)
        if not message.get("more_body", False):
            return b"".join(parts)


def _too_large(limit: int) -> ApiError:
    return ApiError(
        413,
        f"the request body is larger than request_body_limit_bytes = {limit}",
        code="request_too_large",
        headers=((b"connection", b"close"),),
    )


async def _refuse(error: ApiError, receive: Receive, answer: Answer) -> None:
    """Answer with an error. The rest of an upload is thrown away, so that the answer arrives."""
    body = error_body(answer.path, error, answer.request_id)
    headers = (
        (b"content-type", b"application/json"),
        (b"content-length", b"%d" % len(body)),
        *error.headers,
    )
    await answer.send({"type": "http.response.start", "status": error.status, "headers": headers})
    await answer.send({"type": "http.response.body", "body": body, "more_body": True})
    with suppress(TimeoutError):
        async with asyncio.timeout(LINGER_S):
            while (message := await receive())["type"] != "http.disconnect":
                if not message.get("more_body", False):
                    break
    await answer.send({"type": "http.response.body", "body": b"", "more_body": False})


def _request_id(headers: Headers) -> str:
    """The client's own X-Request-Id where it is harmless in a log, else a new one."""
    given = header(headers, b"x-request-id")
    if given is not None and REQUEST_ID.fullmatch(given):
        return given.decode()
    return uuid.uuid4().hex
