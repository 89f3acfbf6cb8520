"""POST /v1/completions/score: how probable given continuations of one prompt are."""

from __future__ import annotations

import math
import time
import uuid

from blacksheep import Request, Response

from api.batches import PromptBatch
from api.errors import draining, invalid
from api.generation import state_of
from api.lifetime import lifetime_of
from api.placement import Placed, initial_state_of, place
from api.prompt import Prompt
from api.registry import Replica
from api.respond import json_response, read_json
from api.routes.route import Route
from api.score_body import ScoreBody, parse_score
from api.scores import Score, first_request, other_request, score_of
from api.service import Service
from engine.types import EngineRequest, OutputDelta


def score_routes(service: Service) -> list[Route]:
    async def score_choices(request: Request) -> Response:
        body = parse_score(await read_json(request))
        if service.is_draining:
            raise draining()
        owner = lifetime_of(request).owner

        def prompts_now(replica: Replica) -> list[Prompt]:
            base = state_of(replica, owner, body.state)
            return body.prompts(is_continuation=base is not None)

        placed = await place(service.registry, body.model, prompts_now)
        prompt = _engine_request(body, placed, owner)
        choices = [one.encoded.ids for one in placed.prompts[1:]]
        _check_ids(choices, placed.replica.client.info.vocab_size)
        longer = [number for number, ids in enumerate(choices) if len(ids) > 1]
        with PromptBatch(service, request, placed.replica) as batch:
            (first,) = await batch.compute([first_request(prompt, choices)], ["prompt"])
            found = await batch.compute(
                [other_request(prompt, choices[number], number) for number in longer],
                [f"choices[{number}]" for number in longer],
            )
        others = dict(zip(longer, found, strict=True))
        scores = [score_of(ids, first, others.get(number)) for number, ids in enumerate(choices)]
        return json_response(_report(placed.replica, prompt, first, scores))

    return [Route("POST", "/v1/completions/score", score_choices)]


def _engine_request(body: ScoreBody, placed: Placed, owner: str) -> EngineRequest:
    """The prompt, for whatever is asked about it."""
    return EngineRequest(
        request_id=f"score-{uuid.uuid4().hex}",
        prompt_ids=placed.prompts[0].encoded.ids,
        priority=body.rank,
        cache_salt=body.cache_salt or "",
        owner=owner,
        state_id=body.state,
        initial_state=initial_state_of(placed.replica, body.initial_state, body.state),
    )


def _check_ids(choices: list[tuple[int, ...]], vocab_size: int) -> None:
    for index, ids in enumerate(choices):
        if max(ids) >= vocab_size:
            raise invalid(
                f"'choices[{index}]' has the token id {max(ids)}: token ids of this model go from "
                f"0 to {vocab_size - 1}",
                f"choices[{index}]",
            )


def _report(
    replica: Replica, prompt: EngineRequest, first: OutputDelta, scores: list[Score]
) -> dict[str, object]:
    """The prompt counts once, as it was computed."""
    num_scored = sum(len(score.token_ids) for score in scores)
    details = {"cached_tokens": first.num_cached_tokens}
    if first.num_state_tokens:
        details["state_tokens"] = first.num_state_tokens
    return {
        "id": prompt.request_id,
        "object": "completion.scores",
        "created": int(time.time()),
        "model": replica.table.model_name,
        "system_fingerprint": replica.client.info.fingerprint,
        "choices": [_choice(index, score) for index, score in enumerate(scores)],
        "usage": {
            "prompt_tokens": first.num_prompt_tokens,
            "completion_tokens": num_scored,
            "total_tokens": first.num_prompt_tokens + num_scored,
            "prompt_tokens_details": details,
        },
    }


def _choice(index: int, score: Score) -> dict[str, object]:
    return {
        "index": index,
        "logprob": math.fsum(score.token_logprobs),
        "num_tokens": len(score.token_ids),
        "is_greedy": score.is_greedy,
        "token_ids": score.token_ids,
        "token_logprobs": score.token_logprobs,
    }
