"""StateBody: what POST /v1/states makes a state of. Knows neither engine nor socket."""

from __future__ import annotations

from api.chat import ChatMessage
from api.errors import invalid
from api.generation_body import MAX_NUM_CHOICES
from api.sampling import Integer, integer
from api.schemas import MessageBody, PromptField, chat_messages, parse_strict, text_or_ids
from api.states import StateFields

SOURCES = ("prompt", "messages", "response")
# A response brings these with it.
NOT_WITH_RESPONSE = ("state", "initial_state", "cache_salt")


class StateBody(StateFields, kw_only=True):
    """POST /v1/states; null = absent. Exactly one of SOURCES, or `initial_state` alone."""

    model: str | None = None
    prompt: PromptField | None = None
    messages: list[MessageBody] | None = None
    add_generation_prompt: bool | None = None
    response: str | None = None
    choice: Integer | None = None
    state: str | None = None
    initial_state: str | None = None
    cache_salt: str | None = None

    def check(self) -> None:
        """Raises ApiError 400 for what does not go together."""
        self.check_filing()
        sources = [name for name in SOURCES if getattr(self, name) is not None]
        if len(sources) > 1:
            raise invalid(
                f"{sources[0]!r} and {sources[1]!r} both say what the state is made of; send one",
                sources[1],
            )
        if not sources and self.initial_state is None:
            raise invalid(
                "nothing says what the state is made of: send 'prompt', 'messages', 'response' or "
                "'initial_state' (a second id for a state: POST /v1/states/{id}/fork)",
                "prompt",
            )
        if self.state is not None and self.initial_state is not None:
            raise invalid("send 'state' or 'initial_state', not both", "initial_state")
        self._check_response()
        if self.messages == []:
            raise invalid("'messages' must be a list of at least one message", "messages")
        if self.add_generation_prompt is not None and self.messages is None:
            raise invalid(
                "'add_generation_prompt' goes with 'messages' only", "add_generation_prompt"
            )

    @property
    def choice_index(self) -> int:
        return integer("choice", self.choice or 0, 0, MAX_NUM_CHOICES - 1)

    @property
    def content(self) -> str | tuple[int, ...]:
        """The text or token ids that are not messages; "" is the beginning of a document."""
        return "" if self.prompt is None else text_or_ids(self.prompt)

    @property
    def chat(self) -> list[ChatMessage] | None:
        return None if self.messages is None else chat_messages(self.messages)

    def asks_answer(self, messages: list[ChatMessage]) -> bool:
        """Whether the state is to end where the assistant begins to speak."""
        if self.add_generation_prompt is not None:
            return self.add_generation_prompt
        return messages[-1].role in ("user", "tool")

    def _check_response(self) -> None:
        if self.response is None:
            if self.choice is not None:
                raise invalid("'choice' goes with 'response' only", "choice")
            return
        for name in NOT_WITH_RESPONSE:
            if getattr(self, name) is not None:
                raise invalid(f"{name!r} is the response's own; leave it out", name)


def parse_state(data: bytes) -> StateBody:
    """Raises ApiError 400 that names the first field in the way."""
    body = parse_strict(data, StateBody)
    body.check()
    return body
