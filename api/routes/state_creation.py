"""POST /v1/states: a state is computed from a text, messages or a response, and kept."""

from __future__ import annotations

import uuid

from blacksheep import Request, Response

from api.answers import COMPLETE
from api.chat import render
from api.chat_prompt import check_template
from api.errors import ApiError, draining, from_engine, invalid, state_not_found
from api.generation import failure_of, state_of
from api.lifetime import lifetime_of
from api.placement import Placed, follows_text, initial_state_of, place
from api.prompt import Prompt
from api.recent import MAX_NUM_RESPONSES, RecentResponse
from api.registry import Replica
from api.respond import json_response, read_json
from api.routes.route import Route
from api.routes.states import ModelFields, query_of, replica_of
from api.service import Service
from api.state_body import StateBody, parse_state
from api.states import state_object
from engine.errors import EngineError
from engine.types import EngineRequest, SamplingParams


def state_creation_routes(service: Service) -> list[Route]:
    async def create_state(request: Request) -> Response:
        body = parse_state(await read_json(request))
        if service.is_draining:
            raise draining()
        owner = lifetime_of(request).owner
        response = _response(service, owner, body)
        query = query_of(request, ModelFields)
        model_name = _model_name(service, body.model or query.model, response)

        def prompts_for(replica: Replica) -> list[Prompt]:
            if response is not None:
                return [_prompt_of_response(replica, response)]
            return [_prompt_of_body(replica, owner, body)]

        placed = await place(service.registry, model_name, prompts_for)
        (only,) = placed.prompts
        if body.state is not None and not only.encoded.ids:
            raise invalid(
                "nothing is added to 'state'; POST /v1/states/{id}/fork gives it a second id",
                "state",
            )
        asked = _engine_request(placed, owner, body, response)
        client = placed.replica.client
        try:
            stream = client.submit(asked)
        except EngineError as error:
            raise from_engine(error, only.prompt.field) from None
        lifetime_of(request).on_end(stream.close)
        running = service.running.enter(lifetime_of(request), stream.abort)
        end = await stream.collect()
        if end.finish_reason not in COMPLETE:
            running.check()
            raise failure_of(service, end)
        if end.state is None:
            raise ApiError(507, end.error or "there is no room for it", code="states_full")
        return json_response(state_object(end.state, model_name))

    return [Route("POST", "/v1/states", create_state)]


def _response(service: Service, owner: str, body: StateBody) -> RecentResponse | None:
    """The choice of an answer that the state is to be made of."""
    if body.response is None:
        return None
    choices = service.recent.get(owner, body.response)
    if choices is None:
        raise ApiError(
            404,
            f"'response' = {body.response!r} is not known (the last {MAX_NUM_RESPONSES} complete "
            "answers are, until a restart); send its text as 'messages' or 'prompt'",
            param="response",
            code="response_not_found",
        )
    index = body.choice_index
    if index >= len(choices):
        raise invalid(f"'choice' = {index}, but the response has {len(choices)}", "choice")
    return choices[index]


def _model_name(service: Service, named: str | None, response: RecentResponse | None) -> str:
    if response is None:
        return replica_of(service, named).table.model_name
    if named not in (None, response.model_name):
        raise invalid(
            f"'model' = {named!r}, but the response is of {response.model_name!r}", "model"
        )
    return response.model_name


def _prompt_of_response(replica: Replica, response: RecentResponse) -> Prompt:
    if replica.client.tokenizer.fingerprint != response.tokenizer_fingerprint:
        raise ApiError(
            404,
            "the model has another vocabulary since that response; send its text as 'messages' or "
            "'prompt'",
            param="response",
            code="response_not_found",
        )
    try:
        state_of(replica, response.owner, response.state_id)
    except ApiError as error:
        raise state_not_found(
            f"the response went on from a state that is gone: {error.message}", "response"
        ) from None
    return Prompt("response", tuple(response.token_ids))


def _prompt_of_body(replica: Replica, owner: str, body: StateBody) -> Prompt:
    base = state_of(replica, owner, body.state)
    messages = body.chat
    if messages is None:
        return Prompt("prompt", body.content, is_continuation=base is not None)
    check_template(messages, replica.table.template)
    rendered = render(
        messages,
        replica.table.template,
        is_continuation=follows_text(base),
        asks_answer=body.asks_answer(messages),
    )
    return Prompt(
        "messages", rendered.text, starts=rendered.starts, is_continuation=base is not None
    )


def _engine_request(
    placed: Placed, owner: str, body: StateBody, response: RecentResponse | None
) -> EngineRequest:
    replica, (only,) = placed.replica, placed.prompts
    if response is None:
        state_id, cache_salt = body.state, body.cache_salt or ""
        initial_state = initial_state_of(replica, body.initial_state, state_id)
    else:
        state_id, cache_salt = response.state_id, response.cache_salt
        initial_state = response.initial_state
    return EngineRequest(
        request_id=f"state-{uuid.uuid4().hex}",
        prompt_ids=only.encoded.ids,
        sampling=SamplingParams(max_tokens=0),
        cache_salt=cache_salt,
        snapshot_hints=only.encoded.hints,
        owner=owner,
        state_id=state_id,
        initial_state=initial_state,
        keep_state=body.options(replica.table.state_ttl_s),
    )
