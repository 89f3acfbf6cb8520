"""POST /v1/chat/completions."""

from __future__ import annotations

from blacksheep import Request, Response

from api.chat import DEFAULT_STOPS, render
from api.encode import ChatEncoder
from api.generation import Prompt, accept, respond
from api.registry import Replica
from api.respond import read_json
from api.routes.route import Route
from api.schemas import parse_chat
from api.service import Service


def chat_routes(service: Service) -> list[Route]:
    async def create_chat_completion(request: Request) -> Response:
        body = parse_chat(await read_json(request))
        messages = body.chat_messages()

        def prompt_for(replica: Replica) -> Prompt:
            template = replica.table.template
            return Prompt("messages", render(messages, template), DEFAULT_STOPS[template])

        accepted = await accept(service, request, body, prompt_for, "chatcmpl")
        encoder = ChatEncoder(
            accepted.head,
            has_usage_chunk=body.has_usage_chunk,
            strips_start=accepted.replica.table.template == "g1",
        )
        return await respond(service, body, accepted.stream, encoder)

    return [Route("POST", "/v1/chat/completions", create_chat_completion)]
