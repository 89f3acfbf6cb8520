"""ThinkingFields: how a chat request says whether the model thinks. Knows no prompt's text."""

from __future__ import annotations

import msgspec

from api.chat import Template, Thinking
from api.errors import invalid
from api.generation_body import GenerationBody

THINKING_OF_EFFORT = {
    "none": Thinking.NONE,
    "minimal": Thinking.EMPTY,
    "low": Thinking.A_BIT,
    "medium": Thinking.NORMAL,
    "high": Thinking.A_LOT,
}


class TemplateOptions(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """`chat_template_kwargs` of vLLM; null = absent."""

    enable_thinking: bool | None = None


class ThinkingFields(GenerationBody, kw_only=True):
    reasoning_effort: str | None = None
    chat_template_kwargs: TemplateOptions | None = None

    def thinking(self, template: Template) -> Thinking:
        """What is asked for. Raises ApiError 400 if the template cannot do without."""
        field, thinking = self._asked_thinking()
        if template == "rwkv-rs" and thinking is Thinking.NONE and field is not None:
            raise invalid(
                f"{field!r}: the template of this model (rwkv-rs) always thinks; leave it out, or "
                'configure template = "g1"',
                field,
            )
        return thinking

    def check(self) -> None:
        super().check()
        self._asked_thinking()

    def _asked_thinking(self) -> tuple[str | None, Thinking]:
        """The field that decides, None where none does."""
        options, effort = self.chat_template_kwargs, self.reasoning_effort
        enabled = None if options is None else options.enable_thinking
        if effort is None:
            if enabled is None:
                return None, Thinking.NONE
            return "chat_template_kwargs", Thinking.PLAIN if enabled else Thinking.NONE
        thinking = THINKING_OF_EFFORT.get(effort)
        if thinking is None:
            known = ", ".join(THINKING_OF_EFFORT)
            raise invalid(
                f"'reasoning_effort' = {effort!r} is unknown; known are {known}", "reasoning_effort"
            )
        if enabled is not None and enabled is (thinking is Thinking.NONE):
            raise invalid(
                f"'reasoning_effort' = {effort!r} and 'enable_thinking' = {str(enabled).lower()} "
                "contradict each other; send one of them",
                "reasoning_effort",
            )
        return "reasoning_effort", thinking
