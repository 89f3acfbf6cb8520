"""MessageFields: tools, form and thought of an answer, as Anthropic's POST /v1/messages says it.

What they become is in api/tool_text.py, structured.py and chat.py. Knows no turns and no engine.
"""

from __future__ import annotations

import msgspec

from api.chat import Thinking
from api.conversation import ConversationBody
from api.errors import invalid
from api.sampling import Integer, integer
from api.structured import NamedPart, Schema, format_part
from api.tool_checks import Choice, check_num_tools, checked_tools, use_of
from api.tool_text import Tool, ToolUse

CHOICES: dict[str, Choice] = {
    "auto": "auto",
    "any": "required",
    "tool": "auto",  # with a name, which decides
    "none": "none",
}
THINKING_OF_EFFORT = {
    "low": Thinking.A_BIT,
    "medium": Thinking.NORMAL,
    "high": Thinking.A_LOT,
    "xhigh": Thinking.A_LOT,
    "max": Thinking.A_LOT,
}
THINKING_TYPES = ("enabled", "adaptive", "disabled")
MAX_BUDGET_TOKENS = 2**31 - 1


class MessageTool(msgspec.Struct, kw_only=True):
    name: str
    type: str | None = None
    description: str | None = None
    input_schema: dict[str, object] | None = None
    strict: bool | None = None


class MessageToolChoice(msgspec.Struct, kw_only=True):
    type: str
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class ThinkingOptions(msgspec.Struct, kw_only=True):
    type: str
    budget_tokens: Integer | None = None  # checked, and not kept to


class OutputFormat(msgspec.Struct, kw_only=True):
    type: str
    schema: Schema | None = None


class OutputOptions(msgspec.Struct, kw_only=True):
    effort: str | None = None
    format: OutputFormat | None = None


class MessageFields(ConversationBody, kw_only=True):
    tools: list[MessageTool] | None = None
    tool_choice: MessageToolChoice | None = None
    thinking: ThinkingOptions | None = None
    output_config: OutputOptions | None = None
    output_format: OutputFormat | None = None  # the older name of output_config.format

    def tool_use(self) -> ToolUse | None:
        given = self.tools or []
        check_num_tools(len(given))
        tools = checked_tools([_tool(f"tools[{index}]", tool) for index, tool in enumerate(given)])
        asked = self.tool_choice or MessageToolChoice(type="auto")
        choice = CHOICES.get(asked.type)
        if choice is None:
            known = ", ".join(CHOICES)
            raise invalid(
                f"'tool_choice.type' = {asked.type!r} is unknown; known are {known}",
                "tool_choice.type",
            )
        if (asked.type == "tool") != (asked.name is not None):
            raise invalid("'tool_choice.name' goes with type tool, and only there", "tool_choice")
        allows_many = not asked.disable_parallel_tool_use
        return use_of(tools, choice, asked.name, allows_many=allows_many)

    def asked_thinking(self) -> tuple[str | None, Thinking]:
        """Without `thinking`, `effort` says by itself that there is to be a thought."""
        asked = self.thinking
        of_effort = self._thinking_of_effort()
        if asked is None:
            if of_effort is None:
                return None, Thinking.NONE
            return "output_config.effort", of_effort
        if asked.type not in THINKING_TYPES:
            known = ", ".join(THINKING_TYPES)
            raise invalid(
                f"'thinking.type' = {asked.type!r} is unknown; known are {known}", "thinking.type"
            )
        if asked.budget_tokens is not None:
            integer("thinking.budget_tokens", asked.budget_tokens, 1, MAX_BUDGET_TOKENS)
        if asked.type == "disabled":
            return "thinking.type", Thinking.NONE
        return "thinking.type", of_effort or Thinking.NORMAL

    def own_format(self) -> NamedPart | None:
        config = self.output_config
        inner, outer = None if config is None else config.format, self.output_format
        if inner is not None and outer is not None:
            raise invalid(
                "'output_config.format' and 'output_format' are names of the same; send the first",
                "output_format",
            )
        if inner is not None:
            return _format("output_config.format", inner)
        return None if outer is None else _format("output_format", outer)

    def _thinking_of_effort(self) -> Thinking | None:
        effort = None if self.output_config is None else self.output_config.effort
        if effort is None:
            return None
        if effort not in THINKING_OF_EFFORT:
            known = ", ".join(THINKING_OF_EFFORT)
            raise invalid(
                f"'output_config.effort' = {effort!r} is unknown; known are {known}",
                "output_config.effort",
            )
        return THINKING_OF_EFFORT[effort]


def _format(field: str, asked: OutputFormat) -> NamedPart | None:
    if asked.type != "json_schema":
        raise invalid(f"'{field}.type' = {asked.type!r} must be json_schema", field)
    return format_part(field, "schema", asked.type, asked.schema)


def _tool(place: str, tool: MessageTool) -> Tool:
    if tool.type not in (None, "custom"):
        raise invalid(
            f"'{place}.type' = {tool.type!r} is not supported; send tools with an input_schema, of "
            "type custom",
            f"{place}.type",
            "unsupported_parameter",
        )
    if tool.input_schema is None:
        field = f"{place}.input_schema"
        raise invalid(f"{field!r} is missing", field)
    return Tool(
        tool.name,
        tool.description or "",
        tool.input_schema,
        is_strict=tool.strict is True,
        field=f"{place}.input_schema",
    )
