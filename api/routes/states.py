"""/v1/states: kept states listed, filed otherwise, forked, deleted, copied out and in.

POST /v1/states, which computes one, is api/routes/state_creation.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import msgspec
from blacksheep import Content, Request, Response

from api.errors import from_engine, invalid
from api.lifetime import lifetime_of
from api.registry import Replica
from api.respond import json_response, read_json
from api.routes.route import Route
from api.sampling import Integer, integer
from api.schemas import BodyT, convert_strict, parse_strict
from api.service import Service
from api.states import StateFields, state_object
from engine.errors import EngineError, StateMismatch
from engine.types import StateInfo

DEFAULT_LIMIT, MAX_LIMIT = 20, 100  # OpenAI's
OCTET_STREAM = b"application/octet-stream"


class ModelFields(msgspec.Struct, kw_only=True):
    """Which model's states; needed only where several are served."""

    model: str | None = None


class FilingFields(StateFields, kw_only=True):
    """The body of a change and a fork, and the query of an import."""

    model: str | None = None


class ListFields(ModelFields, kw_only=True):
    limit: Integer | None = None
    after: str | None = None


def state_routes(service: Service) -> list[Route]:
    async def list_states(request: Request) -> Response:
        query = query_of(request, ListFields)
        replica = replica_of(service, query.model)
        infos = replica.client.states.list(lifetime_of(request).owner)
        return json_response(_page(infos, query, replica.table.model_name))

    async def retrieve_state(request: Request) -> Response:
        replica, owner, state_id = _asked(service, request)
        with told():
            return _answer(replica, replica.client.states.get(owner, state_id))

    async def change_state(request: Request) -> Response:
        fields = await _filing(request)
        replica, owner, state_id = _asked(service, request, fields.model)
        with told():
            info = replica.client.states.update(
                owner,
                state_id,
                label=fields.label,
                is_pinned=fields.pinned,
                ttl_s=fields.new_ttl_s(),
            )
        return _answer(replica, info)

    async def fork_state(request: Request) -> Response:
        fields = await _filing(request)
        replica, owner, state_id = _asked(service, request, fields.model)
        options = fields.options(replica.table.state_ttl_s)
        with told():
            return _answer(replica, replica.client.states.fork(owner, state_id, options))

    async def delete_state(request: Request) -> Response:
        replica, owner, state_id = _asked(service, request)
        with told():
            replica.client.states.delete(owner, state_id)
        return json_response({"id": state_id, "object": "state", "deleted": True})

    async def export_state(request: Request) -> Response:
        replica, owner, state_id = _asked(service, request)
        with told():
            info = replica.client.states.get(owner, state_id)
            data = await replica.client.states.export_file(owner, state_id)
        name = f'attachment; filename="{info.state_id}.safetensors"'
        headers = [(b"content-disposition", name.encode())]
        return Response(200, headers, Content(OCTET_STREAM, data))

    async def import_state(request: Request) -> Response:
        fields = query_of(request, FilingFields)
        fields.check_filing()
        replica = replica_of(service, fields.model)
        options = fields.options(replica.table.state_ttl_s)
        data = await request.read()
        if not data:
            raise invalid("the body is empty: send a safetensors file, as export gives it")
        with told():
            owner = lifetime_of(request).owner
            try:
                info = await replica.client.states.import_file(owner, data, options)
            except StateMismatch as error:
                raise StateMismatch(f"the file is refused: {error}") from None
        return _answer(replica, info)

    one = "/v1/states/{state_id}"
    return [
        Route("GET", "/v1/states", list_states),
        Route("POST", "/v1/states/import", import_state),
        Route("GET", one, retrieve_state),
        Route("POST", one, change_state),  # as OpenAI changes its objects
        Route("PATCH", one, change_state),
        Route("DELETE", one, delete_state),
        Route("POST", f"{one}/fork", fork_state),
        Route("GET", f"{one}/export", export_state),
    ]


@contextmanager
def told() -> Iterator[None]:
    """An engine's refusal becomes an ApiError."""
    try:
        yield
    except EngineError as error:
        raise from_engine(error) from None


def query_of(request: Request, kind: type[BodyT]) -> BodyT:
    """The query of the URL as fields. Raises ApiError 400 for unknown and repeated ones."""
    fields = {}
    for name, values in request.query.items():
        if len(values) != 1:
            raise invalid(f"{name!r} is given {len(values)} times in the query", name)
        fields[name] = values[0]
    return convert_strict(fields, kind, is_text=True)


def replica_of(service: Service, model_name: str | None) -> Replica:
    """The one that is meant; it need not be named where there is only one."""
    names = service.registry.names
    return service.registry.get(names[0] if model_name is None and len(names) == 1 else model_name)


def _asked(
    service: Service, request: Request, model_name: str | None = None
) -> tuple[Replica, str, str]:
    """Replica, owner and state id of a request to one state."""
    named = query_of(request, ModelFields).model
    state_id = (request.route_values or {}).get("state_id")
    assert state_id is not None, "the path has a parameter"
    return replica_of(service, model_name or named), lifetime_of(request).owner, state_id


async def _filing(request: Request) -> FilingFields:
    """The fields in a body that may be left out."""
    if not await request.read():
        return FilingFields()
    fields = parse_strict(await read_json(request), FilingFields)
    fields.check_filing()
    return fields


def _answer(replica: Replica, info: StateInfo) -> Response:
    return json_response(state_object(info, replica.table.model_name))


def _page(infos: list[StateInfo], query: ListFields, model_name: str) -> dict[str, object]:
    """OpenAI's list object: those after the one of id `after`."""
    limit = integer("limit", DEFAULT_LIMIT if query.limit is None else query.limit, 1, MAX_LIMIT)
    ids = [info.state_id for info in infos]
    if query.after is not None:
        if query.after not in ids:
            raise invalid(f"'after' = {query.after!r} is no state here; begin without it", "after")
        infos = infos[ids.index(query.after) + 1 :]
    data = [state_object(info, model_name) for info in infos[:limit]]
    return {
        "object": "list",
        "data": data,
        "first_id": data[0]["id"] if data else None,
        "last_id": data[-1]["id"] if data else None,
        "has_more": len(infos) > limit,
    }
