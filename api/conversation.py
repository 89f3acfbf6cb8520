"""ConversationBody: what the routes that answer a conversation all know of their bodies.

Each of them says it in fields of its own. Knows neither messages nor a prompt's text.
"""

from __future__ import annotations

from typing import ClassVar

from api.chat import Template, Thinking
from api.errors import invalid
from api.generation_body import GenerationBody
from api.tool_text import ToolUse

THINKING_OF_EFFORT = {
    "none": Thinking.NONE,
    "minimal": Thinking.EMPTY,
    "low": Thinking.A_BIT,
    "medium": Thinking.NORMAL,
    "high": Thinking.A_LOT,
}


class ConversationBody(GenerationBody, kw_only=True):
    CONVERSATION_FIELD: ClassVar[str] = "messages"  # what errors about the conversation name
    CALLS_FIELD: ClassVar[str] = "messages[{}].tool_calls"  # and about calls of a message

    @property
    def asks_answer(self) -> bool:
        """Whether the prompt ends where the assistant begins to speak."""
        return True

    @property
    def continues_last(self) -> bool:
        """Whether the answer goes on with the last message."""
        return False

    @property
    def added_stops(self) -> tuple[str, ...]:
        """What ends the answer besides what ends a turn."""
        return ()

    def tool_use(self) -> ToolUse | None:
        """The tools that the model is told of; None for none. Raises ApiError 400."""
        return None

    def asked_thinking(self) -> tuple[str | None, Thinking]:
        """The field that decides, None where none does. Raises ApiError 400."""
        return None, Thinking.NONE

    def thinking_for(self, template: Template) -> Thinking:
        """What is asked for. Raises ApiError 400 if the template cannot do without."""
        field, thinking = self.asked_thinking()
        if template == "rwkv-rs" and thinking is Thinking.NONE and field is not None:
            raise invalid(
                f"{field!r}: the template of this model (rwkv-rs) always thinks; leave it out, or "
                'configure template = "g1"',
                field,
            )
        return thinking

    def check(self) -> None:
        super().check()
        self.tool_use()
        self.asked_thinking()


def thinking_of_effort(field: str, effort: str) -> Thinking:
    """Raises ApiError 400 for an unknown one."""
    thinking = THINKING_OF_EFFORT.get(effort)
    if thinking is None:
        known = ", ".join(THINKING_OF_EFFORT)
        raise invalid(f"{field!r} = {effort!r} is unknown; known are {known}", field)
    return thinking
