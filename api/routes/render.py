"""POST /v1/chat/completions/render and /v1/completions/render: what a body makes the model read.

Nothing is computed. Prompt, token ids and sampling are made by the same code that answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from blacksheep import Request, Response

from api.engine_request import engine_requests
from api.errors import invalid
from api.generation import PromptsFor, state_of
from api.generation_body import GenerationBody
from api.lifetime import lifetime_of
from api.placement import PlacedPrompt, place
from api.prompt import Prompt
from api.registry import Replica
from api.respond import json_response, read_json
from api.routes.chat import chat_prompts
from api.routes.completions import completion_prompts
from api.routes.route import Route
from api.schemas import parse_chat, parse_completion
from api.service import Service
from engine.types import EngineRequest


def render_routes(service: Service) -> list[Route]:
    async def render_chat(request: Request) -> Response:
        body = parse_chat(await read_json(request))
        (rendered,) = await _rendered(request, body, chat_prompts(body))
        return json_response(rendered)

    async def render_completions(request: Request) -> Response:
        body = parse_completion(await read_json(request))
        return json_response(await _rendered(request, body, completion_prompts(body)))

    async def _rendered(
        request: Request, body: GenerationBody, prompts_for: PromptsFor
    ) -> list[dict[str, object]]:
        if body.resume is not None:
            raise invalid("a suspended answer has no prompt to show; leave out 'resume'", "resume")
        owner = lifetime_of(request).owner

        def prompts_now(replica: Replica) -> Sequence[Prompt]:
            return prompts_for(replica, state_of(replica, owner, body.state))

        placed = await place(service.registry, body.model, prompts_now)
        asked = engine_requests(body, placed, owner, "")[:: body.num_candidates]
        return [
            _report(placed.replica, body, prompt, one)
            for prompt, one in zip(placed.prompts, asked, strict=True)
        ]

    return [
        Route("POST", "/v1/chat/completions/render", render_chat),
        Route("POST", "/v1/completions/render", render_completions),
    ]


def _report(
    replica: Replica, body: GenerationBody, prompt: PlacedPrompt, asked: EngineRequest
) -> dict[str, object]:
    content = prompt.prompt.content
    sampling = asdict(asked.sampling)
    if body.seed is None:
        sampling["seed"] = None  # another one for each answer
    return {
        "object": "rendered_prompt",
        "model": replica.table.model_name,
        "prompt": content if isinstance(content, str) else _text(replica, asked),
        "token_ids": asked.prompt_ids,
        "state": asked.state_id,
        "initial_state": asked.initial_state,
        "sampling_params": sampling,
    }


def _text(replica: Replica, asked: EngineRequest) -> str:
    """Of ids that a client has sent; those that the vocabulary does not have give none."""
    tokenizer = replica.client.tokenizer
    return tokenizer.decode(filter(tokenizer.has_text, asked.prompt_ids))
