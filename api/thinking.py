"""ThinkingFields: how a chat request says whether the model thinks. Knows no prompt's text."""

from __future__ import annotations

import msgspec

from api.chat import Thinking
from api.conversation import ConversationBody, thinking_of_effort
from api.errors import invalid


class TemplateOptions(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """`chat_template_kwargs` of vLLM; null = absent."""

    enable_thinking: bool | None = None


class ThinkingFields(ConversationBody, kw_only=True):
    reasoning_effort: str | None = None
    chat_template_kwargs: TemplateOptions | None = None

    def asked_thinking(self) -> tuple[str | None, Thinking]:
        options, effort = self.chat_template_kwargs, self.reasoning_effort
        enabled = None if options is None else options.enable_thinking
        if effort is None:
            if enabled is None:
                return None, Thinking.NONE
            return "chat_template_kwargs", Thinking.PLAIN if enabled else Thinking.NONE
        thinking = thinking_of_effort("reasoning_effort", effort)
        if enabled is not None and enabled is (thinking is Thinking.NONE):
            raise invalid(
                f"'reasoning_effort' = {effort!r} and 'enable_thinking' = {str(enabled).lower()} "
                "contradict each other; send one of them",
                "reasoning_effort",
            )
        return "reasoning_effort", thinking
