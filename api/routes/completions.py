"""POST /v1/completions."""

from __future__ import annotations

from blacksheep import Request, Response

from api.encode import CompletionEncoder
from api.generation import accept, respond
from api.prompt import Prompt
from api.registry import Replica
from api.respond import read_json
from api.routes.route import Route
from api.schemas import parse_completion
from api.service import Service
from engine.types import StateInfo


def completion_routes(service: Service) -> list[Route]:
    async def create_completion(request: Request) -> Response:
        body = parse_completion(await read_json(request))
        content = body.text_or_ids()

        def prompt_for(_: Replica, base: StateInfo | None) -> Prompt:
            return Prompt("prompt", content, is_continuation=base is not None)

        accepted = await accept(service, request, body, prompt_for, "cmpl")
        asked = accepted.request
        encoder = CompletionEncoder(
            accepted.head,
            stops=() if asked is None else asked.sampling.stop,
            has_usage_chunk=body.has_usage_chunk,
        )
        return await respond(service, body, accepted, encoder)

    return [Route("POST", "/v1/completions", create_completion)]
