"""/v1/responses: OpenAI's answers that are stored, and that the next ones go on from."""

from __future__ import annotations

import sqlite3

import msgspec
import orjson
from blacksheep import Request, Response

from api.errors import ApiError, invalid
from api.generation import respond
from api.lifetime import lifetime_of
from api.respond import json_bytes_response, json_response, read_json
from api.response_body import parse_response
from api.response_creation import abandon, create, run_in_background
from api.response_database import StoredResponse
from api.routes.route import Route
from api.routes.states import DEFAULT_LIMIT, MAX_LIMIT, query_of
from api.sampling import Integer, integer
from api.service import Service
from api.sse import named_events

ORDERS = ("asc", "desc")


class RetrieveFields(msgspec.Struct, kw_only=True):
    stream: bool | None = None
    include_obfuscation: bool | None = None  # of streams only


class ItemListFields(msgspec.Struct, kw_only=True):
    limit: Integer | None = None
    after: str | None = None
    order: str | None = None


def response_routes(service: Service) -> list[Route]:
    async def create_response(request: Request) -> Response:
        body = parse_response(await read_json(request))
        lifetime = lifetime_of(request)
        created = await create(service, lifetime.owner, body)
        encoder = created.encoder
        if body.is_background:
            run_in_background(service, created, lifetime.owner)
            return json_response(encoder.response)
        lifetime.on_end(lambda: abandon(created, lifetime.owner))
        answers = created.accepted.answers
        service.running.enter(lifetime, answers.cancel, created.accepted.head.answer_id)
        framing = named_events(encoder.fail)
        return await respond(service, lifetime, body, created.accepted, encoder, framing)

    async def retrieve_response(request: Request) -> Response:
        if query_of(request, RetrieveFields).stream:
            raise invalid(
                "'stream' = true is not supported yet for a stored response; leave it out",
                "stream",
                "unsupported_parameter",
            )
        owner, response_id = _asked(request)
        if (run := service.background.get(owner, response_id)) is not None:
            return json_response(run.encoder.response)
        return json_bytes_response((await _stored(service, owner, response_id)).body)

    async def delete_response(request: Request) -> Response:
        owner, response_id = _asked(request)
        await service.background.cancel(owner, response_id)
        stored = await _stored(service, owner, response_id)
        try:
            await service.responses.delete(stored)
        except (OSError, sqlite3.Error) as error:
            raise ApiError(
                500, f"it could not be deleted: {error}", code="internal_error"
            ) from None
        return json_response({"id": response_id, "object": "response", "deleted": True})

    async def cancel_response(request: Request) -> Response:
        owner, response_id = _asked(request)
        await service.background.cancel(owner, response_id)
        stored = await _stored(service, owner, response_id)
        if not orjson.loads(stored.body)["background"]:
            raise invalid(
                "only a response with 'background' = true can be cancelled; to end any other, "
                "close its connection"
            )
        return json_bytes_response(stored.body)

    async def list_input_items(request: Request) -> Response:
        query = query_of(request, ItemListFields)
        owner, response_id = _asked(request)
        run = service.background.get(owner, response_id)
        items = (await _stored(service, owner, response_id)).items if run is None else run.items
        return json_response(_page(orjson.loads(items), query))

    one = "/v1/responses/{response_id}"
    return [
        Route("POST", "/v1/responses", create_response),
        Route("GET", one, retrieve_response),
        Route("DELETE", one, delete_response),
        Route("POST", f"{one}/cancel", cancel_response),
        Route("GET", f"{one}/input_items", list_input_items),
    ]


def _asked(request: Request) -> tuple[str, str]:
    """Owner and response id of a request to one response."""
    response_id = (request.route_values or {}).get("response_id")
    assert response_id is not None, "the path has a parameter"
    return lifetime_of(request).owner, response_id


async def _stored(service: Service, owner: str, response_id: str) -> StoredResponse:
    found = await service.responses.get(owner, response_id)
    if found is None:
        raise ApiError(
            404,
            f"there is no stored response {response_id!r} for this API key; it may have expired or "
            "been deleted",
            code="response_not_found",
        )
    return found


def _page(items: list[dict[str, object]], query: ItemListFields) -> dict[str, object]:
    """OpenAI's list object, by default from the last item to the first."""
    limit = integer("limit", DEFAULT_LIMIT if query.limit is None else query.limit, 1, MAX_LIMIT)
    order = query.order or "desc"
    if order not in ORDERS:
        raise invalid(f"'order' = {order!r} must be asc or desc", "order")
    if order == "desc":
        items = items[::-1]
    if query.after is not None:
        ids = [item["id"] for item in items]
        if query.after not in ids:
            raise invalid(f"'after' = {query.after!r} is no item here; begin without it", "after")
        items = items[ids.index(query.after) + 1 :]
    data = items[:limit]
    return {
        "object": "list",
        "data": data,
        "first_id": data[0]["id"] if data else None,
        "last_id": data[-1]["id"] if data else None,
        "has_more": len(items) > limit,
    }
