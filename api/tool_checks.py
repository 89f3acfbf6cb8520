"""Tools, calls and the choice among tools: what must be true of them, whatever the protocol.

Knows no bodies, no prompt's text and no engine.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Literal

from api.errors import invalid
from api.tool_text import NAME, Tool, ToolCall, ToolUse

MAX_NUM_TOOLS = 128
Choice = Literal["none", "auto", "required"]


def checked_tools(tools: Sequence[Tool]) -> tuple[Tool, ...]:
    """Raises ApiError 400 that names the place."""
    found: dict[str, Tool] = {}
    for tool in tools:
        # The schema's neighbour.
        name_field = f"{tool.field.rpartition('.')[0]}.name"
        _check_name(tool.name, name_field)
        if tool.name in found:
            raise invalid(f"{name_field!r} is there twice", name_field)
        kind = (tool.parameters or {}).get("type", "object")
        if kind != "object":
            raise invalid(f"'{tool.field}.type' = {kind!r}: must be 'object'", tool.field)
        found[tool.name] = tool
    return tuple(found.values())


def check_num_tools(num_tools: int) -> None:
    """Raises ApiError 400."""
    if num_tools > MAX_NUM_TOOLS:
        raise invalid(
            f"'tools' has {num_tools} entries, at most {MAX_NUM_TOOLS} are supported", "tools"
        )


def use_of(
    tools: tuple[Tool, ...], choice: Choice, only: str | None, *, allows_many: bool
) -> ToolUse | None:
    """None where no tool may be called; `only` is the one that must be. Raises ApiError 400."""
    if only is not None and only not in [tool.name for tool in tools]:
        known = ", ".join(tool.name for tool in tools) or "none"
        raise invalid(f"'tool_choice' names {only!r}, but the 'tools' are: {known}", "tool_choice")
    if choice == "required" and not tools:
        raise invalid("'tool_choice' asks for a call, which needs 'tools'", "tool_choice")
    if not tools or choice == "none":
        return None
    return ToolUse(
        tools=tools,
        needs_call=choice == "required",
        allows_many=allows_many,
        only=only,
    )


def checked_call(name: str, arguments: str, place: str) -> ToolCall:
    """A call in a history. Raises ApiError 400 that names the place."""
    _check_name(name, f"{place}.name")
    arguments = arguments.strip() or "{}"
    try:
        is_object = isinstance(json.loads(arguments), dict)
    except (ValueError, RecursionError):
        is_object = False
    if not is_object:
        field = f"{place}.arguments"
        raise invalid(f"{field!r} must be a JSON object, as a string", field)
    return ToolCall(name, arguments)


def _check_name(name: str, field: str) -> None:
    if not NAME.fullmatch(name):
        raise invalid(
            f"'{field}' = {name[:140]!r}: must be 1 to 128 letters, digits or _ - . : /", field
        )
