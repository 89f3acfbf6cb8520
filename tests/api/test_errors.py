"""Every way to ask wrongly has one shape of answer, names the field, and leaks nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.api.harness import Reply, chat_body, request_bytes, running


def assert_error(reply: Reply, status: int, code: str, param: str | None = None) -> None:
    assert reply.status == status, reply.body
    assert reply.headers["content-type"] == "application/json"
    assert reply.headers["x-request-id"]
    assert set(reply.json()) == {"error"}
    assert set(reply.error) == {"message", "type", "param", "code"}
    assert (reply.error["code"], reply.error["param"]) == (code, param)
    assert reply.error["message"]


async def test_paths_and_methods(tmp_path: Path):
    async with running(tmp_path) as server:
        assert_error(await server.get("/v1/nothing"), 404, "unknown_url")
        wrong = await server.get("/v1/chat/completions")
        assert_error(wrong, 405, "method_not_allowed")
        assert wrong.headers["allow"] == "POST, OPTIONS"
        deleted = await server.request("DELETE", "/v1/models/m")
        assert_error(deleted, 405, "method_not_allowed")
        assert deleted.headers["allow"] == "GET, HEAD, OPTIONS"
        patched = await server.request("PATCH", "/health")
        assert_error(patched, 405, "method_not_allowed")


async def test_unknown_http_is_json_too(tmp_path: Path):
    async with running(tmp_path) as server:
        answer = await server.raw(b"GET / HTTP/1.1\r\nbad header\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 400 Bad Request\r\n")
    assert b'"code":"invalid_http"' in answer


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"{", "invalid_json"),
        (b"", "invalid_json"),
        (b"[]", "invalid_json"),
        (b'{"messages": NaN}', "invalid_json"),
        (b'{"model": "\xff"}', "invalid_json"),
        (b'{"model": "\\ud800"}', "invalid_json"),
        (b'{"a":' * 3000 + b"1" + b"}" * 3000, "invalid_json"),
    ],
)
async def test_bodies_that_are_not_json_objects(tmp_path: Path, body: bytes, code: str):
    async with running(tmp_path) as server:
        assert_error(await server.post("/v1/chat/completions", body), 400, code)


async def test_content_type_must_be_json(tmp_path: Path):
    async with running(tmp_path) as server:
        form = await server.post(
            "/v1/completions", b"x", content_type="application/x-www-form-urlencoded"
        )
        charset = await server.post(
            "/v1/chat/completions", chat_body(), content_type="Application/JSON; charset=utf-8"
        )
    assert_error(form, 415, "unsupported_media_type")
    assert charset.status == 200


async def test_model_must_be_named_and_known(tmp_path: Path):
    async with running(tmp_path) as server:
        for missing in (None, "", " "):
            reply = await server.chat(model=missing)
            assert_error(reply, 400, "invalid_value", "model")
            assert "available models: m" in reply.error["message"]
        unknown = await server.chat(model="gpt-4")
        assert_error(unknown, 404, "model_not_found", "model")
        assert "available models: m" in unknown.error["message"]
        assert_error(await server.get("/v1/models/no/such"), 404, "model_not_found", "model")


async def test_crash_in_a_handler_is_500_without_details(tmp_path: Path, monkeypatch, caplog):
    def crash(*_: object, **__: object) -> None:
        raise RuntimeError("secret path /root/x")

    monkeypatch.setattr("api.routes.chat.chat_prompt", crash)
    async with running(tmp_path) as server:
        reply = await server.chat()
    assert_error(reply, 500, "internal_error")
    assert "secret" not in reply.body.decode()
    assert "secret path" in caplog.text


async def test_request_id_is_taken_over_or_made(tmp_path: Path):
    async with running(tmp_path) as server:
        given = await server.get("/health", x_request_id="abc-1")
        injected = await server.get("/health", x_request_id="a b\tc")
        first, second = await server.get("/health"), await server.get("/nothing")
    assert given.headers["x-request-id"] == "abc-1"
    assert injected.headers["x-request-id"] != "a b\tc"
    assert first.headers["x-request-id"] != second.headers["x-request-id"]


async def test_log_has_a_line_per_request_and_none_per_probe(tmp_path: Path, caplog):
    caplog.set_level("INFO", "api.access")
    async with running(tmp_path) as server:
        await server.chat()
        await server.get("/a%0ab")
        await server.get("/health")
    lines = [record.getMessage() for record in caplog.records if record.name == "api.access"]
    assert len(lines) == 2
    assert lines[0].startswith("POST /v1/chat/completions 200 ")
    assert lines[1].startswith("GET /a%0ab 404 ")


class TestApiKey:
    async def test_key_is_asked_for_except_by_probes(self, tmp_path: Path):
        async with running(tmp_path, api_key="sk-1") as server:
            for path in ("/", "/health", "/health/live", "/health/ready", "/docs"):
                assert (await server.get(path)).status == 200, path
            missing = await server.get("/v1/models")
            assert_error(missing, 401, "invalid_api_key")
            assert missing.headers["www-authenticate"] == "Bearer"
            assert missing.error["type"] == "authentication_error"
            for wrong in ("Bearer sk-2", "Bearer", "sk-", "Basic sk-1", "Bearer sk-1 x"):
                reply = await server.get("/v1/models", authorization=wrong)
                assert_error(reply, 401, "invalid_api_key")
            for right in ("Bearer sk-1", "bearer sk-1", "sk-1", "Bearer  sk-1"):
                assert (await server.get("/v1/models", authorization=right)).status == 200
            assert (await server.get("/nothing")).status == 401

    async def test_wrong_key_is_refused_before_the_body_is_read(self, tmp_path: Path):
        async with running(tmp_path, api_key="sk-1") as server:
            head = b"POST /v1/completions HTTP/1.1\r\nHost: t\r\nContent-Length: 1000000\r\n\r\n"
            reader, writer = await server.open()
            writer.write(head)
            answer = await reader.readuntil(b"\r\n\r\n")
            writer.close()
        assert b" 401 " in answer


class TestCors:
    async def test_any_origin_by_default(self, tmp_path: Path):
        async with running(tmp_path) as server:
            ok = await server.get("/v1/models", origin="https://a.example")
            error = await server.get("/nothing", origin="https://a.example")
            plain = await server.get("/v1/models")
        assert ok.headers["access-control-allow-origin"] == "*"
        assert error.headers["access-control-allow-origin"] == "*"
        assert "access-control-allow-origin" not in plain.headers

    async def test_only_listed_origins(self, tmp_path: Path):
        keys = {"allowed_origins": ["https://a.example"], "api_key": "k"}
        async with running(tmp_path, **keys) as server:
            listed = await server.get("/v1/models", origin="https://a.example")
            foreign = await server.get("/v1/models", origin="https://b.example")
        assert listed.status == 401
        assert listed.headers["access-control-allow-origin"] == "https://a.example"
        assert listed.headers["vary"] == "origin"
        assert "access-control-allow-origin" not in foreign.headers

    async def test_preflight_needs_no_key_and_allows_what_is_asked(self, tmp_path: Path):
        keys = {"allowed_origins": ["https://a.example"], "api_key": "k"}
        ask = {"access_control_request_method": "POST"}
        async with running(tmp_path, **keys) as server:
            listed = await server.request(
                "OPTIONS",
                "/v1/chat/completions",
                headers={
                    "origin": "https://a.example",
                    "access_control_request_headers": "authorization, x-stainless-os",
                    **ask,
                },
            )
            foreign = await server.request(
                "OPTIONS", "/v1/models", headers={"origin": "https://b.example", **ask}
            )
        assert listed.status == 204
        assert "POST" in listed.headers["access-control-allow-methods"]
        assert listed.headers["access-control-allow-headers"] == "authorization, x-stainless-os"
        assert foreign.status == 204
        assert "access-control-allow-origin" not in foreign.headers


class TestBodyLimit:
    LIMIT = 1000

    async def test_declared_too_large_is_413_before_any_body(self, tmp_path: Path):
        async with running(tmp_path, request_body_limit_bytes=self.LIMIT) as server:
            reply = await server.post("/v1/completions", b"x" * (self.LIMIT + 1))
            head = b"POST /v1/completions HTTP/1.1\r\nHost: t\r\nContent-Length: 99999999\r\n\r\n"
            reader, writer = await server.open()
            writer.write(head)
            answer = await reader.readuntil(b"\r\n\r\n")
            writer.close()
        assert_error(reply, 413, "request_too_large")
        assert "request_body_limit_bytes = 1000" in reply.error["message"]
        assert reply.headers["connection"] == "close"
        assert b" 413 " in answer

    async def test_chunked_too_large_is_413(self, tmp_path: Path):
        head = b"POST /v1/completions HTTP/1.1\r\nHost: t\r\nTransfer-Encoding: chunked\r\n\r\n"
        chunk = b"%x\r\n%b\r\n" % (400, b"x" * 400)
        async with running(tmp_path, request_body_limit_bytes=self.LIMIT) as server:
            answer = await server.raw(head + chunk * 5)
            memory_hog = await server.raw(head + chunk * 20_000)
        for data in (answer, memory_hog):
            assert data.startswith(b"HTTP/1.1 413 ")
            assert b"request_too_large" in data

    async def test_exactly_the_limit_is_read(self, tmp_path: Path):
        body = b'{"model": "m", "prompt": "hi", "max_tokens": 1}'.ljust(self.LIMIT)
        chunked = b"".join(b"1\r\n%c\r\n" % byte for byte in body) + b"0\r\n\r\n"
        head = (
            b"POST /v1/completions HTTP/1.1\r\nHost: t\r\nConnection: close\r\n"
            b"Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
        )
        async with running(tmp_path, request_body_limit_bytes=self.LIMIT) as server:
            declared = await server.post("/v1/completions", body)
            dripped = await server.raw(head + chunked)
        assert declared.status == 200
        assert dripped.startswith(b"HTTP/1.1 200 ")

    async def test_expect_continue_is_answered_only_where_the_body_is_wanted(self, tmp_path: Path):
        sent = request_bytes("POST", "/v1/chat/completions", chat_body())
        head, _, body = sent.partition(b"\r\n\r\n")
        head += b"\r\nExpect: 100-continue\r\n\r\n"
        async with running(tmp_path, request_body_limit_bytes=self.LIMIT) as server:
            reader, writer = await server.open()
            writer.write(head)
            assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
            writer.write(body)
            assert (await reader.readuntil(b"\r\n")).startswith(b"HTTP/1.1 200")
            writer.close()
            big = head.replace(b"Content-Length: %d" % len(body), b"Content-Length: 5000")
            reader, writer = await server.open()
            writer.write(big)
            assert (await reader.readuntil(b"\r\n")).startswith(b"HTTP/1.1 413")
            writer.close()
