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
from enum import Enum, auto
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
SEPARATOR = "\n\n"
# The model opens the user's next turn instead of ending the document. The longer one takes the
# blank line before it away as well: where two stop strings match, the earlier match wins.
DEFAULT_STOPS: dict[Template, tuple[str, ...]] = {"g1": ("\n\nUser:", "\nUser:"), "rwkv-rs": ()}

BLANK_LINES = re.compile(r"\n(?:[^\S\n]*\n)+")
PAST_THOUGHT = re.compile(r"\s*<think>.*?</think>", re.DOTALL)
OPEN_THOUGHT = re.compile(r"\s*<think>(?!.*</think>)", re.DOTALL)


class Ending(Enum):
    """Where a prompt leaves the model, which is where its answer begins."""

    MIDDLE = auto()  # somewhere in a text: what comes is the answer as it is
    LABEL = auto()  # behind "Assistant:"
    THOUGHT = auto()  # in a thought
    THOUGHT_TAG = auto()  # in the tag that begins it: the model writes the ">" itself
    CLOSED_TAG = auto()  # in the tag that ends an empty thought


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


@dataclass(frozen=True, slots=True)
class ChatText:
    """A rendered conversation.

    `starts` are numbers of characters: what precedes each message. The last one may be that of
    what only this prompt says, which asks for a thought; no later prompt has it there.
    """

    text: str
    starts: tuple[int, ...]
    ending: Ending


def render(
    messages: Sequence[ChatMessage],
    template: Template,
    *,
    is_continuation: bool = False,
    asks_answer: bool = True,
    continues_last: bool = False,
    thinking: Thinking = Thinking.NONE,
) -> ChatText:
    """The prompt, without the begin-of-document token.

    A continuation follows a text that ends with a message, or with an answer as far as it was
    given; what it adds makes the text of the whole conversation. With `asks_answer` the prompt
    ends where the assistant begins to speak, otherwise it ends with the last message; with
    `continues_last` that is an answer to be gone on with, and a thought in it stays.
    """
    asks_answer = asks_answer and not continues_last
    blocks = [_block(message, template) for message in messages]
    if continues_last and template == "g1":
        blocks[-1] = _labelled(LABELS[messages[-1].role], collapse(messages[-1].text))
    lead = SEPARATOR if is_continuation and (blocks or asks_answer) else ""
    starts, position = [], len(lead)
    for block in blocks:
        starts.append(position)
        position += len(block) + len(SEPARATOR)
    history = lead + SEPARATOR.join(blocks)
    if not asks_answer:
        ending = _ending_of(messages[-1].text) if continues_last else Ending.MIDDLE
        return ChatText(history, tuple(starts), ending)
    if template == "g1" and thinking.tag:
        starts.append(len(history))
    text = history + _opening(messages, template, thinking, has_blocks=bool(blocks))
    ending = thinking.ending if template == "g1" else Ending.THOUGHT
    return ChatText(text, tuple(starts), ending)


def collapse(text: str) -> str:
    """Text without blank lines and without space around it; indentation stays."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    return BLANK_LINES.sub("\n", text).strip()


def _opening(
    messages: Sequence[ChatMessage], template: Template, thinking: Thinking, has_blocks: bool
) -> str:
    """What follows the last message, up to where the assistant begins to speak."""
    separator = SEPARATOR if has_blocks else ""
    if template == "rwkv-rs":
        return f"{separator}Assistant: <think>\n"
    hint = thinking.hint if messages and messages[-1].role == "user" else ""
    tag = f" {thinking.tag}" if thinking.tag else ""
    return f"{hint}{separator}Assistant:{tag}"


def _block(message: ChatMessage, template: Template) -> str:
    label = LABELS[message.role]
    if template == "rwkv-rs":
        return f"{label}: {message.text}"
    text = message.text
    if message.role == "assistant":
        past = PAST_THOUGHT.match(text)
        text = text[past.end() :] if past else text
    return _labelled(label, collapse(text))


def _labelled(label: str, text: str) -> str:
    return f"{label}: {text}" if text else f"{label}:"


def _ending_of(answer: str) -> Ending:
    """Of a prompt that ends with an answer to be gone on with."""
    if OPEN_THOUGHT.match(answer):
        return Ending.THOUGHT
    return Ending.MIDDLE if collapse(answer) else Ending.LABEL
