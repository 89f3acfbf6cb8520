"""Which key opens what: every route, every way to send a key, the admin's key, keys that change."""

from __future__ import annotations

import asyncio
import hmac
import re
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from api import access
from api.access import OPEN_PATHS, Caller, caller_of, owner_of
from api.app import all_routes
from api.errors import ApiError
from api.reload import Reloader
from api.routes.route import Route
from tests.api.harness import Reply, Running, eventually, request_bytes, running
from tests.api.reloading import RELOAD, by_rename, edit
from tests.api.test_errors import assert_error
from tests.config.config_files import TABLE, infer_config

ONE, TWO, ADMIN, NONE = "sk-one", "sk-two", "sk-admin", "sk-none"
KEYS: dict[str, Any] = {"api_key": ONE, "api_keys": [TWO]}
EMPTY_UPSERT = {"upsert": []}

RIGHT = [
    "Authorization: Bearer sk-one",
    "Authorization: bearer sk-one",
    "authorization: BEARER   sk-one",
    "Authorization: sk-one",
    "Authorization:    Bearer sk-two   ",
    "X-Api-Key: sk-one",
    "x-api-key: sk-two",
    "Authorization: Bearer sk-one\r\nX-Api-Key: wrong",
]
WRONG = [
    b"",
    b"Authorization:",
    b"Authorization: Bearer",
    b"Authorization: Bearer ",
    b"Authorization: Bearer sk-on",
    b"Authorization: Bearer sk-one2",
    b"Authorization: Bearer SK-ONE",
    b"Authorization: Bearer sk-one sk-one",
    b"Authorization: Bearer sk-one, Bearer sk-one",
    b"Authorization: Bearer Bearer sk-one",
    b"Authorization: Bearer\xc2\xa0sk-one",
    b"Authorization: Bearer sk-\xc3\xb6ne",
    b"Authorization: Bearer sk-one\xff",
    b"Authorization: Basic sk-one",
    b"Authorization: Basic Onl1",
    b"Authorization: Digest sk-one",
    b"Authorization: Token sk-one",
    b"Authorization: Bearer " + b"x" * 60_000,
    b"Authorization: Bearer sk-one\r\nAuthorization: Bearer sk-one",
    b"Authorization: Bearer wrong\r\nAuthorization: Bearer sk-one",
    b"Authorization: Bearer wrong\r\nX-Api-Key: sk-one",
    b"X-Api-Key: wrong\r\nX-Api-Key: sk-one",
    b"X-Api-Key: Bearer sk-one",
    b"X-Api-Key:",
    b"Api-Key: sk-one",
    b"Cookie: api_key=sk-one",
    b"Proxy-Authorization: Bearer sk-one",
]
SPELLINGS = [
    "/ADMIN/models/reload",
    "/admin/models/Reload",
    "/admin/models/reload/",
    "//admin/models/reload",
    "/./admin/models/reload",
    "/health/../admin/models/reload",
    "/health/%2e%2e/admin/models/reload",
    "/%61dmin/models/reload",
    "/admin%2fmodels%2freload",
    "/admin\\models\\reload",
    "/admin/models/reload?x=/health",
    "/admin/models/reload#/health",
    "/health?/admin/models/reload",
    "/health;/admin/models/reload",
    "http://test/admin/models/reload",
]


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


async def routes_of(server: Running) -> list[Route]:
    """In a thread, as it reads files."""
    reloader = Reloader(server.service, server.source, {})
    return await asyncio.to_thread(all_routes, server.service, reloader)


def asked(route: Route) -> Iterator[tuple[str, str]]:
    """Method and path of every request that a route answers."""
    path = re.sub(r"\{[^}]*\}", "some-id", route.path)
    yield route.method, path
    if route.method == "GET":
        yield "HEAD", path


class TestEveryRoute:
    async def test_refuses_without_a_key_but_health_and_docs(self, tmp_path: Path):
        open_paths = set()
        async with running(tmp_path, **KEYS) as server:
            for route in await routes_of(server):
                for method, path in asked(route):
                    for headers in ({}, bearer(NONE)):
                        reply = await server.request(method, path, headers=headers)
                        if reply.status == 401:
                            assert reply.headers["www-authenticate"] == "Bearer", path
                            assert method == "HEAD" or is_refusal(path, reply)
                        else:
                            open_paths.add(path)
        assert open_paths == {"/", "/docs", "/health", "/health/live", "/health/ready"}
        assert open_paths == OPEN_PATHS

    async def test_is_opened_by_each_key(self, tmp_path: Path):
        async with running(tmp_path, **KEYS, admin_api_key=ADMIN) as server:
            for route in await routes_of(server):
                for method, path in asked(route):
                    for key in (ONE, TWO, ADMIN):
                        reply = await server.request(method, path, headers=bearer(key))
                        is_closed = route.needs_admin and key != ADMIN
                        assert (reply.status == 403) == is_closed, (path, key)
                        assert reply.status != 401, (path, key)

    async def test_unknown_paths_and_methods_are_not_told_without_a_key(self, tmp_path: Path):
        async with running(tmp_path, **KEYS) as server:
            for method, path in [("GET", "/nothing"), ("PUT", "/v1/models"), ("OPTIONS", "/x")]:
                assert_error(await server.request(method, path), 401, "invalid_api_key")

    async def test_open_page_does_not_name_the_models_of_a_server_with_keys(self, tmp_path: Path):
        async with running(tmp_path, **KEYS) as server:
            page = (await server.get("/")).body.decode()
        assert "Models: GET /v1/models with an API key" in page
        assert '"model": "MODEL"' in page

    async def test_open_server_asks_for_none(self, tmp_path: Path):
        async with running(tmp_path) as server:
            assert (await server.get("/v1/models")).status == 200
            assert (await server.get("/v1/models", **bearer(NONE))).status == 200
            assert (await server.post(RELOAD, EMPTY_UPSERT)).status == 200


def is_refusal(path: str, reply: Reply) -> bool:
    """A 401 in the words of the protocol that the path speaks."""
    error = reply.error
    is_right = error["type"] == "authentication_error" and bool(error["message"])
    if path.startswith("/v1/messages"):
        return is_right and set(error) == {"type", "message"} and reply.json()["type"] == "error"
    return is_right and (error["param"], error["code"]) == (None, "invalid_api_key")


class TestSendingAKey:
    async def test_right(self, tmp_path: Path):
        async with running(tmp_path, **KEYS) as server:
            for line in RIGHT:
                assert await status_of(server, line.encode()) == 200, line

    async def test_wrong(self, tmp_path: Path):
        async with running(tmp_path, **KEYS) as server:
            for line in WRONG:
                assert await status_of(server, line) == 401, line[:80]
            assert (await server.get("/v1/models?api_key=sk-one")).status == 401

    async def test_too_long_to_be_looked_at(self, tmp_path: Path):
        async with running(tmp_path, **KEYS) as server:
            assert await status_of(server, b"Authorization: Bearer " + b"x" * 70_000) == 431


async def status_of(server: Running, line: bytes) -> int:
    head = request_bytes("GET", "/v1/models").removesuffix(b"\r\n")
    answer = await server.raw(head + (line + b"\r\n" if line else b"") + b"\r\n")
    return int(answer.split()[1])


class TestComparing:
    """What is compared says nothing by its time: digests, of one length, of every key."""

    def test_every_key_is_compared_whichever_matches(self, tmp_path: Path, monkeypatch):
        keys = [f"sk-{number}" for number in range(9)]
        lines = f"api_key = 'sk-a'\napi_keys = {keys}\nadmin_api_key = 'sk-admin'\n"
        config = infer_config(tmp_path, lines + TABLE)
        compared: list[tuple[str, str]] = []

        def compare_digest(first: str, second: str) -> bool:
            compared.append((first, second))
            return real(first, second)

        real = hmac.compare_digest
        monkeypatch.setattr(access.hmac, "compare_digest", compare_digest)
        wanted = {owner_of(key.encode()) for key in ["sk-a", *keys, "sk-admin"]}
        for key in ("sk-a", "sk-0", "sk-8", "sk-admin", "wrong", "sk-", "x" * 5000, ""):
            compared.clear()
            is_right = owner_of(key.encode()) in wanted
            with nullcontext() if is_right else pytest.raises(ApiError):
                caller_of(config, "/v1/models", ((b"authorization", key.encode()),))
            assert {second for _, second in compared} == wanted
            assert len(compared) == len(wanted) == 11
            assert {len(digest) for pair in compared for digest in pair} == {32}

    def test_owner_is_the_keys_own(self, tmp_path: Path):
        config = infer_config(tmp_path, "api_key = 'a'\napi_keys = ['b']\n" + TABLE)
        owners = [
            caller_of(config, "/v1/models", ((b"authorization", key),)).owner
            for key in (b"a", b"Bearer a", b"b")
        ]
        assert owners == [owner_of(b"a"), owner_of(b"a"), owner_of(b"b")]
        assert owners[0] != owners[2]
        open_config = infer_config(tmp_path, "admin_api_key = 'c'\n" + TABLE)
        assert caller_of(open_config, "/v1/models", ((b"authorization", b"c"),)) == Caller(
            "", has_key=True, is_admin=True
        )


class TestAdminKey:
    async def test_closes_admin_routes_to_clients(self, tmp_path: Path):
        async with running(tmp_path, **KEYS, admin_api_key=ADMIN) as server:
            assert_error(await server.post(RELOAD, EMPTY_UPSERT), 401, "invalid_api_key")
            for key in (ONE, TWO):
                reply = await server.post(RELOAD, {"remove_model_names": ["m"]}, **bearer(key))
                assert_error(reply, 403, "admin_key_required")
                assert reply.error["type"] == "permission_error"
            assert (await server.post(RELOAD, EMPTY_UPSERT, **bearer(ADMIN))).status == 200
            assert (await server.post(RELOAD, EMPTY_UPSERT, x_api_key=ADMIN)).status == 200
            assert (await server.get("/v1/models", **bearer(ADMIN))).status == 200

    async def test_is_wanted_on_a_server_that_is_open_otherwise(self, tmp_path: Path):
        async with running(tmp_path, admin_api_key=ADMIN) as server:
            assert (await server.get("/v1/models")).status == 200
            for headers in ({}, bearer(NONE)):
                reply = await server.post(RELOAD, EMPTY_UPSERT, **headers)
                assert_error(reply, 401, "invalid_api_key")
                assert reply.headers["www-authenticate"] == "Bearer"
            assert (await server.post(RELOAD, EMPTY_UPSERT, **bearer(ADMIN))).status == 200

    async def test_without_one_the_clients_keys_are_the_admins(self, tmp_path: Path):
        async with running(tmp_path, **KEYS) as server:
            assert_error(await server.post(RELOAD, EMPTY_UPSERT), 401, "invalid_api_key")
            for key in (ONE, TWO):
                assert (await server.post(RELOAD, EMPTY_UPSERT, **bearer(key))).status == 200

    async def test_no_spelling_of_a_path_gets_around_it(self, tmp_path: Path):
        body = {"remove_model_names": ["m"], "upsert": [{"model_name": "x"}]}
        async with running(tmp_path, **KEYS, admin_api_key=ADMIN) as server:
            for path in SPELLINGS:
                for headers in ({}, bearer(ONE)):
                    reply = await server.post(path, body, **headers)
                    assert reply.status in (401, 403, 404, 405), path
            assert server.service.last_reload is None


class TestKeysThatChange:
    async def test_hold_from_the_next_request_on(self, tmp_path: Path):
        async with running(tmp_path, **KEYS, admin_api_key=ADMIN) as server:
            replica = server.service.registry.get("m")
            edit(server, ADMIN, "sk-admin-2", by_rename)
            edit(server, ONE, "sk-three", by_rename)
            await eventually(lambda: server.service.config.admin_api_key == "sk-admin-2")
            await eventually(lambda: server.service.config.api_key == "sk-three")
            for key, status in ((ONE, 401), (ADMIN, 401), (TWO, 200), ("sk-three", 200)):
                assert (await server.get("/v1/models", **bearer(key))).status == status, key
            reply = await server.post(RELOAD, EMPTY_UPSERT, **bearer("sk-admin-2"))
            assert reply.status == 200
            assert server.service.registry.get("m").client is replica.client

    async def test_first_key_closes_an_open_server_and_none_opens_it(self, tmp_path: Path):
        async with running(tmp_path) as server:
            text = server.config_file.read_text()
            assert (await server.get("/v1/models")).status == 200
            by_rename(server.config_file, f'api_keys = ["{TWO}"]\n{text}')
            await eventually(lambda: server.service.config.api_keys == (TWO,))
            assert (await server.get("/v1/models")).status == 401
            by_rename(server.config_file, text)
            await eventually(lambda: server.service.config.api_keys == ())
            assert (await server.get("/v1/models")).status == 200

    async def test_answers_that_run_go_on(self, tmp_path: Path):
        async with running(tmp_path, api_key=ONE) as server:
            server.runner.gate.clear()  # no token comes before it is set
            reader, writer = await server.open()
            body = {"model": "m", "prompt": "a", "max_tokens": 5, "stream": True}
            writer.write(request_bytes("POST", "/v1/completions", body, bearer(ONE)))
            assert b" 200 " in await reader.readline()
            edit(server, ONE, TWO, by_rename)
            await eventually(lambda: server.service.config.api_key == TWO)
            assert (await server.get("/v1/models", **bearer(ONE))).status == 401
            server.runner.gate.set()
            rest = await reader.read()
            writer.close()
        assert b"data: [DONE]" in rest
        assert b'"finish_reason":"length"' in rest
