"""The OpenAPI 3.1 document, made from the operations and from the types of their fields."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from http import HTTPStatus

import msgspec

from api.access import OPEN_PATHS
from api.openapi.fields import FIELDS
from api.openapi.operations import ALWAYS, EVENTS, JSON, OPERATIONS, Operation

Json = dict[str, object]

REF_TEMPLATE = "#/components/schemas/{name}"
PARAMETER = re.compile(r"\{(\w+)\}")
DONE = "[DONE]"
TAGS: Mapping[str, str] = {
    "generation": "Answers and continuations",
    "responses": "OpenAI's answers that are stored",
    "messages": "Anthropic's protocol",
    "embeddings": "Vectors for texts",
    "tokenizer": "Text and token ids",
    "states": "What the model knows after a text, kept under an id",
    "models": "What is served",
    "server": "Health, metrics, configuration and this document",
}


def openapi_document(version: str) -> Json:
    """As it is sent. It says nothing about models or keys, so it is the same for everybody."""
    schemas = _Schemas()
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "RWKV-7 inference server",
            "version": version,
            "description": "OpenAI's protocol and more; docs/api.md explains every field.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "servers": [{"url": "/"}],
        "tags": [{"name": name, "description": text} for name, text in TAGS.items()],
        "security": [{"key": []}],
        "paths": _paths(schemas),
        "components": {
            "schemas": schemas.components,
            "responses": {
                _error_name(kind, status): _response(_reason(status), JSON, schemas.of(kind))
                for kind, status in sorted(_error_responses(), key=str)
            },
            "securitySchemes": {
                "key": {
                    "type": "http",
                    "scheme": "bearer",
                    "description": "a key of the configuration, where there is one",
                }
            },
        },
    }


class _Schemas:
    """The schemas of all types there are, by name."""

    def __init__(self) -> None:
        types = list(_types())
        schemas, self.components = msgspec.json.schema_components(
            types, schema_hook=_schema_of_object, ref_template=REF_TEMPLATE
        )
        self._schemas = {str(kind): schema for kind, schema in zip(types, schemas, strict=True)}
        for kind in request_types():
            self._describe(kind.__name__)

    def of(self, kind: type) -> Json:
        found: Json = self._schemas[str(kind)]
        return found

    def fields(self, kind: type[msgspec.Struct]) -> Mapping[str, Json]:
        found: Mapping[str, Json] = self.components[kind.__name__]["properties"]
        return found

    def _describe(self, name: str) -> None:
        for field, schema in self.components[name].get("properties", {}).items():
            described = FIELDS.get(f"{name}.{field}", FIELDS.get(field))
            if described is not None:  # the tests see to it; a server starts without
                schema["description"] = described


def _schema_of_object(_: type) -> Json:
    """`object` is the only type that msgspec has no schema for."""
    return {"description": "any JSON value"}


def _types() -> Iterator[type]:
    for operation in OPERATIONS.values():
        yield operation.error
        for kind in (operation.gives, operation.takes, operation.event, operation.query):
            if kind is not None and not isinstance(kind, str):
                yield kind


def request_types() -> Iterator[type[msgspec.Struct]]:
    """Those of bodies and queries, and what they are made of."""
    asked: list[type] = []
    for operation in OPERATIONS.values():
        asked += [
            kind
            for kind in (operation.takes, operation.query)
            if kind is not None and not isinstance(kind, str)
        ]
    found: set[str] = set()
    for info in msgspec.inspect.multi_type_info(asked):
        yield from _structs_in(info, found)


def _structs_in(info: object, found: set[str]) -> Iterator[type[msgspec.Struct]]:
    if isinstance(info, msgspec.inspect.StructType):
        if info.cls.__name__ in found:
            return
        found.add(info.cls.__name__)
        yield info.cls
        for field in info.fields:
            yield from _structs_in(field.type, found)
    elif isinstance(info, msgspec.inspect.UnionType):
        for part in info.types:
            yield from _structs_in(part, found)
    elif isinstance(info, msgspec.inspect.ListType):
        yield from _structs_in(info.item_type, found)


def _paths(schemas: _Schemas) -> Json:
    paths: dict[str, Json] = {}
    for (method, path), operation in OPERATIONS.items():
        paths.setdefault(path, {})[method.lower()] = _operation(method, path, operation, schemas)
    return dict(paths)


def _operation(method: str, path: str, operation: Operation, schemas: _Schemas) -> Json:
    described: Json = {
        "operationId": _operation_id(method, path),
        "tags": [operation.tag],
        "summary": operation.summary,
        "responses": _responses(operation, schemas),
    }
    if path in OPEN_PATHS:
        described["security"] = []
    if parameters := _parameters(path, operation, schemas):
        described["parameters"] = parameters
    if operation.takes is not None:
        described["requestBody"] = _request_body(operation, schemas)
    return described


def _operation_id(method: str, path: str) -> str:
    return "_".join([method.lower(), *re.findall(r"\w+", path)])


def _parameters(path: str, operation: Operation, schemas: _Schemas) -> list[Json]:
    found: list[Json] = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
        for name in PARAMETER.findall(path)
    ]
    if operation.query is not None:
        for name, schema in schemas.fields(operation.query).items():
            found.append({"name": name, "in": "query", "schema": _without_null(schema)})
    return found


def _without_null(schema: Json) -> Json:
    """In a URL a field is absent or has a value."""
    kinds = schema.get("anyOf")
    if not isinstance(kinds, list):
        return schema
    present = {"anyOf": [kind for kind in kinds if kind != {"type": "null"}]}
    return {name: value for name, value in (schema | present).items() if name != "default"}


def _request_body(operation: Operation, schemas: _Schemas) -> Json:
    takes = operation.takes
    assert takes is not None
    content: Json = (
        {takes: {"schema": {"type": "string", "format": "binary"}}}
        if isinstance(takes, str)
        else {JSON: {"schema": schemas.of(takes)}}
    )
    return {"required": operation.is_body_needed, "content": content}


def _responses(operation: Operation, schemas: _Schemas) -> Json:
    gives = operation.gives
    if isinstance(gives, str):
        success = _response("Success", gives, {"type": "string"})
    else:
        success = _response("Success", JSON, schemas.of(gives))
    if operation.event is not None:
        content = success["content"]
        assert isinstance(content, dict)
        content[EVENTS] = _event_stream(operation.event, operation.error)
    described: Json = {"200": success}
    for status in operation.also:
        described[str(status)] = success | {"description": _reason(status)}
    for status in sorted({*ALWAYS, *operation.errors}):
        name = _error_name(operation.error, status)
        described[str(status)] = {"$ref": f"#/components/responses/{name}"}
    return described


def _event_stream(event: type[msgspec.Struct], error: type[msgspec.Struct]) -> Json:
    """The schema is that of one event: OpenAPI 3.1 has no other words for a stream."""
    description = (
        f"With `stream`: one `data:` line and a blank line per event, each a {event.__name__} or, "
        f"at worst, an Error; {DONE} at the end; comments in silence."
    )
    names = (event.__name__, error.__name__)
    of_json = {
        "type": "string",
        "contentMediaType": JSON,
        "contentSchema": {"anyOf": [{"$ref": REF_TEMPLATE.format(name=name)} for name in names]},
    }
    data = {"anyOf": [{"const": DONE}, of_json]}
    return {
        "schema": {
            "type": "object",
            "description": description,
            "properties": {"data": data},
            "required": ["data"],
        }
    }


def _response(description: str, content_type: str, schema: Json) -> Json:
    return {"description": description, "content": {content_type: {"schema": schema}}}


def _reason(status: int) -> str:
    return HTTPStatus(status).phrase


def _error_responses() -> set[tuple[type[msgspec.Struct], int]]:
    return {
        (operation.error, status)
        for operation in OPERATIONS.values()
        for status in (*ALWAYS, *operation.errors)
    }


def _error_name(kind: type[msgspec.Struct], status: int) -> str:
    return f"{kind.__name__}{status}"
