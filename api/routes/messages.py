"""POST /v1/messages and /v1/messages/count_tokens: what clients of Anthropic's API ask."""

from __future__ import annotations

from blacksheep import Request, Response

from api.answer_reader import AnswerForm
from api.chat_prompt import chat_prompt
from api.generation import accept, respond
from api.lifetime import lifetime_of
from api.message_body import parse_count, parse_messages
from api.message_encode import PING, MessageEncoder
from api.placement import place
from api.prompt import Prompt
from api.registry import Replica
from api.respond import json_response, read_json
from api.routes.route import Route
from api.service import Service
from api.sse import named_events
from engine.types import StateInfo


def message_routes(service: Service) -> list[Route]:
    async def create_message(request: Request) -> Response:
        body = parse_messages(await read_json(request))
        messages = body.chat_messages()

        def prompts_for(replica: Replica, base: StateInfo | None) -> list[Prompt]:
            return [chat_prompt(body, messages, replica.table.template)]

        accepted = await accept(service, request, body, prompts_for, "msg")
        (only,) = accepted.requests  # messages resume nothing
        form = accepted.form or AnswerForm()
        encoder = MessageEncoder(accepted.head, len(only.prompt_ids), form, body.added_stops)
        framing = named_events(encoder.fail, PING)
        return await respond(service, lifetime_of(request), body, accepted, encoder, framing)

    async def count_tokens(request: Request) -> Response:
        body = parse_count(await read_json(request))
        messages = body.chat_messages()

        def prompts_for(replica: Replica) -> list[Prompt]:
            return [chat_prompt(body, messages, replica.table.template)]

        placed = await place(service.registry, body.model, prompts_for)
        return json_response({"input_tokens": len(placed.prompts[0].encoded.ids)})

    return [
        Route("POST", "/v1/messages", create_message),
        Route("POST", "/v1/messages/count_tokens", count_tokens),
    ]
