"""POST /v1/completions."""

from __future__ import annotations

from blacksheep import Request, Response

from api.encode_completion import CompletionEncoder
from api.generation import PromptsFor, accept, respond
from api.lifetime import lifetime_of
from api.prompt import Prompt
from api.registry import Replica
from api.respond import read_json
from api.routes.route import Route
from api.schemas import CompletionBody, parse_completion
from api.service import Service
from engine.types import StateInfo


def completion_routes(service: Service) -> list[Route]:
    async def create_completion(request: Request) -> Response:
        body = parse_completion(await read_json(request))
        accepted = await accept(
            service, request, body, completion_prompts(body), "cmpl", keeps_aborted=True
        )
        requests = accepted.requests
        encoder = CompletionEncoder(
            accepted.head,
            stops=requests[0].sampling.stop if requests else (),
            has_usage_chunk=body.has_usage_chunk,
            details=accepted.details(body),
            prompts=accepted.prompts,
            echoes=body.echoes,
        )
        return await respond(service, lifetime_of(request), body, accepted, encoder)

    return [Route("POST", "/v1/completions", create_completion)]


def completion_prompts(body: CompletionBody) -> PromptsFor:
    """What is to be continued, after the state that it goes on from."""
    contents, structure = body.prompts(), body.structure()
    grammars = () if structure is None else (structure.behind(),)

    def prompts_for(_: Replica, base: StateInfo | None) -> list[Prompt]:
        is_continuation = base is not None
        return [
            Prompt("prompt", content, is_continuation=is_continuation, grammars=grammars)
            for content in contents
        ]

    return prompts_for
