"""What a new response goes on from: the state after an earlier one, or failing that its text.

Knows stored responses and kept states; nothing is submitted here.
"""

from __future__ import annotations

from dataclasses import dataclass

import orjson

from api.chat import ChatMessage, are_about_tools, with_definitions
from api.errors import ApiError
from api.registry import Replica
from api.response_body import ResponseBody
from api.response_database import StoredResponse
from api.response_items import ItemObject, messages_of
from api.response_store import ResponseStore
from api.tool_text import definitions
from engine.errors import EngineError

ENDED_WELL = ("completed", "incomplete")


@dataclass(frozen=True, slots=True)
class Turn:
    """The messages that come after a state, or make a whole conversation where there is none."""

    messages: list[ChatMessage]
    state_id: str | None
    instructions: str | None  # in effect from here on
    tools: str | None  # likewise, what the model was told of them; as in StoredResponse
    initial_state: str | None  # what the conversation begins with, where that was said


async def turn_of(
    store: ResponseStore,
    replica: Replica,
    owner: str,
    body: ResponseBody,
    items: list[dict[str, object]],
) -> Turn:
    """Raises ApiError 400 where the previous response cannot be gone on from.

    The way back ends at the first response that has its state, which most often is the first one.
    """
    untold: list[StoredResponse] = []  # newest first
    told, state_id, initial_state = _Told(), None, body.initial_state
    previous_id = body.previous_response_id
    while previous_id is not None:
        previous = await store.get(owner, previous_id)
        if previous is None:
            raise _not_found(body, previous_id)
        initial_state = previous.initial_state
        if _has_state(replica, previous):
            state_id, told = previous.state_id, _Told(previous.instructions, previous.tools)
            break
        untold.append(previous)
        previous_id = previous.previous_id
    messages: list[ChatMessage] = []
    for response in reversed(untold):
        given = messages_of(orjson.loads(response.items))
        messages += told.turn(given, response.instructions, response.tools)
        messages += messages_of(_output_of(response))
    use = body.tool_use()
    tools = None if use is None else definitions(use.tools)
    messages += told.turn(messages_of(items), body.instructions, tools)
    return Turn(messages, state_id, told.instructions, told.tools, initial_state)


@dataclass(slots=True)
class _Told:
    """What is in effect. A state cannot forget, so it stays; only other things are told anew."""

    instructions: str | None = None
    tools: str | None = None

    def turn(
        self, messages: list[ChatMessage], instructions: str | None, tools: str | None
    ) -> list[ChatMessage]:
        """The messages of a turn, with what has to be told before them."""
        if instructions and instructions != self.instructions:
            self.instructions = instructions
            messages = [ChatMessage("system", instructions), *messages]
        if tools and tools != self.tools:
            self.tools = tools
            return with_definitions(messages, tools)
        if self.tools is None and (tools is not None or are_about_tools(messages)):
            self.tools = ""
        return messages


def _has_state(replica: Replica, response: StoredResponse) -> bool:
    if response.state_id is None:
        return False
    try:
        replica.client.states.get(response.owner, response.state_id)
    except EngineError:
        return False
    return True


def _output_of(response: StoredResponse) -> list[ItemObject]:
    """Raises ApiError 400 for a response that has not ended well."""
    body = orjson.loads(response.body)
    if body["status"] not in ENDED_WELL:
        raise ApiError(
            400,
            f"the response {response.response_id!r} is {body['status']}: nothing can go on from it",
            param="previous_response_id",
            code="invalid_value",
        )
    output: list[ItemObject] = body["output"]
    return output


def _not_found(body: ResponseBody, response_id: str) -> ApiError:
    if response_id == body.previous_response_id:
        message = (
            f"there is no stored response {response_id!r} for this API key; it may have expired, "
            "been deleted, or not ended yet"
        )
    else:
        message = (
            f"the state after {body.previous_response_id!r} is gone, and so is {response_id!r}, "
            "which its text begins with; send the conversation as 'input'"
        )
    return ApiError(400, message, param="previous_response_id", code="previous_response_not_found")
