"""What clients put into headers and ids does not come back as a header of its own."""

from __future__ import annotations

import pytest

from tests.api.harness import Reply, parse_reply, request_bytes
from tests.end_to_end.hostile import PROTOCOLS
from tests.end_to_end.process import ServerProcess, completion

LINES = ("a\r\nx-evil: 1", "a\nx-evil: 1", "a\r\n\r\n<html>", "a\r x-evil: 1", "a\0b")
ODD = ("ä", "a b", "\u2028", "'; DROP TABLE", "a" * 129, "a" * 10_000, "")


def ask_with_id(server: ServerProcess, given: bytes) -> Reply:
    sent = request_bytes("GET", "/version").replace(
        b"Host: test", b"Host: t\r\nX-Request-Id: " + given
    )
    return parse_reply(server.raw(sent))


def test_safe_request_id_comes_back(server: ServerProcess):
    for given in ("req-1", "a" * 128, "A:b.c_d/e=~"):
        assert ask_with_id(server, given.encode()).headers["x-request-id"] == given


def test_other_request_ids_are_replaced(server: ServerProcess):
    for given in ODD:
        told = ask_with_id(server, given.encode()).headers["x-request-id"]
        assert len(told) == 32, (given, told)
        assert told.isalnum()


@pytest.mark.parametrize("protocol", PROTOCOLS.values(), ids=PROTOCOLS)
def test_no_field_of_a_body_becomes_a_header(server: ServerProcess, protocol):
    names = {"date", "content-type", "content-length", "x-request-id", "request-id", "connection"}
    for bad in (*LINES, *ODD):
        fields = [{"model": bad}, {"request_id": bad}, {"cache_salt": bad}, {"initial_state": bad}]
        for field in fields:
            reply = server.request("POST", protocol.path, {"model": "m"} | field)
            assert reply.status in (400, 404)
            assert reply.headers.keys() <= names | SECURITY
            assert all(value.isascii() and value.isprintable() for value in reply.headers.values())


def test_no_path_or_query_becomes_a_header(server: ServerProcess):
    for path in ("%0d%0ax-evil:%201", "%00", "%ff%fe", "..%2f..%2fetc%2fpasswd", "%u2028", "%"):
        for url in (
            f"/{path}",
            f"/v1/models/{path}",
            f"/v1/states/{path}",
            f"/v1/states?after={path}",
        ):
            reply = server.request("GET", url)
            assert reply.status in (400, 404), (url, reply)
            assert "x-evil" not in reply.headers
            assert reply.error["message"]
            reply = server.request("GET", f"/v1/states/{path}/export")
            assert reply.status == 404


def test_origin_and_asked_headers_come_back_as_one_header_or_not_at_all(server: ServerProcess):
    for given in ("x-a, x-b", "x" * 5000):
        sent = {"origin": "http://a", "access-control-request-method": "POST"}
        sent |= {"access-control-request-headers": given}
        reply = server.request("OPTIONS", "/v1/completions", None, **sent)
        assert reply.status == 204
        assert "x-evil" not in reply.headers


SECURITY = {"x-content-type-options"}


@pytest.mark.parametrize("is_stream", [True, False])
def test_every_answer_says_what_it_is_and_not_who_answers(server: ServerProcess, is_stream: bool):
    replies = [
        server.request("POST", "/v1/completions", completion("x", 2, stream=is_stream)),
        server.request("POST", "/v1/completions", {}),
        server.request("GET", "/docs"),
        server.request("GET", "/nowhere"),
        parse_reply(server.raw(b"nonsense\r\n\r\n")),
    ]
    for reply in replies:
        assert reply.headers["x-content-type-options"] == "nosniff", reply
        assert "server" not in reply.headers
    if is_stream:
        assert replies[0].headers["content-type"].startswith("text/event-stream")
        assert replies[0].headers["cache-control"] == "no-cache"
        assert replies[0].headers["x-accel-buffering"] == "no"
