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
# The model opens the user's next turn instead of ending the document. The longer one takes the
# blank line before it away as well: where two stop strings match, the earlier match wins.
DEFAULT_STOPS: dict[Template, tuple[str, ...]] = {"g1": ("\n\nUser:", "\nUser:"), "rwkv-rs": ()}

BLANK_LINES = re.compile(r"\n(?:[^\S\n]*\n)+")


@dataclass(frozen=True, slots=True)
class ChatMessage:
    role: Role
    text: str


def render(messages: Sequence[ChatMessage], template: Template) -> str:
    """The prompt, without the begin-of-document token."""
    if template == "rwkv-rs":
        blocks = [f"{LABELS[message.role]}: {message.text}" for message in messages]
        return "\n\n".join([*blocks, "Assistant: <think>\n"])
    blocks = [_block(LABELS[message.role], collapse(message.text)) for message in messages]
    return "\n\n".join([*blocks, "Assistant:"])


def collapse(text: str) -> str:
    """Text without blank lines and without space around it; indentation stays."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    return BLANK_LINES.sub("\n", text).strip()


def _block(label: str, text: str) -> str:
    return f"{label}: {text}" if text else f"{label}:"
