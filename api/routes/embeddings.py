"""POST /v1/embeddings: what the model makes of a text, as one vector of length 1.

It is the model's last row (after ln_out) for the last token of the text. That row is computed from
the state, which has seen the whole text, and from nothing behind it; a mean over all rows would
weigh the beginning of a text, seen with little context, like its end, and could not begin from
snapshots.
"""

from __future__ import annotations

import asyncio
import uuid
from base64 import b64encode

import numpy as np
import numpy.typing as npt
import orjson
from blacksheep import Request, Response

from api.batches import PromptBatch
from api.embedding_body import EmbeddingBody, parse_embedding
from api.errors import ApiError, draining
from api.lifetime import lifetime_of
from api.placement import initial_state_of, place
from api.prompt import EncodedPrompt
from api.registry import Replica
from api.respond import json_bytes_response, read_json
from api.routes.route import Route
from api.service import Service
from engine.types import EngineRequest, OutputDelta, SamplingParams

Row = npt.NDArray[np.float32]

NOTHING = SamplingParams(temperature=0.0, max_tokens=0)


def embedding_routes(service: Service) -> list[Route]:
    async def create_embeddings(request: Request) -> Response:
        body = parse_embedding(await read_json(request))
        prompts = body.prompts()
        if service.is_draining:
            raise draining()
        placed = await place(service.registry, body.model, lambda _: prompts)
        replica = placed.replica
        body.check_dimensions(replica.table.model.embedded_dim)
        owner = lifetime_of(request).owner
        asked = [_engine_request(replica, body, owner, one.encoded) for one in placed.prompts]
        fields = [prompt.field for prompt in prompts]
        with PromptBatch(service, request, replica) as batch:
            answers = await batch.compute(asked, fields)
        return await _response(replica.table.model_name, body, answers)

    return [Route("POST", "/v1/embeddings", create_embeddings)]


def _engine_request(
    replica: Replica, body: EmbeddingBody, owner: str, encoded: EncodedPrompt
) -> EngineRequest:
    return EngineRequest(
        request_id=f"embd-{uuid.uuid4().hex}",
        prompt_ids=encoded.ids,
        sampling=NOTHING,
        priority=body.rank,
        cache_salt=body.cache_salt or "",
        owner=owner,
        initial_state=initial_state_of(replica, body.initial_state, None),
        returns_hidden=True,
    )


async def _response(model_name: str, body: EmbeddingBody, answers: list[OutputDelta]) -> Response:
    """Written in pieces, as a thousand vectors take long."""
    data = []
    for index, answer in enumerate(answers):
        row = normalised(answer.hidden)
        embedding = b64encode(row.astype("<f4").tobytes()).decode() if body.is_base64 else row
        fields = {"object": "embedding", "index": index, "embedding": embedding}
        data.append(orjson.dumps(fields, option=orjson.OPT_SERIALIZE_NUMPY))
        await asyncio.sleep(0)
    num_tokens = sum(answer.num_prompt_tokens for answer in answers)
    num_cached = sum(answer.num_cached_tokens for answer in answers)
    usage = {
        "prompt_tokens": num_tokens,
        "total_tokens": num_tokens,
        "prompt_tokens_details": {"cached_tokens": num_cached},
    }
    head = orjson.dumps({"object": "list", "model": model_name, "usage": usage})
    return json_bytes_response(head[:-1] + b',"data":[' + b",".join(data) + b"]}")


def normalised(hidden: bytes) -> Row:
    """A row of the model, divided by its length. Raises ApiError 500 where it has none."""
    row: Row = np.frombuffer(hidden, dtype=np.float32)
    length = float(np.linalg.norm(row.astype(np.float64)))
    if not 0.0 < length < np.inf:
        message = f"the model's row for this text has the length {length}"
        raise ApiError(500, message, code="engine_error")
    return (row / length).astype(np.float32)
