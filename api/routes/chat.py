"""POST /v1/chat/completions."""

from __future__ import annotations

from blacksheep import Request, Response

from api.answer_reader import AnswerForm
from api.chat_prompt import chat_prompt
from api.encode_chat import ChatEncoder
from api.generation import PromptsFor, accept, respond
from api.lifetime import lifetime_of
from api.prompt import Prompt
from api.registry import Replica
from api.respond import read_json
from api.routes.route import Route
from api.schemas import ChatBody, parse_chat
from api.service import Service
from engine.types import StateInfo


def chat_routes(service: Service) -> list[Route]:
    async def create_chat_completion(request: Request) -> Response:
        body = parse_chat(await read_json(request))
        accepted = await accept(
            service, request, body, chat_prompts(body), "chatcmpl", keeps_aborted=True
        )
        encoder = ChatEncoder(
            accepted.head,
            has_usage_chunk=body.has_usage_chunk,
            form=accepted.form or AnswerForm(),
            text_before=accepted.text_before,
            details=accepted.details(body),
            prompt=accepted.prompts[0] if accepted.prompts else None,
        )
        return await respond(service, lifetime_of(request), body, accepted, encoder)

    return [Route("POST", "/v1/chat/completions", create_chat_completion)]


def chat_prompts(body: ChatBody) -> PromptsFor:
    """What is to be answered, for the replica and the state that it goes on from."""
    messages = body.chat_messages()

    def prompts_for(replica: Replica, base: StateInfo | None) -> list[Prompt]:
        return [chat_prompt(body, messages, replica.table.template, base)]

    return prompts_for
