"""Tools, calls and results as RWKV-7 chat models read and write them. Knows no requests.

The form is the one that vLLM's RWKV tool parser and the RWKV fork of vLLM use: headings "### …",
a call as a fenced JSON object behind "**Tool Call:**". A call is written to the letter as here, in
a history as in an answer, where the grammar sees to it: so an answer that comes back in the next
request is the text that the state already knows, and can be taken apart as it comes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from engine.grammar_text import Part, compose, lark_regex, lark_text, schema_part

MARKER = "**Tool Call:**"
MARKER_LINE = f"{MARKER}\n"
CALL_OPENING = f'{MARKER}\n```json\n{{"name": "'
BEFORE_ARGUMENTS = '", "arguments": '
CALL_CLOSING = "}\n```"
HOW_TO_CALL = f"""\
A tool is called by writing nothing but:
{MARKER}
```json
{{"name": "NAME", "arguments": {{"PARAMETER": "VALUE"}}}}
```"""
NAME = re.compile(r"[A-Za-z0-9_.:/-]{1,128}")
NO_PARAMETERS: Mapping[str, object] = {
    "type": "object",
    "properties": {},
    "additionalProperties": False,
}


@dataclass(frozen=True, slots=True)
class Tool:
    """`parameters` is the JSON schema of an object."""

    name: str  # a NAME
    description: str = ""
    parameters: Mapping[str, object] | None = None
    is_strict: bool = False
    field: str = ""  # of the request, which errors about `parameters` name


@dataclass(frozen=True, slots=True)
class ToolCall:
    name: str
    arguments: str  # a JSON object


@dataclass(frozen=True, slots=True)
class ToolUse:
    """The tools of a request, and what it says about calling them."""

    tools: tuple[Tool, ...]
    needs_call: bool = False
    allows_many: bool = True
    only: str | None = None  # the one tool that must be called, once

    @property
    def must_call(self) -> bool:
        return self.needs_call or self.only is not None


def definitions(tools: Sequence[Tool]) -> str:
    """What the model is told about its tools."""
    return "\n".join([*map(_definition, tools), HOW_TO_CALL])


def call_text(call: ToolCall) -> str:
    return f"{CALL_OPENING}{call.name}{BEFORE_ARGUMENTS}{call.arguments}{CALL_CLOSING}"


def result_text(content: str) -> str:
    """JSON as it is, other text as a JSON string: so it cannot look like a heading."""
    try:
        json.loads(content)
    except (ValueError, RecursionError):
        content = json.dumps(content, ensure_ascii=False)
    return f"```json\n{content}\n```"


def arguments_part(tool: Tool) -> Part:
    """Of the grammar: what its arguments are. Without `strict` a schema may say more than can be
    enforced."""
    schema = NO_PARAMETERS if tool.parameters is None else {"type": "object", **tool.parameters}
    return schema_part(schema, is_lenient=not tool.is_strict)


def tools_grammar(use: ToolUse, lead: str, structure: Part | None = None) -> str:
    """An answer that may, or must, call tools; before it comes `lead`, as in grammar_text.

    It begins with a new line. Where it calls nothing it is any text, or what `structure` says.
    """
    callable_tools = [tool for tool in use.tools if use.only in (None, tool.name)]
    parts: dict[str, Part] = {
        f"arguments_{number}": arguments_part(tool) for number, tool in enumerate(callable_tools)
    }
    heads = [
        f"{lark_text(tool.name + BEFORE_ARGUMENTS)} @arguments_{number}"
        for number, tool in enumerate(callable_tools)
    ]
    begin = lark_text(f"\n{CALL_OPENING}")
    rules = [
        f"start: {'lead ' if lead else ''}answer",
        f"call: ({' | '.join(heads)}) {lark_text(CALL_CLOSING)}",
    ]
    if lead:
        rules.append(f"lead[lazy]: /{lark_regex(lead)}/")
    has_more = use.allows_many and use.only is None
    calls = f"call ({begin} call)*" if has_more else "call"
    if use.must_call:
        rules.append(f"answer: {begin} {calls}")
    elif structure is not None:
        parts["structure"] = structure
        rules.append(f'answer: "\\n" @structure | {begin} {calls}')
    else:
        trigger = lark_regex(re.escape(f"\n{MARKER}\n").replace("\\\n", "\\n"))
        rules += [
            f"answer: TEXT | called {calls}",
            "TEXT: /\\n(.|\\n)*/",
            # As soon as a line is the marker, a call has to follow.
            f"called: trigger {lark_text(CALL_OPENING.removeprefix(MARKER_LINE))}",
            f"trigger[lazy]: /(\\n(.|\\n)*)?{trigger}/",
        ]
    return compose("\n".join(rules), parts)


def _definition(tool: Tool) -> str:
    schema = json.dumps(tool.parameters or {}, ensure_ascii=False, indent=2)
    about = f"**Description:** {tool.description}\n" if tool.description else ""
    return f"### `{tool.name}`\n{about}**Parameters:**\n```json\n{schema}\n```"
