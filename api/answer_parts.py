"""What the answer to a chat consists of, as it comes. Plain data."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Content:
    text: str


@dataclass(frozen=True, slots=True)
class Reasoning:
    text: str


@dataclass(frozen=True, slots=True)
class CallBegin:
    """A call, the `index`-th of the answer, whose arguments come next."""

    index: int
    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    index: int
    text: str  # JSON, or some of it


Part = Content | Reasoning | CallBegin | CallArguments


def num_uncertain(text: str, tag: str) -> int:
    """Characters at the end of a text that `tag` may begin with, which it does not hold whole."""
    return next(
        size for size in range(min(len(tag) - 1, len(text)), -1, -1) if text.endswith(tag[:size])
    )
