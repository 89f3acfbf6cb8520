"""ResponseFields: tools, form and thought of an answer, as POST /v1/responses says it.

What they become is in api/tool_text.py, structured.py and chat.py. Knows no items and no engine.
"""

from __future__ import annotations

import msgspec

from api.chat import Thinking
from api.conversation import ConversationBody, thinking_of_effort
from api.errors import invalid
from api.structured import NamedPart, Schema, format_part
from api.tool_checks import Choice, check_num_tools, checked_tools, use_of
from api.tool_text import Tool, ToolUse
from api.tools import choice_of, unsupported_choice


class ResponseTool(msgspec.Struct, kw_only=True):
    type: str
    name: str | None = None
    description: str | None = None
    parameters: dict[str, object] | None = None
    strict: bool | None = None


class ResponseToolChoice(msgspec.Struct, kw_only=True):
    type: str
    name: str | None = None


class TextFormat(msgspec.Struct, kw_only=True, omit_defaults=True):
    """`strict` makes no difference: what a schema says is enforced, or refused."""

    type: str
    name: str | None = None
    description: str | None = None
    schema: Schema | None = None
    strict: bool | None = None


class TextOptions(msgspec.Struct, kw_only=True):
    format: TextFormat | None = None


class ReasoningOptions(msgspec.Struct, kw_only=True):
    effort: str | None = None


class ResponseFields(ConversationBody, kw_only=True):
    tools: list[ResponseTool] | None = None
    tool_choice: str | ResponseToolChoice | None = None
    parallel_tool_calls: bool | None = None
    text: TextOptions | None = None
    reasoning: ReasoningOptions | None = None

    @property
    def allows_many_calls(self) -> bool:
        return self.parallel_tool_calls is not False

    @property
    def effort(self) -> str | None:
        return None if self.reasoning is None else self.reasoning.effort

    def tool_use(self) -> ToolUse | None:
        given = self.tools or []
        check_num_tools(len(given))
        tools = checked_tools([_tool(f"tools[{index}]", tool) for index, tool in enumerate(given)])
        choice, only = self._choice()
        return use_of(tools, choice, only, allows_many=self.allows_many_calls)

    def asked_thinking(self) -> tuple[str | None, Thinking]:
        if self.effort is None:
            return None, Thinking.NONE
        return "reasoning.effort", thinking_of_effort("reasoning.effort", self.effort)

    def own_format(self) -> NamedPart | None:
        asked = None if self.text is None else self.text.format
        if asked is None:
            return None
        return format_part("text.format", "schema", asked.type, asked.schema)

    def echo(self) -> dict[str, object]:
        """The fields as the response tells of them."""
        asked = None if self.text is None else self.text.format
        choice = self.tool_choice
        return {
            "parallel_tool_calls": self.allows_many_calls,
            "reasoning": {"effort": self.effort, "summary": None},
            "text": {"format": msgspec.to_builtins(asked or TextFormat(type="text"))},
            "tool_choice": "auto" if choice is None else msgspec.to_builtins(choice),
            "tools": [msgspec.to_builtins(tool) for tool in self.tools or []],
        }

    def _choice(self) -> tuple[Choice, str | None]:
        asked = self.tool_choice
        if not isinstance(asked, ResponseToolChoice):
            return choice_of(asked), None
        if asked.type != "function" or asked.name is None:
            raise unsupported_choice(asked.type)
        return "auto", asked.name


def _tool(place: str, tool: ResponseTool) -> Tool:
    if tool.type != "function":
        raise invalid(
            f"'{place}.type' = {tool.type!r} is not supported; send tools of type function",
            f"{place}.type",
            "unsupported_parameter",
        )
    return Tool(
        tool.name or "",
        tool.description or "",
        tool.parameters,
        is_strict=tool.strict is True,
        field=f"{place}.parameters",
    )
