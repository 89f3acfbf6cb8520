"""POST /abort_requests and /abort_request: end one's own requests by their ids.

The first one is vLLM's, the second SGLang's. An id is that of an answer, or the X-Request-Id that
its request was sent with.
"""

from __future__ import annotations

import msgspec
from blacksheep import Request, Response

from api.errors import invalid
from api.lifetime import lifetime_of
from api.respond import json_response, read_json
from api.routes.route import Route
from api.schemas import parse_strict
from api.service import Service


class AbortManyBody(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """POST /abort_requests."""

    request_ids: list[str] | None = None


class AbortOneBody(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """POST /abort_request."""

    rid: str | None = None
    abort_all: bool | None = None


def abort_routes(service: Service) -> list[Route]:
    async def abort_many(request: Request) -> Response:
        body = parse_strict(await read_json(request), AbortManyBody)
        if body.request_ids is None:
            raise invalid("'request_ids' is missing: send a list of ids", "request_ids")
        found = service.running.cancel(lifetime_of(request).owner, body.request_ids)
        return json_response({"aborted": found})

    async def abort_one(request: Request) -> Response:
        body = parse_strict(await read_json(request), AbortOneBody)
        owner = lifetime_of(request).owner
        if body.abort_all:
            return json_response({"num_aborted": service.running.cancel_all(owner)})
        if not body.rid:
            raise invalid("'rid' is missing: send an id, or \"abort_all\": true", "rid")
        return json_response({"num_aborted": len(service.running.cancel(owner, [body.rid]))})

    return [
        Route("POST", "/abort_requests", abort_many),
        Route("POST", "/abort_request", abort_one),
    ]
