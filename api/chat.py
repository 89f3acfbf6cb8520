"""Chat messages -> the one text an RWKV model continues. Knows no tokens and no HTTP.

`g1` is the form of the model cards of RWKV7-G1 (Hugging Face, BlinkDL/rwkv7-g1): blocks
"Label: text" between blank lines, ending in "Assistant:" without a trailing space. A blank line
separates turns there, so blank lines inside a message are collapsed to one newline.
`rwkv-rs` gives the same bytes as that server: nothing collapsed, always in thinking mode.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Role = Literal["user", "assistant", "system", "tool"]
Template = Literal["g1", "rwkv-rs"]

LABELS: dict[Role, str] = {
    "user": "User",
    "assistant": "Assistant",
    "system": "System",
    "tool": "User",
}
ROLE_OF_NAME: dict[str, Role] = {
    "user": "user",
    "assistant": "assistant",
    "system": "system",
    "developer": "system",
    "tool": "tool",
}
OPENINGS: dict[Template, str] = {"g1": "Assistant:", "rwkv-rs": "Assistant: <think>\n"}
SEPARATOR = "\n\n"
# The model opens the user's next turn instead of ending the document. The longer one takes the
# blank line before it away as well: where two stop strings match, the earlier match wins.
DEFAULT_STOPS: dict[Template, tuple[str, ...]] = {"g1": ("\n\nUser:", "\nUser:"), "rwkv-rs": ()}

BLANK_LINES = re.compile(r"\n(?:[^\S\n]*\n)+")


@dataclass(frozen=True, slots=True)
class ChatMessage:
    role: Role
    text: str


@dataclass(frozen=True, slots=True)
class ChatText:
    """A rendered conversation. `starts` are numbers of characters: what precedes each message."""

    text: str
    starts: tuple[int, ...]


def render(
    messages: Sequence[ChatMessage],
    template: Template,
    *,
    is_continuation: bool = False,
    asks_answer: bool = True,
) -> ChatText:
    """The prompt, without the begin-of-document token.

    A continuation follows a text that ends with a message, or with an answer as far as it was
    given; what it adds makes the text of the whole conversation. With `asks_answer` the prompt
    ends where the assistant begins to speak.
    """
    blocks = [_block(message, template) for message in messages]
    if asks_answer:
        blocks.append(OPENINGS[template])
    lead = SEPARATOR if is_continuation and blocks else ""
    starts, position = [], len(lead)
    for block in blocks[: len(messages)]:
        starts.append(position)
        position += len(block) + len(SEPARATOR)
    return ChatText(lead + SEPARATOR.join(blocks), tuple(starts))


def collapse(text: str) -> str:
    """Text without blank lines and without space around it; indentation stays."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    return BLANK_LINES.sub("\n", text).strip()


def _block(message: ChatMessage, template: Template) -> str:
    label = LABELS[message.role]
    if template == "rwkv-rs":
        return f"{label}: {message.text}"
    text = collapse(message.text)
    return f"{label}: {text}" if text else f"{label}:"
