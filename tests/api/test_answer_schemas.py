"""What the server answers has exactly the fields that the OpenAPI document says."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from jsonschema import Draft202012Validator, ValidationError

from api.openapi.document import openapi_document
from api.tool_text import ToolCall, call_text
from tests.api.harness import Running, chat_body, model_table, running

DOCUMENT = openapi_document("0")
STATE = {"return_state": {"label": "x"}}
TEXT = {"model": "m", "prompt": "hi", "max_tokens": 6}
MESSAGES = {"model": "m", "max_tokens": 5, "messages": [{"role": "user", "content": "hi"}]}
IDS = {"return_token_ids": True}
USAGE = {"stream": True, "stream_options": {"include_usage": True}}

# (method, path, body); {state} is the id of a state
REQUESTS: list[tuple[str, str, object]] = [
    ("POST", "/v1/chat/completions", chat_body()),
    ("POST", "/v1/chat/completions", chat_body(n=2, seed=1)),
    ("POST", "/v1/chat/completions", chat_body(**STATE)),
    ("POST", "/v1/chat/completions", chat_body(state="{state}")),
    ("POST", "/v1/chat/completions", chat_body(**USAGE)),
    ("POST", "/v1/chat/completions", chat_body(**USAGE, **STATE)),
    ("POST", "/v1/chat/completions", chat_body(stream=True, n=2)),
    ("POST", "/v1/completions", TEXT),
    ("POST", "/v1/completions", TEXT | {"stop": ["o"], "max_tokens": 50}),
    ("POST", "/v1/completions", TEXT | {"best_of": 3}),
    ("POST", "/v1/completions", TEXT | STATE),
    ("POST", "/v1/completions", TEXT | USAGE | STATE),
    ("POST", "/v1/completions", TEXT | {"stop": ["o"], "max_tokens": 50, "stream": True}),
    ("POST", "/v1/chat/completions", chat_body(logprobs=True, top_logprobs=2)),
    ("POST", "/v1/chat/completions", chat_body(logprobs=True, top_logprobs=2, **IDS, **USAGE)),
    ("POST", "/v1/chat/completions", chat_body(**IDS)),
    ("POST", "/v1/completions", TEXT | IDS | {"echo": True, "logprobs": 2}),
    ("POST", "/v1/completions", TEXT | IDS | {"echo": True, "logprobs": 2, "stream": True}),
    ("POST", "/v1/completions", TEXT | {"prompt": ["a", "b"], "n": 2, "stream": True} | IDS),
    ("POST", "/v1/completions/render", TEXT | {"prompt": ["a", [1, 2]], "logprobs": 1, "n": 2}),
    ("POST", "/v1/responses", {"model": "m", "input": "hi"}),
    (
        "POST",
        "/v1/responses",
        {"model": "m", "input": "hi", "store": False, "metadata": {"a": "b"}},
    ),
    ("POST", "/v1/responses", {"model": "m", "input": "hi", "max_output_tokens": 3}),
    ("POST", "/v1/responses", {"model": "m", "input": "hi", "stream": True}),
    ("POST", "/v1/responses", {"model": "m", "input": "hi", "background": True}),
    ("GET", "/v1/responses/{response}", None),
    ("GET", "/v1/responses/{response}/input_items", None),
    ("DELETE", "/v1/responses/{response}", None),
    ("POST", "/v1/messages", MESSAGES),
    ("POST", "/v1/messages", MESSAGES | {"stream": True}),
    ("POST", "/v1/messages", MESSAGES | {"stop_sequences": ["o"], "max_tokens": 50}),
    ("POST", "/v1/messages/count_tokens", MESSAGES),
    ("POST", "/v1/chat/completions/render", chat_body()),
    ("POST", "/v1/completions/render", TEXT | {"state": "{state}"}),
    ("POST", "/v1/completions/score", {"model": "m", "prompt": "hi", "choices": ["a", "bc"]}),
    ("POST", "/v1/completions/score", {"model": "m", "state": "{state}", "choices": ["a", "bc"]}),
    ("POST", "/v1/embeddings", {"model": "m", "input": ["a", "b"]}),
    ("POST", "/v1/embeddings", {"model": "m", "input": "a", "encoding_format": "base64"}),
    ("POST", "/tokenize", {"prompt": "hi", "return_token_strs": True}),
    ("POST", "/v1/tokenize", {"prompt": "hi"}),
    ("POST", "/detokenize", {"tokens": [5]}),
    ("GET", "/tokenizer_info", None),
    ("POST", "/abort_requests", {"request_ids": ["a"]}),
    ("POST", "/abort_request", {"abort_all": True}),
    ("POST", "/v1/states", {"prompt": "hi"}),
    ("GET", "/v1/states", None),
    ("GET", "/v1/states/{state}", None),
    ("PATCH", "/v1/states/{state}", {"pinned": True}),
    ("POST", "/v1/states/{state}/fork", {"ttl_s": 0}),
    ("DELETE", "/v1/states/{state}", None),
    ("GET", "/v1/models", None),
    ("GET", "/v1/models/m", None),
    ("POST", "/admin/models/reload", {"dry_run": True}),
    ("POST", "/admin/models/reload", {}),
    ("GET", "/health", None),
    ("GET", "/health/live", None),
    ("GET", "/health/ready", None),
    ("GET", "/version", None),
    ("GET", "/openapi.json", None),
]


def described(method: str, path: str, content_type: str) -> dict[str, object]:
    """The schema of a 200 of a path, as a document of its own."""
    for pattern, methods in DOCUMENT["paths"].items():
        parts, given = pattern.split("/"), path.split("/")
        fits = all(one == other or one.startswith("{") for one, other in zip(parts, given))  # noqa: B905
        if len(parts) == len(given) and fits and method.lower() in methods:
            content = methods[method.lower()]["responses"]["200"]["content"]
            return {"components": DOCUMENT["components"], **content[content_type]["schema"]}
    raise AssertionError(f"{method} {path} is not in the document")


def validate(schema: dict[str, object], found: object) -> None:
    Draft202012Validator(schema).validate(found)


def events_of(schema: dict, body: bytes) -> Iterator[tuple[dict, object]]:
    """Each event of a stream but the last, with the schema of its data."""
    data = schema["properties"]["data"]["anyOf"][1]["contentSchema"]["anyOf"][0]
    of_data = {"components": DOCUMENT["components"], **data}
    for line in body.decode().splitlines():
        if line.startswith("data: ") and line != "data: [DONE]":
            yield of_data, json.loads(line[6:])


async def state_of(server: Running) -> str:
    state: str = (await server.post("/v1/states", {"prompt": "some text"})).json()["id"]
    return state


@pytest.mark.parametrize(("method", "path", "body"), REQUESTS)
async def test_it_fits(tmp_path: Path, method: str, path: str, body: object):
    async with running(tmp_path, model_table(max_context_len=3, context_policy="report")) as server:
        state = await state_of(server)
        if isinstance(body, dict) and "state" in body:
            body = body | {"state": state}
        response = (await server.post("/v1/responses", {"model": "m", "input": "hi"})).json()["id"]
        path = path.replace("{state}", state).replace("{response}", response)
        reply = await server.request(method, path, body)
        if path == "/v1/models/m":
            assert reply.json()["max_model_len"] == 3
    assert reply.status == 200, reply.body
    content_type = reply.headers["content-type"].partition(";")[0]
    schema = described(method, path, content_type)
    if content_type != "text/event-stream":
        validate(schema, reply.json())
        return
    events = list(events_of(schema, reply.body))
    assert events
    for of_data, event in events:
        validate(of_data, event)


TOOL = {"type": "function", "function": {"name": "now"}}
CALL = f"Well.\n{call_text(ToolCall('now', '{}'))}\0"


@pytest.mark.parametrize("streams", [{}, {"stream": True}])
@pytest.mark.parametrize(
    ("answer", "fields"),
    [
        (">\nSo.\n</think>\nYes.", {"reasoning_effort": "low"}),
        (f"\n{CALL}", {"tools": [TOOL]}),
        (f">\nSo.\n</think>\n{CALL}", {"tools": [TOOL], "reasoning_effort": "high"}),
    ],
)
async def test_thoughts_and_calls_fit(tmp_path: Path, monkeypatch, answer, fields, streams):
    async with running(tmp_path) as server:
        usage = (await server.chat(**fields, max_tokens=1)).json()["usage"]
        script = "." * usage["prompt_tokens"] + answer
        monkeypatch.setattr("tests.api.scripted.SCRIPT", script)
        reply = await server.chat(**fields, **streams, max_tokens=len(answer))
    schema = described("POST", "/v1/chat/completions", reply.headers["content-type"].split(";")[0])
    assert (b"reasoning_content" in reply.body) == ("reasoning_effort" in fields)
    assert (b"tool_calls" in reply.body) == ("tools" in fields)
    if not streams:
        validate(schema, reply.json())
        return
    for of_data, event in events_of(schema, reply.body):
        validate(of_data, event)


THOUGHT_AND_CALL = f">\nSo.\n</think>\n{CALL}"
RESPONSE = {"model": "m", "input": "hi", "reasoning": {"effort": "low"}}
FLAT = RESPONSE | {"tools": [{"type": "function", "name": "now"}]}
BLOCKS = MESSAGES | {
    "tools": [{"name": "now", "input_schema": {"type": "object"}}],
    "thinking": {"type": "adaptive"},
}


@pytest.mark.parametrize(
    ("path", "body", "limit"),
    [("/v1/responses", FLAT, "max_output_tokens"), ("/v1/messages", BLOCKS, "max_tokens")],
)
async def test_items_and_blocks_fit(tmp_path: Path, monkeypatch, path: str, body: dict, limit: str):
    async with running(tmp_path) as server:
        usage = (await server.post(path, body | {limit: 1})).json()["usage"]
        script = "." * usage["input_tokens"] + THOUGHT_AND_CALL
        monkeypatch.setattr("tests.api.scripted.SCRIPT", script)
        sizes = (40, len(THOUGHT_AND_CALL))  # the first one cuts the call
        replies = [await server.post(path, body | {limit: size}) for size in sizes]
        for reply in replies:
            assert len(reply.json().get("output") or reply.json()["content"]) > 1
        if path == "/v1/responses":
            output = {"type": "function_call_output", "call_id": "1", "output": "x"}
            items = [*replies[-1].json()["output"], output]
            response = (await server.post(path, FLAT | {"input": items})).json()
            listed = f"{path}/{response['id']}/input_items"
            schema = described("GET", listed, "application/json")
            validate(schema, (await server.get(listed)).json())
    for reply in replies:
        validate(described("POST", path, "application/json"), reply.json())


async def test_a_field_more_or_less_would_be_noticed(tmp_path: Path):
    async with running(tmp_path) as server:
        answer = (await server.chat()).json()
    schema = described("POST", "/v1/chat/completions", "application/json")
    validate(schema, answer)
    with pytest.raises(ValidationError):
        validate(schema, answer | {"more": 1})
    del answer["usage"]["prompt_tokens"]
    with pytest.raises(ValidationError):
        validate(schema, answer)


async def test_a_deadline_is_an_error_of_its_operation(tmp_path: Path):
    async with running(tmp_path, delay_s=0.05) as server:
        reply = await server.chat(max_tokens=500, timeout_ms=20)
    operation = DOCUMENT["paths"]["/v1/chat/completions"]["post"]
    assert str(reply.status) in operation["responses"]
    assert reply.error["code"] == "timeout"


async def test_anthropics_errors_fit(tmp_path: Path):
    async with running(tmp_path) as server:
        reply = await server.post("/v1/messages", {"model": "m"})
    operation = DOCUMENT["paths"]["/v1/messages"]["post"]
    name = operation["responses"][str(reply.status)]["$ref"].rpartition("/")[2]
    content = DOCUMENT["components"]["responses"][name]["content"]["application/json"]["schema"]
    validate({"components": DOCUMENT["components"], **content}, reply.json())


async def test_errors_fit(tmp_path: Path):
    async with running(tmp_path) as server:
        replies = [await server.chat(n=0), await server.get("/nothing"), await server.chat(model=3)]
    for reply in replies:
        response = DOCUMENT["components"]["responses"][f"Error{reply.status}"]
        content = response["content"]["application/json"]["schema"]
        validate({"components": DOCUMENT["components"], **content}, reply.json())
