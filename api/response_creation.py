"""POST /v1/responses behind its route: a response is queued, answered, and stored as it ends.

Knows the service, no sockets.
"""

from __future__ import annotations

import logging
import uuid
from contextlib import suppress
from dataclasses import dataclass

import orjson

from api.answer_reader import AnswerForm
from api.answers import AnswerFailed
from api.background import BackgroundResponse
from api.chat_prompt import chat_prompt
from api.errors import ApiError
from api.generation import Accepted, failure_of, queue, remember, usage_for
from api.prompt import Prompt
from api.registry import Replica
from api.response_body import ResponseBody
from api.response_database import StoredResponse
from api.response_encode import OnEnd, ResponseEncoder
from api.response_object import ResponseObject, response_object
from api.response_turn import Turn, turn_of
from api.service import Service
from api.states import FOR_EVER, StateFields
from engine.errors import EngineError
from engine.types import EngineRequest, ModelInfo, OutputDelta, StateInfo

logger = logging.getLogger(__name__)

ID_PREFIX = "resp_"  # clients look for it
MAX_NUM_TRIES = 3
RESPONSES_SHARE = 2  # responses may take half of the states that fit; users keep the others


@dataclass(frozen=True, slots=True)
class Created:
    """A response that is queued. `items` are its input, as JSON."""

    accepted: Accepted
    encoder: ResponseEncoder
    items: bytes


async def create(service: Service, owner: str, body: ResponseBody) -> Created:
    """Queue a response. Raises ApiError for all that can be known before it runs.

    Whoever calls this ends the answers, and calls `abandon` where they are not read to the end.
    """
    response_id = f"{ID_PREFIX}{uuid.uuid4().hex}"
    item_objects = body.items()
    items = orjson.dumps(item_objects)
    if body.is_stored and max_num_states(service.registry.get(body.model).client.info):
        body.return_state = StateFields(label=f"response {response_id}")
    accepted, turn = await _queue(service, owner, body, item_objects, response_id)
    encoder = ResponseEncoder(
        response_object(body, accepted.head, _only(accepted).sampling),
        _storing(service, owner, accepted, turn, items) if body.is_stored else _not_storing,
        accepted.form or AnswerForm(),
    )
    return Created(accepted, encoder, items)


def abandon(created: Created, owner: str) -> None:
    """End a response that nobody reads any more. A state that it has left already goes too."""
    left = created.accepted.answers.abandon()
    if created.encoder.is_answered:
        return
    states = created.accepted.replica.client.states
    for state in left:
        with suppress(EngineError):  # it has expired, say
            states.delete(owner, state.state_id)


def run_in_background(service: Service, created: Created, owner: str) -> None:
    """Begin to compute a response that is found by its id."""
    run = BackgroundResponse(owner, created.accepted.answers, created.encoder, created.items)
    service.background.begin(run, _work(service, created, run))


def max_num_states(info: ModelInfo) -> int:
    """How many states responses of a model may hold; 0 where it has no room for kept states."""
    num_pages = info.num_files or info.num_frames // 2
    return num_pages // RESPONSES_SHARE


async def _queue(
    service: Service,
    owner: str,
    body: ResponseBody,
    items: list[dict[str, object]],
    response_id: str,
) -> tuple[Accepted, Turn]:
    """Go on from a state where there is one; leave one where there is room."""
    for tries_left in reversed(range(MAX_NUM_TRIES)):
        replica = service.registry.get(body.model)
        turn = await turn_of(service.responses, replica, owner, body, items)
        body.state = turn.state_id
        body.initial_state = None if turn.state_id else turn.initial_state

        def prompts_for(
            replica: Replica, base: StateInfo | None, turn: Turn = turn
        ) -> list[Prompt]:
            template, has_told = replica.table.template, turn.tools is not None
            return [chat_prompt(body, turn.messages, template, base, has_told_tools=has_told)]

        try:
            return await queue(service, owner, body, prompts_for, response_id), turn
        except ApiError as error:
            if error.code == "states_full" and body.return_state is not None:
                body.return_state = None
            elif error.code != "state_not_found" or not tries_left:
                raise  # else the state has gone since it was looked for
    raise AssertionError("the last try returns or raises")


def _storing(service: Service, owner: str, accepted: Accepted, turn: Turn, items: bytes) -> OnEnd:
    table, head = accepted.replica.table, accepted.head
    begun_with = _only(accepted).initial_state

    def store(response: ResponseObject, end: OutputDelta | None) -> None:
        is_endless = table.state_ttl_s == FOR_EVER
        previous_id = response["previous_response_id"]
        state = None if end is None else end.state
        stored = StoredResponse(
            response_id=head.answer_id,
            owner=owner,
            model_name=head.model_name,
            previous_id=None if previous_id is None else str(previous_id),
            created_unix_s=head.created,
            expires_unix_s=None if is_endless else head.created + table.state_ttl_s,
            instructions=turn.instructions,
            tools=turn.tools,
            initial_state=turn.initial_state or begun_with,
            state_id=None if state is None else state.state_id,
            body=orjson.dumps(response),
            items=items,
        )
        limit = max_num_states(accepted.replica.client.info)
        service.responses.put(stored, table.state_dir, limit)

    return store


def _only(accepted: Accepted) -> EngineRequest:
    """Responses have one answer and resume nothing."""
    (request,) = accepted.requests
    return request


def _not_storing(response: ResponseObject, end: OutputDelta | None) -> None:
    """Of a response with `store` = false."""


async def _work(service: Service, created: Created, run: BackgroundResponse) -> None:
    accepted = created.accepted
    try:
        answers = await run.answers.collect()
        remember(service, accepted, dict(enumerate(answers)))
        run.encoder.whole(answers, usage_for(accepted, answers))
    except AnswerFailed as failure:
        if run.is_cancelled:
            run.encoder.cancel()
        else:
            run.encoder.fail(failure_of(service, failure.delta))
    except Exception:
        logger.exception("the background response %s failed", run.answers.request_id)
        run.encoder.fail(ApiError(500, "internal error", code="internal_error"))
    finally:
        abandon(created, run.owner)
