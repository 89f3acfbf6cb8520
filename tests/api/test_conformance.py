"""Random requests made from the OpenAPI document: never a crash, every answer as it says."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from api.openapi.document import openapi_document
from api.openapi.operations import OPERATIONS
from tests.api.harness import model_table, running

CHECKS = [
    not_a_server_error,
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
]
MOST = 8  # tokens and answers
STATE_ID = f"state-{0:032x}"  # the first one that the scripted engine makes
# What succeeds, and fields that do no harm as long as their type is right.
SOUND = {
    "messages": [{"role": "user", "content": "hi"}],
    "prompt": "hi",
    "input": ["a", "b"],
    "choices": ["a", "bc"],
    "tokens": [1, 2],
    "request_ids": ["x"],
    "rid": "x",
    "max_tokens": 3,
}
HARMLESS = {"stream", "cache_salt", "user", "label", "pinned", "echo", "return_token_strs"}
DOCUMENT = openapi_document("0")
REQUESTS = {
    path: operation.takes.__struct_fields__
    for (_, path), operation in OPERATIONS.items()
    if isinstance(operation.takes, type)
}
TABLE = model_table(max_waiting=1000)
schema = schemathesis.openapi.from_dict(DOCUMENT)


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server in a thread of its own, since the requests come one after the other."""
    started: Future[tuple[str, asyncio.AbstractEventLoop, asyncio.Event]] = Future()
    folder: Path = tmp_path_factory.mktemp("conformance")

    async def serve() -> None:
        ended = asyncio.Event()
        async with running(folder, TABLE) as server:
            states = [await server.post("/v1/states", {"prompt": "hi"}) for _ in range(20)]
            assert STATE_ID in {state.json()["id"] for state in states}
            started.set_result((server.base_url, asyncio.get_running_loop(), ended))
            await ended.wait()

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    base_url, loop, ended = started.result(30)
    yield base_url
    loop.call_soon_threadsafe(ended.set)
    thread.join(30)
    assert not thread.is_alive()


@schema.hook
def map_case(context: schemathesis.HookContext, case: schemathesis.Case) -> schemathesis.Case:
    """Every other request may succeed, and all of them end soon."""
    body, properties = case.body, REQUESTS.get(case.operation.path, ())
    is_sound = len(repr((body, case.path_parameters))) % 2 == 0
    if isinstance(body, dict):
        if is_sound:
            case.body = body = {name: SOUND[name] for name in properties if name in SOUND} | {
                name: body[name] for name in body if name in HARMLESS
            }
            if "prompt" in body:
                body.pop("messages", None)  # one of them
        if "model" in properties and isinstance(body.get("model", ""), str | None):
            body["model"] = "m"
        if "dry_run" in properties:
            body["dry_run"] = True  # else the models go
        for name in ("max_tokens", "max_completion_tokens", "n", "best_of"):
            if isinstance(body.get(name), int | float):
                body[name] = min(body[name], MOST)
    if is_sound and isinstance(case.path_parameters, dict):
        known = {"model_id": "m", "state_id": STATE_ID, "response_id": "resp_none"}
        case.path_parameters |= {name: known[name] for name in case.path_parameters}
    return case


def check(case: schemathesis.Case, address: str) -> None:
    response = case.call(base_url=address, timeout=20)
    case.validate_response(response, checks=CHECKS)


@schema.parametrize()
@settings(
    max_examples=5,
    deadline=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)
def test_quick(case: schemathesis.Case, address: str) -> None:
    check(case, address)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@schema.parametrize()
@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
def test_deep(case: schemathesis.Case, address: str) -> None:
    check(case, address)
