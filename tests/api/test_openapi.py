"""The OpenAPI document: valid, complete, and what the server really answers."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from openapi_spec_validator import validate

from api.access import OPEN_PATHS
from api.app import all_routes
from api.openapi.document import openapi_document, request_types
from api.openapi.fields import FIELDS
from api.openapi.operations import ALWAYS, OPERATIONS
from api.reload import Reloader
from tests.api.harness import running

DOCUMENT = openapi_document("0")


def test_it_is_valid():
    validate(DOCUMENT)


async def test_every_route_is_in_it_and_nothing_else(tmp_path: Path):
    async with running(tmp_path) as server:
        service = server.service
        shown = (await server.get("/openapi.json")).json()
    routes = all_routes(service, Reloader(service, server.source, {}))
    # A parameter that may hold slashes is an ordinary one there.
    served = {(route.method, route.path.replace("{path:", "{")) for route in routes}
    assert served == OPERATIONS.keys()
    assert shown == DOCUMENT | {"info": shown["info"]}
    paths = {
        (method.upper(), path) for path, methods in shown["paths"].items() for method in methods
    }
    assert paths == OPERATIONS.keys()


async def test_the_open_routes_are_the_ones_that_say_so(tmp_path: Path):
    async with running(tmp_path, api_key="secret") as server:
        for (method, path), operation in OPERATIONS.items():
            shown = DOCUMENT["paths"][path][method.lower()]
            reply = await server.request(method, path.replace("{", "").replace("}", ""))
            assert (reply.status != 401) == (shown.get("security") == []), path
            assert (path in OPEN_PATHS) == (shown.get("security") == []), path
            assert operation.summary == shown["summary"]
        assert (await server.get("/openapi.json")).status == 401
        assert (await server.get("/docs")).status == 200


def test_every_field_of_a_request_is_described_and_no_other():
    schemas, shown = DOCUMENT["components"]["schemas"], set()
    for kind in request_types():
        for field, schema in schemas[kind.__name__]["properties"].items():
            name = next(name for name in (f"{kind.__name__}.{field}", field) if name in FIELDS)
            assert schema["description"] == FIELDS[name]
            shown.add(name)
    assert shown == FIELDS.keys()


def test_every_error_has_a_response():
    used = {
        response["$ref"].rpartition("/")[2]
        for methods in DOCUMENT["paths"].values()
        for operation in methods.values()
        for response in operation["responses"].values()
        if "$ref" in response
    }
    assert used == DOCUMENT["components"]["responses"].keys()
    assert used >= {f"Error{status}" for status in ALWAYS}


def test_operation_ids_differ():
    ids = [
        operation["operationId"]
        for methods in DOCUMENT["paths"].values()
        for operation in methods.values()
    ]
    assert len(ids) == len(set(ids)) == len(OPERATIONS)


class Page(HTMLParser):
    """What a page refers to, and what it would have a browser do."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.add(value or "")
            if name in ("href", "src"):
                self.links.append(value or "")


async def test_the_page_shows_every_operation_and_loads_nothing(tmp_path: Path):
    async with running(tmp_path) as server:
        reply = await server.get("/docs")
    assert reply.headers["content-type"] == "text/html; charset=utf-8"
    assert "default-src 'none'" in reply.headers["content-security-policy"]
    page = Page(reply.body.decode())
    assert not {"script", "link", "img", "iframe"} & set(page.tags)
    assert page.links, "schemas are linked"
    assert all(link.startswith("#") and link[1:] in page.ids for link in page.links)
    for methods in DOCUMENT["paths"].values():
        for operation in methods.values():
            assert operation["operationId"] in page.ids


@pytest.mark.parametrize("path", ["/openapi.json", "/docs"])
async def test_nothing_of_the_configuration_is_in_it(tmp_path: Path, path: str):
    async with running(tmp_path, api_key="sekret-key") as server:
        reply = await server.get(path, authorization="Bearer sekret-key")
    assert reply.status == 200
    assert b"sekret-key" not in reply.body
    assert str(tmp_path).encode() not in reply.body


@pytest.mark.parametrize("path", sorted({path for _, path in OPERATIONS}))
def test_every_route_is_in_the_manual(path: str):
    """Routes that are also served under /v1 are named once."""
    manual = (Path(__file__).parents[2] / "docs" / "api.md").read_text()
    shown = re.sub(r"\{\w+\}", "{id}", path)
    if shown in ("/v1/tokenize", "/v1/detokenize", "/v1/tokenizer_info"):
        shown = shown.removeprefix("/v1")
    assert f"{shown}`" in manual
