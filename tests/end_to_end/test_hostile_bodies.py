"""Bodies that are too large, too deep or no JSON, on every route that reads one."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest

from tests.api.harness import Reply, parse_reply, request_bytes
from tests.end_to_end.hostile import PROTOCOLS, unharmed
from tests.end_to_end.process import Poller, read_all
from tests.end_to_end.site import MODEL, Server, Site

MIB = 1024 * 1024
JSON_ROUTES = (
    *(protocol.path for protocol in PROTOCOLS.values()),
    "/v1/chat/completions/render",
    "/v1/messages/count_tokens",
    "/v1/completions/score",
    "/v1/embeddings",
    "/v1/states",
    "/tokenize",
    "/detokenize",
    "/abort_requests",
    "/admin/models/reload",
)
EACH_ROUTE = pytest.mark.parametrize("path", JSON_ROUTES)


def mostly_slow(paths: Sequence[str], *quick: str) -> pytest.MarkDecorator:
    """All of them, but by default only those that are `quick`."""
    slow = pytest.mark.slow
    return pytest.mark.parametrize(
        "path", [path if path in quick else pytest.param(path, marks=slow) for path in paths]
    )


GENERATION_ROUTES = tuple(protocol.path for protocol in PROTOCOLS.values())
FIELD = b'{"model": "rwkv-lm-tiny", "%b": %b}'
INVALID_JSON = {
    "empty": b"",
    "NaN": FIELD % (b"temperature", b"NaN"),
    "Infinity": FIELD % (b"temperature", b"-Infinity"),
    "1e400": FIELD % (b"temperature", b"1e400"),
    "lone surrogate": FIELD % (b"prompt", rb'"\ud800"'),
    "surrogates the wrong way round": FIELD % (b"prompt", rb'"\udc00\ud800"'),
    "invalid UTF-8": FIELD % (b"prompt", b'"\xff\xfe"'),
    "overlong UTF-8": FIELD % (b"prompt", b'"\xc0\x80"'),
    "UTF-16": '{"model": "rwkv-lm-tiny"}'.encode("utf-16"),
    "byte order mark": b"\xef\xbb\xbf{}",
    "raw NUL": FIELD % (b"prompt", b'"a\x00b"'),
    "two values": b"{} {}",
    "cut": b'{"model": "rwkv-lm-ti',
    "deep": b"[" * 100_000,
    "deep object": b'{"a":' * 100_000,
    "deep and closed": FIELD % (b"prompt", b"[" * 100_000 + b"]" * 100_000),
    "array": b"[]",
    "string": b'"x"',
    "null": b"null",
    "number": b"1",
}
SLOWEST_S = 5.0  # for who waits meanwhile; a body of any kind once took half a minute


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    model = {"max_context_len": 2048, "host_state_mib": 8}
    with Site(tmp_path_factory.mktemp("bodies"), model=model).serving() as running:
        yield running


def post(server: Server, path: str, body: object, **headers: str) -> Reply:
    return server.process.request("POST", path, body, **headers)


def message_of(reply: Reply) -> str:
    return str(reply.error["message"])


@contextmanager
def others_served(server: Server) -> Iterator[None]:
    """Another client is answered in good time, again and again."""
    times_s: list[float] = []
    is_over = threading.Event()

    def ask() -> None:
        with Poller(server.process) as poller:
            while not is_over.is_set():
                started_s = time.monotonic()
                poller.model()
                times_s.append(time.monotonic() - started_s)
                is_over.wait(0.01)

    other = threading.Thread(target=ask)
    other.start()
    try:
        yield
    finally:
        is_over.set()
        other.join()
    assert len(times_s) >= 2
    assert max(times_s) < SLOWEST_S, f"another client waited for {max(times_s):.1f} s"


@EACH_ROUTE
def test_what_is_no_json_object_is_400(server: Server, path: str):
    for name, body in INVALID_JSON.items():
        reply = post(server, path, body)
        assert reply.status == 400, (name, reply)
        assert message_of(reply), name


@EACH_ROUTE
def test_other_content_types_are_415(server: Server, path: str):
    for kind in ("text/plain", "application/x-www-form-urlencoded", "application/jsonx", ""):
        assert post(server, path, b"{}", content_type=kind).status == 415


@mostly_slow(JSON_ROUTES, "/v1/chat/completions")
def test_more_values_than_anybody_needs_are_413_and_others_are_served(server: Server, path: str):
    """Ten megabytes of each kind; parsed, they would be hundreds."""
    with others_served(server):
        for item in ("1", "[]", '{"a":[]}', '"a"'):
            items = ",".join([item] * (10 * MIB // (len(item) + 1)))
            reply = post(server, path, b'{"model":"rwkv-lm-tiny","extra":[%b]}' % items.encode())
            assert reply.status == 413, (item, reply)


def test_bad_bodies_leave_nothing_behind(server: Server):
    with unharmed(server):
        for protocol in PROTOCOLS.values():
            for body in INVALID_JSON.values():
                post(server, protocol.path, body)


@pytest.mark.parametrize("protocol", PROTOCOLS.values(), ids=PROTOCOLS)
def test_odd_texts_are_texts(server: Server, protocol):
    """NUL, other control characters, the last of Unicode, unpaired marks: all of it is read."""
    with unharmed(server):
        for text in ("a\0b", "\x01\x1b[2J\x7f", "\U0010ffff", "\ufeff", "\u202e\u0301", "\r\n\r"):
            assert post(server, protocol.path, protocol.body(text, 1)).status == 200, repr(text)


@mostly_slow(["/tokenize", *GENERATION_ROUTES], "/v1/chat/completions")
def test_words_of_megabytes_are_refused_in_time(server: Server, path: str):
    protocol = next((one for one in PROTOCOLS.values() if one.path == path), None)
    with unharmed(server), others_served(server):
        for text in ("a" * MIB, "\U0001f600" * (MIB // 4), "\n" * (4 * MIB), "\n x" * MIB):
            body = protocol.body(text, 1) if protocol else {"prompt": text}
            reply = post(server, path, body)
            assert reply.status in (200, 400), reply
            if reply.status == 400:
                assert "max_context_len" in message_of(reply)


def test_huge_and_odd_numbers_are_400(server: Server):
    for field in ("seed", "max_tokens", "top_k", "n", "temperature", "priority", "timeout_ms"):
        for number in (b"9" * 5000, b"-" + b"9" * 5000, b"1e308", b"1.5", b'"1"', b"true"):
            if (field, number) == ("temperature", b"1.5"):
                continue
            body = b'{"model": "rwkv-lm-tiny", "prompt": "x", "%b": %b}' % (field.encode(), number)
            reply = post(server, "/v1/completions", body)
            assert reply.status == 400, (number[:20], reply)
            is_json = len(number) < 310
            assert reply.error["param"] == (field if is_json else None), (number[:20], reply)


def test_of_fields_that_come_twice_the_last_counts(server: Server):
    body = b'{"model": "no", "model": "rwkv-lm-tiny", "prompt": "x", "max_tokens": 1}'
    assert post(server, "/v1/completions", body).status == 200


def test_long_names_and_lists_are_refused_in_time(server: Server):
    long = "a" * (2 * MIB)
    ask = {"model": MODEL, "prompt": "x", "max_tokens": 1}
    bodies: list[tuple[str, dict[str, object]]] = [
        ("/v1/completions", ask | {"model": long}),
        ("/v1/completions", ask | {"initial_state": long}),
        ("/v1/completions", ask | {"state": long}),
        ("/v1/completions", ask | {"request_id": long}),
        ("/v1/completions", ask | {"suffix": long}),
        ("/v1/completions", ask | {"stop": ["a"] * 100_000}),
        ("/v1/completions", ask | {"stop": [long]}),
        ("/v1/completions", ask | {"bad_words": [long]}),
        ("/v1/completions", ask | {"logit_bias": {str(i): 1 for i in range(300_000)}}),
        ("/v1/completions", ask | {"logit_bias": {long: 1}}),
        ("/v1/completions", ask | {"allowed_token_ids": [1] * 300_000}),
        ("/v1/completions", ask | {"stop_token_ids": [1] * 100_000}),
        ("/v1/completions", ask | {"prompt": ["x"] * 100_000}),
        ("/v1/completions", ask | {"n": 128, "prompt": ["x"] * 2000}),
        ("/v1/chat/completions", {"model": MODEL, "messages": [{"role": long, "content": "x"}]}),
        ("/v1/chat/completions", {"model": MODEL, "messages": [{"role": "user"}] * 100_000}),
        ("/v1/responses", {"model": MODEL, "input": "x", "previous_response_id": long}),
        ("/v1/states", {"model": MODEL, "prompt": "x", "label": long}),
        ("/tokenize", {long: 1}),
    ]
    with unharmed(server), others_served(server):
        for path, body in bodies:
            reply = post(server, path, body)
            assert reply.status in (400, 404), (path, reply)
            assert len(reply.body) < 10_000, "an error does not repeat what it refuses"


def nested(depth: int) -> dict[str, object]:
    schema: dict[str, object] = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
    return schema


def chain(kind: str) -> dict[str, object]:
    """Each definition names the next one twice: as many as 2 to the 30th if written out."""
    steps = {f"d{i}": {kind: [{"$ref": f"#/$defs/d{i + 1}"}] * 2} for i in range(30)}
    return {"$ref": "#/$defs/d0", "$defs": steps | {"d30": {"type": "string"}}}


SCHEMAS: dict[str, object] = {
    "deep": nested(100),
    "refers to itself": {"$ref": "#"},
    "recursive": {"type": "object", "properties": {"a": {"$ref": "#"}}},
    "allOf": chain("allOf"),
    "anyOf": chain("anyOf"),
    "product": {"allOf": [{"anyOf": [{"const": f"{i}{j}"} for j in range(10)]} for i in range(8)]},
    "wide": {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(2000)}},
    "long enum": {"enum": [f"v{i}" for i in range(10_000)]},
    "huge": {"enum": ["v" * 300_000]},
    "counts": {"type": "string", "minLength": 10**6, "maxLength": 10**9},
    "arrays": {"type": "array", "minItems": 10**6, "items": {"type": "array", "minItems": 10**6}},
    "multiple": {"type": "integer", "multipleOf": 10**9 + 7},
    "pattern": {"type": "string", "pattern": "(a|b)*a(a|b){1000}"},
}
REGEXES = {
    "stars": "(a*)*b",
    "states": "(a|b)*a(a|b){1000}",
    "counts": "((((a{1,100}){1,100}){1,100}){1,100})",
    "optional": "(?:a?){3000}a{3000}",
    "letters": r"\p{L}{1000}",
    "deep": "(" * 2000 + "a" + ")" * 2000,
    "many": "|".join(f"w{i}" for i in range(10_000)),
}
LARKS = {
    "deep": "start: " + "(" * 50_000 + '"a"' + ")" * 50_000,
    "doubling": "start: r0\n"
    + "\n".join(f"r{i}: r{i + 1} r{i + 1}" for i in range(30))
    + '\nr30: "a"',
    "ambiguous": 'start: s\ns: s s s | s s | /[a-z]+/ | /./ | ""',
    "left": 'start: start start | "a" | ""',
}


def test_grammar_bombs_are_refused_or_followed_and_others_are_served(server: Server):
    ask = {"model": MODEL, "prompt": "x", "max_tokens": 3}
    fields = [
        *({"guided_json": schema} for schema in SCHEMAS.values()),
        *({"guided_regex": regex} for regex in REGEXES.values()),
        *({"guided_grammar": lark} for lark in LARKS.values()),
    ]
    with unharmed(server), others_served(server):
        for field in fields:
            reply = post(server, "/v1/completions", ask | field)
            assert reply.status in (200, 400, 500), reply
            if reply.status == 500:  # the library met its limits while it went on
                assert "grammar" in message_of(reply)
        for schema in SCHEMAS.values():
            function = {"name": "f", "parameters": {"type": "object", "properties": {"a": schema}}}
            body = PROTOCOLS["chat"].body(
                "x", 3, tools=[{"type": "function", "function": function}]
            )
            assert post(server, "/v1/chat/completions", body).status in (200, 400)


def test_many_long_grammars_do_not_fill_memory(server: Server):
    """Each takes some 50 MB while it is in use."""
    ask = {"model": MODEL, "prompt": "x", "max_tokens": 1}
    sizes_mib = []
    for number in range(12):
        word = chr(ord("a") + number) * 150_000
        assert post(server, "/v1/completions", ask | {"guided_choice": [word]}).status == 200
        sizes_mib.append(server.process.rss_mib())
    assert max(sizes_mib[6:]) < sizes_mib[5] + 60, sizes_mib


def test_state_files_that_are_none_are_400(server: Server):
    kept = server.state(model=MODEL, prompt="Once upon a time")
    data = server.ask("GET", f"/v1/states/{kept['id']}/export").body
    size = int.from_bytes(data[:8], "little")
    broken = {
        "empty": b"",
        "short": data[:-1],
        "longer": data + b"\0",
        "zeros": bytes(len(data)),
        "huge header": (2**63).to_bytes(8, "little") + data[8:],
        "deep header": size.to_bytes(8, "little") + (b"[" * size) + data[8 + size :],
        "other bits": data[:-100] + bytes(byte ^ 255 for byte in data[-100:]),
        "JSON": b'{"model": "rwkv-lm-tiny"}',
        "no tensors": (2).to_bytes(8, "little") + b"{}",
    }
    kind = "application/octet-stream"
    with unharmed(server):
        for name, sent in broken.items():
            reply = post(server, "/v1/states/import", sent, content_type=kind)
            assert reply.status == 400, (name, reply)
        assert post(server, "/v1/states/import", data, content_type=kind).status == 200


@mostly_slow([*GENERATION_ROUTES, "/v1/states/import"], "/v1/messages", "/v1/states/import")
@pytest.mark.parametrize("is_chunked", [False, True])
def test_100_mb_are_413_and_memory_is_flat(server: Server, path: str, is_chunked: bool):
    """Sent by a client that does not look before the end; the answer is there all the same."""
    length = "Transfer-Encoding: chunked" if is_chunked else f"Content-Length: {100 * MIB}"
    head = f"POST {path} HTTP/1.1\r\nHost: t\r\nContent-Type: application/json\r\n{length}\r\n\r\n"
    part = b" " * MIB
    piece = b"%x\r\n%b\r\n" % (len(part), part) if is_chunked else part
    post(server, "/tokenize", {"prompt": "x"})
    before_mib = server.process.rss_mib()
    with server.process.connect() as sock:
        sock.sendall(head.encode())
        try:
            for _ in range(100):
                sock.sendall(piece)
            answer = read_all(sock)
        except (ConnectionResetError, BrokenPipeError):
            answer = b""  # it was cut off, as documented, a second after the answer
    if answer:
        assert parse_reply(answer).status == 413
    assert server.process.rss_mib() < before_mib + 80, "of 100 MB not even the limit of 50 is kept"


@mostly_slow(JSON_ROUTES, "/v1/embeddings")
def test_413_is_told_before_the_body_is_sent(server: Server, path: str):
    sent = request_bytes("POST", path, {}).replace(
        b"Content-Length: 2", b"Content-Length: 99999999"
    )
    with server.process.connect() as sock:
        sock.sendall(sent.removesuffix(b"{}"))
        reply = parse_reply(read_all(sock))
    error = json.loads(reply.body)["error"]
    assert (reply.status, reply.headers["connection"]) == (413, "close"), error
