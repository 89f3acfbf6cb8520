"""GET /openapi.json and GET /docs: what the API is, for programs and for people."""

from __future__ import annotations

import orjson
from blacksheep import Content, Request, Response

from api.about import own_version
from api.openapi.document import openapi_document
from api.openapi.page import docs_page
from api.respond import json_bytes_response
from api.routes.route import Route

HTML = b"text/html; charset=utf-8"
# The page is text and style, and nothing is ever to be loaded or run in it.
HEADERS = [(b"content-security-policy", b"default-src 'none'; style-src 'unsafe-inline'")]


def docs_routes() -> list[Route]:
    document = openapi_document(own_version())
    document_bytes, page = orjson.dumps(document), docs_page(document)

    async def show_document(request: Request) -> Response:
        return json_bytes_response(document_bytes)

    async def show_page(request: Request) -> Response:
        return Response(200, list(HEADERS), Content(HTML, page))

    return [Route("GET", "/openapi.json", show_document), Route("GET", "/docs", show_page)]
