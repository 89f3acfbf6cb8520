"""GET /v1/models and GET /v1/models/{id}."""

from __future__ import annotations

from blacksheep import Request, Response

from api.registry import Replica
from api.respond import json_response
from api.routes.route import Route
from api.service import Service

OWNER = "rwkv"


def model_routes(service: Service) -> list[Route]:
    async def list_models(request: Request) -> Response:
        registry = service.registry
        data = [_model_object(registry.get(name)) for name in registry.names]
        return json_response({"object": "list", "data": data})

    async def retrieve_model(request: Request) -> Response:
        assert request.route_values is not None, "the path has a parameter"
        return json_response(_model_object(service.registry.get(request.route_values["model_id"])))

    return [
        Route("GET", "/v1/models", list_models),
        # Names may hold a slash, as on Hugging Face.
        Route("GET", "/v1/models/{path:model_id}", retrieve_model),
    ]


def _model_object(replica: Replica) -> dict[str, object]:
    """OpenAI's model object; `max_model_len` is vLLM's word for the context limit."""
    model: dict[str, object] = {
        "id": replica.table.model_name,
        "object": "model",
        "created": replica.created,
        "owned_by": OWNER,
    }
    if replica.table.max_context_len:
        model["max_model_len"] = replica.table.max_context_len
    return model
