"""POST /v1/completions."""

from __future__ import annotations

from blacksheep import Request, Response

from api.encode import CompletionEncoder
from api.generation import Prompt, accept, respond
from api.registry import Replica
from api.respond import read_json
from api.routes.route import Route
from api.schemas import parse_completion
from api.service import Service


def completion_routes(service: Service) -> list[Route]:
    async def create_completion(request: Request) -> Response:
        body = parse_completion(await read_json(request))
        prompt = Prompt("prompt", body.text_or_ids())

        def prompt_for(_: Replica) -> Prompt:
            return prompt

        accepted = await accept(service, request, body, prompt_for, "cmpl")
        encoder = CompletionEncoder(
            accepted.head,
            stops=accepted.sampling.stop,
            has_usage_chunk=body.has_usage_chunk,
        )
        return await respond(service, body, accepted.stream, encoder)

    return [Route("POST", "/v1/completions", create_completion)]
