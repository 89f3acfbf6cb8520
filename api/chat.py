"""Chat messages -> the one text an RWKV model continues. Knows no tokens and no HTTP.

`g1` is the form of the model cards of RWKV7-G1 (Hugging Face, BlinkDL/rwkv7-g1): blocks
"Label: text" between blank lines, ending in "Assistant:" without a trailing space. A blank line
separates turns there, so blank lines inside a message are collapsed to one newline. Where there
are tools, or calls in the history, blocks have headings instead (see api/tool_text.py).
`rwkv-rs` gives the same bytes as that server: nothing collapsed, always in thinking mode.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Literal

from api.tool_text import Tool, ToolCall, call_text, definitions, result_text

Role = Literal["user", "assistant", "system", "tool"]
Template = Literal["g1", "rwkv-rs"]

ROLE_OF_NAME: dict[str, Role] = {
    "user": "user",
    "assistant": "assistant",
    "system": "system",
    "developer": "system",
    "tool": "tool",
}


@dataclass(frozen=True, slots=True)
class Form:
    """How messages are set: "LABEL JOINT text" with `separator` between them.

    `stops` are what the model writes when it opens the next turn instead of ending the document.
    The longer one takes the blank line before it away as well: where two stop strings match, the
    earlier match wins.
    """

    labels: Mapping[Role, str]
    joint: str
    separator: str
    stops: tuple[str, ...]
    collapses: bool = True


LABELS: Mapping[Role, str] = {
    "user": "User:",
    "assistant": "Assistant:",
    "system": "System:",
    "tool": "User:",
}
HEADINGS: Mapping[Role, str] = {
    "user": "### User",
    "assistant": "### Assistant",
    "system": "### System",
    "tool": "### Tool Output",
}
FORMS: Mapping[Template, Form] = {
    "g1": Form(LABELS, " ", "\n\n", ("\n\nUser:", "\nUser:")),
    "rwkv-rs": Form(LABELS, " ", "\n\n", (), collapses=False),
}
TOOL_FORM = Form(HEADINGS, "\n", "\n", ("\n### User", "\n### System", "\n### Tool Output"))

BLANK_LINES = re.compile(r"\n\s*\n")
PAST_THOUGHT = re.compile(r"\s*<think>.*?</think>", re.DOTALL)
OPEN_THOUGHT = re.compile(r"\s*<think>(?!.*</think>)", re.DOTALL)


class Ending(Enum):
    """Where a prompt leaves the model, which is where its answer begins."""

    MIDDLE = "middle"  # somewhere in a text: what comes is the answer as it is
    LABEL = "label"  # behind "Assistant:"
    THOUGHT = "thought"  # in a thought
    THOUGHT_TAG = "thought tag"  # in the tag that begins it: the model writes the ">" itself
    CLOSED_TAG = "closed tag"  # in the tag that ends an empty thought


class Thinking(Enum):
    """What g1 is told about thinking: behind the user's last text, and behind the label.

    The tags end without ">", since the tokens of a text may differ where it is cut, and the
    models learnt to write it with what follows. The hints are for models since 2025-09-22.
    """

    NONE = ("", "", Ending.LABEL)
    EMPTY = ("", "<think>\n</think", Ending.CLOSED_TAG)
    PLAIN = ("", "<think", Ending.THOUGHT_TAG)
    A_BIT = (" think a bit", "<think", Ending.THOUGHT_TAG)
    NORMAL = (" think", "<think", Ending.THOUGHT_TAG)
    A_LOT = (" think a lot", "<think", Ending.THOUGHT_TAG)

    def __init__(self, hint: str, tag: str, ending: Ending) -> None:
        self.hint = hint
        self.tag = tag
        self.ending = ending


@dataclass(frozen=True, slots=True)
class ChatMessage:
    role: Role
    text: str
    calls: tuple[ToolCall, ...] = ()  # of an assistant


@dataclass(frozen=True, slots=True)
class ChatText:
    """A rendered conversation.

    `starts` are numbers of characters: what precedes each message, the block that only tells of
    tools counting as one. The last one may be that of what only this prompt says, which asks for
    a thought; no later prompt has it there.
    """

    text: str
    starts: tuple[int, ...]
    ending: Ending
    form: Form


def render(
    messages: Sequence[ChatMessage],
    template: Template,
    *,
    is_continuation: bool = False,
    asks_answer: bool = True,
    continues_last: bool = False,
    thinking: Thinking = Thinking.NONE,
    tools: Sequence[Tool] = (),
    has_tool_form: bool = False,
) -> ChatText:
    """The prompt, without the begin-of-document token.

    A continuation follows a text that ends with a message, or with an answer as far as it was
    given; what it adds makes the text of the whole conversation. It is given the same tools, and
    does not tell of them again. With `asks_answer` the prompt ends where the assistant begins to
    speak, otherwise it ends with the last message; with `continues_last` that is an answer to be
    gone on with, and a thought in it stays. Tools are for g1 only; `has_tool_form` is for what
    comes after them, or for messages that tell of them themselves.
    """
    asks_answer = asks_answer and not continues_last
    form = FORMS[template]
    if template == "g1" and (tools or has_tool_form or are_about_tools(messages)):
        form = TOOL_FORM
    if tools and not is_continuation:
        messages = with_definitions(messages, definitions(tools))
    blocks = [_block(message, form) for message in messages]
    if continues_last and form.collapses:
        blocks[-1] = _set("assistant", collapse(messages[-1].text), form)
    lead = form.separator if is_continuation and (blocks or asks_answer) else ""
    starts, position = [], len(lead)
    for block in blocks:
        starts.append(position)
        position += len(block) + len(form.separator)
    history = lead + form.separator.join(blocks)
    if not asks_answer:
        ending = _ending_of(messages[-1].text) if continues_last else Ending.MIDDLE
        return ChatText(history, tuple(starts), ending, form)
    separator = form.separator if blocks else ""
    if template == "rwkv-rs":
        text = f"{history}{separator}Assistant: <think>\n"
        return ChatText(text, tuple(starts), Ending.THOUGHT, form)
    if thinking.tag:
        starts.append(len(history))
    hint = thinking.hint if messages and messages[-1].role == "user" else ""
    text = f"{history}{hint}{separator}{_set('assistant', thinking.tag, form)}"
    return ChatText(text, tuple(starts), thinking.ending, form)


def with_definitions(messages: Sequence[ChatMessage], told: str) -> list[ChatMessage]:
    """With what the model is told about its tools, as part of the first system message."""
    has_system = bool(messages) and messages[0].role == "system"
    first, rest = (messages[0].text, messages[1:]) if has_system else ("", messages)
    return [ChatMessage("system", f"{first}\n{told}"), *rest]


def are_about_tools(messages: Sequence[ChatMessage]) -> bool:
    """Whether there are calls or results among them."""
    return any(message.role == "tool" or message.calls for message in messages)


def collapse(text: str) -> str:
    """Text without blank lines and without space around it; indentation stays."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    return BLANK_LINES.sub("\n", text).strip()


def _block(message: ChatMessage, form: Form) -> str:
    text = message.text
    if form.collapses:
        if message.role == "assistant" and (past := PAST_THOUGHT.match(text)):
            text = text[past.end() :]
        text = collapse(text)
    if form is TOOL_FORM and message.role == "tool":
        text = result_text(text)
    if message.calls:
        calls = [ToolCall(call.name, collapse(call.arguments)) for call in message.calls]
        text = "\n".join([*([text] if text else []), *map(call_text, calls)])
    return _set(message.role, text, form)


def _set(role: Role, text: str, form: Form) -> str:
    label = form.labels[role]
    return f"{label}{form.joint}{text}" if text or not form.collapses else label


def _ending_of(answer: str) -> Ending:
    """Of a prompt that ends with an answer to be gone on with."""
    if OPEN_THOUGHT.match(answer):
        return Ending.THOUGHT
    return Ending.MIDDLE if collapse(answer) else Ending.LABEL
