"""The way of a completion request: accept it into an engine, then answer whole or as a stream.

Shared by the routes that generate text, which differ in prompt and encoder only.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, replace

from blacksheep import Request, Response, StreamedContent

from api.answers import COMPLETE, AnswerFailed, Answers, best
from api.encode import AnswerHead, Encoder, Usage, usage_of
from api.errors import ApiError, draining, from_engine, invalid
from api.generation_body import GenerationBody
from api.lifetime import lifetime_of
from api.placement import Placed, initial_state_of, place
from api.prompt import Prompt
from api.recent import recent_response
from api.registry import Replica
from api.respond import json_bytes_response
from api.service import Service
from api.sse import OPENAI, Framing, event_stream
from engine.client import EngineClient, RequestStream
from engine.errors import EngineError
from engine.types import EngineRequest, FinishReason, OutputDelta, StateInfo

NUM_SEEDS = 2**64
STREAM_HEADERS = [
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx would hold events back
]

# (who is to do it, the state that it goes on from)
PromptFor = Callable[[Replica, StateInfo | None], Prompt]


@dataclass(frozen=True, slots=True)
class Accepted:
    """What an engine has queued; without a request where it goes on with a suspended one."""

    head: AnswerHead
    replica: Replica
    answers: Answers
    request: EngineRequest | None = None


async def accept(
    service: Service,
    http_request: Request,
    body: GenerationBody,
    prompt_for: PromptFor,
    id_prefix: str,
) -> Accepted:
    """Queue what is asked for, for as long as the client is there. Raises as `queue` does."""
    lifetime = lifetime_of(http_request)
    answer_id = f"{id_prefix}-{uuid.uuid4().hex}"
    accepted = await queue(service, lifetime.owner, body, prompt_for, answer_id)
    lifetime.on_end(accepted.answers.close)
    return accepted


async def queue(
    service: Service, owner: str, body: GenerationBody, prompt_for: PromptFor, answer_id: str
) -> Accepted:
    """Queue what is asked for. Raises ApiError for all that can be known before it runs.

    Whoever calls this ends the answers.
    """
    if service.is_draining:
        raise draining()
    request = None
    if body.resume is not None:
        replica = service.registry.get(body.model)
        streams = [_resumed(replica.client, body.resume, owner, answer_id)]
    else:

        def prompt_now(replica: Replica) -> Prompt:
            return prompt_for(replica, state_of(replica, owner, body.state))

        placed = await place(service.registry, body.model, prompt_now)
        replica = placed.replica
        request = _engine_request(body, placed, owner, answer_id)
        streams = _submit_copies(placed, request, body.num_candidates)
    head = AnswerHead(
        answer_id=answer_id,
        created=int(time.time()),
        model_name=replica.table.model_name,
        fingerprint=replica.client.info.fingerprint,
        num_choices=body.num_choices,
        returns_state=request is not None and request.keep_state is not None,
    )
    return Accepted(head, replica, Answers(streams), request)


async def respond(
    service: Service,
    body: GenerationBody,
    accepted: Accepted,
    encoder: Encoder,
    framing: Framing = OPENAI,
) -> Response:
    """The answer to an accepted request. Raises ApiError if the engine fails a whole answer."""
    answers = accepted.answers

    def failed(delta: OutputDelta) -> ApiError:
        return failure_of(service, delta)

    if not body.stream:
        try:
            candidates = await answers.collect()
        except AnswerFailed as failure:
            raise failed(failure.delta) from None
        chosen = candidates
        if len(candidates) > body.num_choices:
            chosen = best(candidates, body.num_choices)
        remember(service, accepted, chosen)
        return json_bytes_response(encoder.whole(chosen, usage_for(accepted, candidates)))

    def finish() -> Usage:
        remember(service, accepted, answers.ends)
        return usage_for(accepted, answers.ends)

    keep_alive_s = service.config.sse_keep_alive_ms / 1000

    async def pieces() -> AsyncIterator[bytes]:
        stream = event_stream(answers, encoder, failed, finish, keep_alive_s, framing)
        async for piece in stream:
            yield piece

    return Response(200, list(STREAM_HEADERS), StreamedContent(b"text/event-stream", pieces))


def failure_of(service: Service, delta: OutputDelta) -> ApiError:
    """What a client is told about a request that the engine ended before its time."""
    if delta.finish_reason is FinishReason.ERROR:
        return ApiError(500, delta.error or "the engine failed", code="engine_error")
    if service.is_draining:
        return draining()
    return ApiError(503, "the request was aborted by the server", code="aborted")


def state_of(replica: Replica, owner: str, state_id: str | None) -> StateInfo | None:
    """What is known of the state to go on from. Raises ApiError 404."""
    if state_id is None:
        return None
    try:
        return replica.client.states.get(owner, state_id)
    except EngineError as error:
        refusal = from_engine(error)
        refusal.param = "state"
        raise refusal from None


def _engine_request(
    body: GenerationBody, placed: Placed, owner: str, answer_id: str
) -> EngineRequest:
    table = placed.replica.table
    if body.resumable and table.state_dir is None:
        raise invalid(
            f"'resumable' = true needs a disk, and {table.model_name} has no state_dir in its "
            "configuration; leave it out",
            "resumable",
        )
    sampling = body.to_params(placed.prompt.default_stop)
    if body.num_candidates > body.num_choices:
        sampling = replace(sampling, has_logprobs=True)
    return EngineRequest(
        request_id=answer_id,
        prompt_ids=placed.encoded.ids,
        sampling=sampling,
        priority=body.rank,
        cache_salt=body.cache_salt or "",
        snapshot_hints=placed.encoded.hints,
        owner=owner,
        state_id=body.state,
        initial_state=initial_state_of(placed.replica, body.initial_state, body.state),
        keep_state=body.keep_state(table.state_ttl_s),
        is_resumable=body.resumable or False,
    )


def _submit_copies(placed: Placed, request: EngineRequest, num_copies: int) -> list[RequestStream]:
    """The same request with one seed each. All of them are queued, or none."""
    client, table = placed.replica.client, placed.replica.table
    most = table.max_batch_size + table.max_waiting
    if num_copies > most:
        raise invalid(
            f"{num_copies} answers are asked for at once, but {table.model_name} runs "
            f"max_batch_size = {table.max_batch_size} and lets max_waiting = {table.max_waiting} "
            f"wait: ask for {most} at most",
            "n",
        )
    if num_copies == 1:
        copies = [request]
    else:
        seed = request.sampling.seed
        copies = [
            replace(
                request,
                request_id=f"{request.request_id}-{number}",
                sampling=replace(request.sampling, seed=(seed + number) % NUM_SEEDS),
            )
            for number in range(num_copies)
        ]
    streams: list[RequestStream] = []
    try:
        for copy in copies:
            stream = client.submit(copy)
            streams.append(stream)
    except EngineError as error:
        for stream in streams:
            stream.close()
        raise from_engine(error, placed.prompt.field) from None
    return streams


def _resumed(client: EngineClient, resume_id: str, owner: str, request_id: str) -> RequestStream:
    try:
        return client.resume(resume_id, owner, request_id)
    except EngineError as error:
        raise from_engine(error) from None


def usage_for(accepted: Accepted, candidates: Sequence[OutputDelta]) -> Usage:
    """The usage of all answers that were computed, which are complete."""
    table = accepted.replica.table
    reports = table.context_policy == "report"
    return usage_of(candidates, table.max_context_len if reports else 0)


def remember(service: Service, accepted: Accepted, chosen: Sequence[OutputDelta]) -> None:
    """So that POST /v1/states can make a state of each choice."""
    request, replica = accepted.request, accepted.replica
    if request is None or any(answer.finish_reason not in COMPLETE for answer in chosen):
        return
    name, tokenizer = replica.table.model_name, replica.client.tokenizer
    responses = [recent_response(request, name, tokenizer, answer) for answer in chosen]
    service.recent.add(accepted.head.answer_id, responses)
