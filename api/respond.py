"""Request bodies in and JSON responses out, on BlackSheep's objects. Knows no route."""

from __future__ import annotations

from collections.abc import Sequence

import orjson
from blacksheep import Content, Request, Response

from api.errors import ApiError
from api.json_size import check_num_values

JSON = b"application/json"
TEXT = b"text/plain; charset=utf-8"


async def read_json(request: Request) -> bytes:
    """The body of a request that says it is JSON. Raises ApiError 415, or 413."""
    content_type = (request.content_type() or b"").partition(b";")[0].strip().lower()
    if content_type != JSON and not content_type.endswith(b"+json"):
        shown = content_type.decode("latin-1") or "(none)"
        raise ApiError(
            415,
            f"Content-Type is {shown}, must be application/json (curl: -H 'Content-Type: "
            "application/json')",
            code="unsupported_media_type",
        )
    data = await request.read() or b""
    await check_num_values(data)
    return data


def json_response(data: object, status: int = 200) -> Response:
    return json_bytes_response(orjson.dumps(data), status)


def json_bytes_response(data: bytes, status: int = 200) -> Response:
    return Response(status, content=Content(JSON, data))


def error_response(error: ApiError, body: bytes) -> Response:
    """`body` is the error in the words of a protocol."""
    headers: Sequence[tuple[bytes, bytes]] = error.headers
    return Response(error.status, list(headers), Content(JSON, body))
