"""ToolFields: tools, which of them may be called, and calls in a history -> what api/tool_text.py
knows. Knows no prompt's text and no engine."""

from __future__ import annotations

import json
from collections.abc import Sequence

import msgspec

from api.errors import invalid
from api.thinking import ThinkingFields
from api.tool_text import NAME, Tool, ToolCall, ToolUse

MAX_NUM_TOOLS = 128
CHOICES = ("none", "auto", "required")


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
        """The tools that the model is told of; None for none. Raises ApiError 400."""
        tools = chat_tools(self.tools or [])
        choice = self.tool_choice
        only = None
        if isinstance(choice, ToolChoiceBody):
            if choice.type != "function" or choice.function is None:
                raise invalid(
                    f"'tool_choice' of type {choice.type!r} is not supported; name a function or "
                    f"send one of {', '.join(CHOICES)}",
                    "tool_choice",
                )
            only = choice.function.name
        elif choice is not None and choice not in CHOICES:
            raise invalid(
                f"'tool_choice' = {choice!r} is unknown; known are {', '.join(CHOICES)}",
                "tool_choice",
            )
        known = [tool.name for tool in tools]
        if only is not None and only not in known:
            raise invalid(
                f"'tool_choice' names {only!r}, but the 'tools' are: {', '.join(known) or 'none'}",
                "tool_choice",
            )
        if choice == "required" and not tools:
            raise invalid("'tool_choice' = 'required' needs 'tools'", "tool_choice")
        if not tools or choice == "none":
            return None
        return ToolUse(
            tools=tools,
            needs_call=choice == "required",
            allows_many=self.parallel_tool_calls is not False,
            only=only,
        )

    def check(self) -> None:
        super().check()
        self.tool_use()


def chat_tools(tools: Sequence[ToolBody]) -> tuple[Tool, ...]:
    """Checked. Raises ApiError 400 that names the place."""
    if len(tools) > MAX_NUM_TOOLS:
        raise invalid(
            f"'tools' has {len(tools)} entries, at most {MAX_NUM_TOOLS} are supported", "tools"
        )
    found: dict[str, Tool] = {}
    for index, tool in enumerate(tools):
        place = f"tools[{index}]"
        if tool.type != "function" or tool.function is None:
            raise invalid(
                f"'{place}.type' = {tool.type!r} is not supported; send type function with a "
                "function",
                f"{place}.type",
            )
        function = tool.function
        _check_name(function.name, f"{place}.function.name")
        if function.name in found:
            raise invalid(f"'{place}.function.name' is there twice", f"{place}.function.name")
        kind = (function.parameters or {}).get("type", "object")
        if kind != "object":
            raise invalid(
                f"'{place}.function.parameters.type' = {kind!r}: must be 'object'",
                f"{place}.function.parameters",
            )
        found[function.name] = Tool(
            function.name,
            function.description or "",
            function.parameters,
            is_strict=function.strict is True,
        )
    return tuple(found.values())


def chat_calls(calls: Sequence[ToolCallBody], place: str) -> tuple[ToolCall, ...]:
    """Those of a message, checked. Raises ApiError 400 that names the place."""
    found = []
    for index, call in enumerate(calls):
        function, at = call.function, f"{place}[{index}].function"
        _check_name(function.name, f"{at}.name")
        arguments = function.arguments.strip() or "{}"
        try:
            is_object = isinstance(json.loads(arguments), dict)
        except (ValueError, RecursionError):
            is_object = False
        if not is_object:
            raise invalid(f"'{at}.arguments' must be a JSON object, as a string", f"{at}.arguments")
        found.append(ToolCall(function.name, arguments))
    return tuple(found)


def _check_name(name: str, field: str) -> None:
    if not NAME.fullmatch(name):
        raise invalid(
            f"'{field}' = {name[:140]!r}: must be 1 to 128 letters, digits or _ - . : /", field
        )
