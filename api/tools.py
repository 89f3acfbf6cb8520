"""ToolFields: tools, which of them may be called, and calls in a history, as a chat says it.

What they become is in api/tool_text.py. Knows no prompt's text and no engine.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from api.errors import invalid
from api.thinking import ThinkingFields
from api.tool_checks import Choice, check_num_tools, checked_call, checked_tools, use_of
from api.tool_text import Tool, ToolCall, ToolUse

CHOICES: dict[str, Choice] = {"none": "none", "auto": "auto", "required": "required"}


class FunctionBody(msgspec.Struct, kw_only=True):
    name: str
    description: str | None = None
    parameters: dict[str, object] | None = None
    strict: bool | None = None


class ToolBody(msgspec.Struct, kw_only=True):
    type: str
    function: FunctionBody | None = None


class NamedFunction(msgspec.Struct, kw_only=True):
    name: str


class ToolChoiceBody(msgspec.Struct, kw_only=True):
    type: str
    function: NamedFunction | None = None


class CalledFunction(msgspec.Struct, kw_only=True):
    name: str
    arguments: str


class ToolCallBody(msgspec.Struct, kw_only=True):
    """Of a message; its id matters to the client only."""

    function: CalledFunction
    type: str = "function"


class ToolFields(ThinkingFields, kw_only=True):
    tools: list[ToolBody] | None = None
    tool_choice: str | ToolChoiceBody | None = None
    parallel_tool_calls: bool | None = None

    def tool_use(self) -> ToolUse | None:
        choice, only = self._choice()
        allows_many = self.parallel_tool_calls is not False
        return use_of(chat_tools(self.tools or []), choice, only, allows_many=allows_many)

    def _choice(self) -> tuple[Choice, str | None]:
        asked = self.tool_choice
        if not isinstance(asked, ToolChoiceBody):
            return choice_of(asked), None
        if asked.type != "function" or asked.function is None:
            raise unsupported_choice(asked.type)
        return "auto", asked.function.name


def choice_of(asked: str | None) -> Choice:
    """OpenAI's words. Raises ApiError 400."""
    choice = CHOICES.get(asked or "auto")
    if choice is None:
        raise invalid(
            f"'tool_choice' = {asked!r} is unknown; known are {', '.join(CHOICES)}", "tool_choice"
        )
    return choice


def unsupported_choice(kind: str) -> Exception:
    return invalid(
        f"'tool_choice' of type {kind!r} is not supported; name a function or send one of "
        f"{', '.join(CHOICES)}",
        "tool_choice",
    )


def chat_tools(tools: Sequence[ToolBody]) -> tuple[Tool, ...]:
    """Checked. Raises ApiError 400 that names the place."""
    check_num_tools(len(tools))
    return checked_tools([_tool(f"tools[{index}]", tool) for index, tool in enumerate(tools)])


def chat_calls(calls: Sequence[ToolCallBody], place: str) -> tuple[ToolCall, ...]:
    """Those of a message, checked. Raises ApiError 400 that names the place."""
    return tuple(
        checked_call(call.function.name, call.function.arguments, f"{place}[{index}].function")
        for index, call in enumerate(calls)
    )


def _tool(place: str, tool: ToolBody) -> Tool:
    function = tool.function
    if tool.type != "function" or function is None:
        raise invalid(
            f"'{place}.type' = {tool.type!r} is not supported; send type function with a function",
            f"{place}.type",
        )
    return Tool(
        function.name,
        function.description or "",
        function.parameters,
        is_strict=function.strict is True,
        field=f"{place}.function.parameters",
    )
