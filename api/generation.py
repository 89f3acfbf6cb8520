"""The way of a completion request: accept it into an engine, then answer whole or as a stream.

Shared by the routes that generate text, which differ in prompt and encoder only.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from blacksheep import Request, Response, StreamedContent

from api.answer_reader import AnswerForm, num_reasoning_tokens
from api.answers import COMPLETE, AnswerFailed, Answers, best
from api.encode import AnswerHead, ChoicePrompt, Details, Encoder, Usage, usage_of
from api.engine_request import check_room, choice_prompts, engine_requests
from api.errors import ApiError, cancelled, draining, from_engine, timed_out
from api.generation_body import GenerationBody
from api.lifetime import Lifetime, lifetime_of
from api.placement import Placed, place
from api.prompt import Prompt
from api.recent import recent_response
from api.registry import Replica
from api.respond import json_bytes_response
from api.service import Service
from api.sse import OPENAI, EventBody, Framing
from engine.client import EngineClient, RequestStream
from engine.errors import EngineError
from engine.types import EngineRequest, FinishReason, OutputDelta, StateInfo

STREAM_HEADERS = [
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx would hold events back
]

# (who is to do it, the state that it goes on from)
PromptsFor = Callable[[Replica, StateInfo | None], Sequence[Prompt]]


@dataclass(frozen=True, slots=True)
class Accepted:
    """What an engine has queued; without requests where it goes on with a suspended one.

    `requests` are in the order of the answers: all candidates of a prompt, then those of the next.
    """

    head: AnswerHead
    replica: Replica
    answers: Answers
    requests: tuple[EngineRequest, ...] = ()
    prompts: tuple[ChoicePrompt, ...] = ()  # one per choice
    num_candidates: int = 1  # to each prompt
    form: AnswerForm | None = None  # of a chat's answers
    text_before: str = ""  # of a resumed answer

    def details(self, body: GenerationBody) -> Details:
        """What the encoder is to tell of each choice; of a resumed one, what was asked for once."""
        has_logprobs = body.num_top_logprobs is not None or not self.requests
        return Details(
            logprobs_by=self.replica.client.tokenizer if has_logprobs else None,
            has_token_ids=body.return_token_ids or False,
        )


async def accept(
    service: Service,
    http_request: Request,
    body: GenerationBody,
    prompts_for: PromptsFor,
    id_prefix: str,
    *,
    keeps_aborted: bool = False,
) -> Accepted:
    """Queue what is asked for, for as long as the client is there. Raises as `queue` does.

    With `keeps_aborted`, an answer that its owner ends early is one, as far as it went.
    """
    lifetime = lifetime_of(http_request)
    answer_id = f"{id_prefix}-{body.request_id or uuid.uuid4().hex}"
    if body.request_id is not None:
        service.running.check_new(lifetime.owner, answer_id, body.request_id)
    accepted = await queue(service, lifetime.owner, body, prompts_for, answer_id)
    answers = accepted.answers
    answers.keeps_aborted = keeps_aborted
    lifetime.on_end(answers.close)
    service.running.enter(lifetime, answers.cancel, answer_id, body.request_id)
    return accepted


async def queue(
    service: Service, owner: str, body: GenerationBody, prompts_for: PromptsFor, answer_id: str
) -> Accepted:
    """Queue what is asked for. Raises ApiError for all that can be known before it runs.

    Whoever calls this ends the answers.
    """
    if service.is_draining:
        raise draining()
    # Two owners may choose one id, and shall not notice.
    engine_id = answer_id if body.request_id is None else f"{answer_id}-{uuid.uuid4().hex}"
    requests: list[EngineRequest] = []
    prompts: list[ChoicePrompt] = []
    form, resumed = None, None
    if body.resume is not None:
        replica = service.registry.get(body.model)
        streams = [_resumed(replica.client, body.resume, owner, engine_id)]
        resumed = streams[0].resumed
    else:

        def prompts_now(replica: Replica) -> Sequence[Prompt]:
            check_room(body, replica.table)
            return prompts_for(replica, state_of(replica, owner, body.state))

        placed = await place(service.registry, body.model, prompts_now)
        replica = placed.replica
        requests = engine_requests(body, placed, owner, engine_id)
        streams = _submit(placed, requests)
        prompts = choice_prompts(placed, body.num_choices)
        form = placed.prompts[0].prompt.form
    num_candidates = body.num_candidates
    head = AnswerHead(
        answer_id=answer_id,
        created=int(time.time()),
        model_name=replica.table.model_name,
        fingerprint=replica.client.info.fingerprint,
        num_choices=len(streams) // num_candidates * body.num_choices,
        returns_state=any(request.keep_state is not None for request in requests),
    )
    if resumed is not None and resumed.memo:
        form = AnswerForm.of_memo(resumed.memo)
    return Accepted(
        head,
        replica,
        Answers(streams),
        tuple(requests),
        tuple(prompts),
        num_candidates,
        form,
        text_before="" if resumed is None else resumed.text,
    )


async def respond(
    service: Service,
    lifetime: Lifetime,
    body: GenerationBody,
    accepted: Accepted,
    encoder: Encoder,
    framing: Framing = OPENAI,
) -> Response:
    """The answer to an accepted request. Raises ApiError if the engine fails a whole answer."""
    answers = accepted.answers

    def failed(delta: OutputDelta) -> ApiError:
        return cancelled() if answers.is_cancelled else failure_of(service, delta)

    if not body.stream:
        try:
            candidates = await answers.collect()
        except AnswerFailed as failure:
            raise failed(failure.delta) from None
        chosen = {
            number: candidates[number]
            for number in best(candidates, accepted.num_candidates, body.num_choices)
        }
        remember(service, accepted, chosen)
        usage = usage_for(accepted, candidates)
        return json_bytes_response(encoder.whole([*chosen.values()], usage))

    def finish() -> Usage:
        remember(service, accepted, dict(enumerate(answers.ends)))
        return usage_for(accepted, answers.ends)

    keep_alive_s = service.config.sse_keep_alive_ms / 1000
    events = EventBody(
        answers, encoder, failed, finish, keep_alive_s, framing, lifetime.body_writer
    )
    content = StreamedContent(b"text/event-stream", events.pieces)
    return Response(200, list(STREAM_HEADERS), content)


def failure_of(service: Service, delta: OutputDelta) -> ApiError:
    """What a client is told about a request that the engine ended before its time."""
    if delta.finish_reason is FinishReason.ERROR:
        return ApiError(500, delta.error or "the engine failed", code="engine_error")
    if delta.finish_reason is FinishReason.TIMEOUT:
        return timed_out()
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


def _submit(placed: Placed, requests: Sequence[EngineRequest]) -> list[RequestStream]:
    """All of them are queued, or none."""
    streams: list[RequestStream] = []
    try:
        for request in requests:
            stream = placed.replica.client.submit(request)
            streams.append(stream)  # one by one: those before a refusal are to be closed
    except EngineError as error:
        for stream in streams:
            stream.close()
        raise from_engine(error, placed.prompts[0].prompt.field) from None
    return streams


def _resumed(client: EngineClient, resume_id: str, owner: str, request_id: str) -> RequestStream:
    try:
        return client.resume(resume_id, owner, request_id)
    except EngineError as error:
        raise from_engine(error) from None


def usage_for(accepted: Accepted, candidates: Sequence[OutputDelta]) -> Usage:
    """The usage of all answers that were computed, which are complete."""
    table = accepted.replica.table
    context_len = table.max_context_len if table.context_policy == "report" else 0
    tokenizer, form = accepted.replica.client.tokenizer, accepted.form
    num_reasoning = None
    if form is not None and accepted.requests:  # the tokens before a resumed part are not known
        num_reasoning = sum(
            num_reasoning_tokens(form, tokenizer, answer.token_ids) for answer in candidates
        )
    return usage_of(candidates, accepted.num_candidates, context_len, num_reasoning)


def remember(service: Service, accepted: Accepted, chosen: Mapping[int, OutputDelta]) -> None:
    """So that POST /v1/states can make a state of each choice. They are the chosen answers by
    their numbers among all candidates."""
    requests, replica = accepted.requests, accepted.replica
    if not requests or any(answer.finish_reason not in COMPLETE for answer in chosen.values()):
        return
    name, tokenizer = replica.table.model_name, replica.client.tokenizer
    responses = [
        recent_response(requests[number], name, tokenizer, answer)
        for number, answer in chosen.items()
    ]
    service.recent.add(accepted.head.answer_id, responses)
