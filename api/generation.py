"""The way of a completion request: accept it into an engine, then answer whole or as a stream.

Shared by the chat and the completion routes, which differ in prompt and encoder only.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass

from blacksheep import Request, Response, StreamedContent

from api.encode import AnswerHead, Encoder
from api.errors import ApiError, draining, from_engine
from api.lifetime import lifetime_of
from api.registry import Replica
from api.respond import json_bytes_response
from api.schemas import GenerationBody
from api.service import Service
from api.sse import event_stream
from engine.client import RequestStream
from engine.errors import EngineError
from engine.tokenizer import Tokenizer
from engine.types import EngineRequest, FinishReason, OutputDelta, SamplingParams

BEGIN_OF_DOCUMENT = 0
ENGINE_PROMPT_FIELD = "prompt_ids"
STREAM_HEADERS = [
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx would hold events back
]


@dataclass(frozen=True, slots=True)
class Prompt:
    """What a body asks to continue, for the replica that is to do it.

    A text gets the begin-of-document token in front, token ids are taken as they are. `field`
    is what errors about the prompt name.
    """

    field: str
    content: str | tuple[int, ...]
    default_stop: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class Accepted:
    """A request that an engine has queued."""

    head: AnswerHead
    replica: Replica
    sampling: SamplingParams
    stream: RequestStream


async def accept(
    service: Service,
    http_request: Request,
    body: GenerationBody,
    prompt_for: Callable[[Replica], Prompt],
    id_prefix: str,
) -> Accepted:
    """Queue the request. Raises ApiError for all that can be known before it runs."""
    if service.is_draining:
        raise draining()
    while True:
        replica = service.registry.get(body.model)
        prompt = prompt_for(replica)
        prompt_ids = await _ids_of(prompt, replica.client.tokenizer)
        if service.registry.get(body.model) is replica:
            break  # else it was replaced meanwhile, maybe with another vocabulary
    sampling = body.to_params(prompt.default_stop)
    request = EngineRequest(
        request_id=f"{id_prefix}-{uuid.uuid4().hex}",
        prompt_ids=prompt_ids,
        sampling=sampling,
        cache_salt=body.cache_salt or "",
    )
    try:
        stream = replica.client.submit(request)
    except EngineError as error:
        refusal = from_engine(error)
        if refusal.param == ENGINE_PROMPT_FIELD:
            refusal.param = prompt.field
        raise refusal from None
    lifetime_of(http_request).on_end(stream.close)
    head = AnswerHead(
        answer_id=request.request_id,
        created=int(time.time()),
        model_name=replica.table.model_name,
        fingerprint=replica.client.info.fingerprint,
    )
    return Accepted(head, replica, sampling, stream)


async def respond(
    service: Service, body: GenerationBody, stream: RequestStream, encoder: Encoder
) -> Response:
    """The answer to an accepted request. Raises ApiError if the engine fails a whole answer."""

    def failure_of(delta: OutputDelta) -> ApiError:
        if delta.finish_reason is FinishReason.ERROR:
            return ApiError(500, delta.error or "the engine failed", code="engine_error")
        if service.is_draining:
            return draining()
        return ApiError(503, "the request was aborted by the server", code="aborted")

    if not body.stream:
        delta = await stream.collect()
        if delta.finish_reason not in (FinishReason.STOP, FinishReason.LENGTH):
            raise failure_of(delta)
        return json_bytes_response(encoder.whole(delta))

    keep_alive_s = service.config.sse_keep_alive_ms / 1000

    async def pieces() -> AsyncIterator[bytes]:
        async for piece in event_stream(stream, encoder, failure_of, keep_alive_s):
            yield piece

    return Response(200, list(STREAM_HEADERS), StreamedContent(b"text/event-stream", pieces))


async def _ids_of(prompt: Prompt, tokenizer: Tokenizer) -> tuple[int, ...]:
    if not isinstance(prompt.content, str):
        return prompt.content
    ids = [BEGIN_OF_DOCUMENT]
    for number, part in enumerate(tokenizer.encode_slices(prompt.content)):
        if number:
            await asyncio.sleep(0)  # others run between the slices of a long text
        ids += part
    return tuple(ids)
