"""Prompt: what a body asks to continue, and its tokens. Knows no HTTP and no engine."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from api.answer_reader import AnswerForm
from api.structured import NamedGrammar
from engine.tokenizer import Tokenizer

BEGIN_OF_DOCUMENT = 0


@dataclass(frozen=True, slots=True)
class Prompt:
    """A text or token ids, for the replica that is to continue them.

    A text that begins a document gets the begin-of-document token in front, token ids are taken
    as they are. `field` is what errors about the prompt name, `starts` are the numbers of
    characters of the text that precede its messages.
    """

    field: str
    content: str | tuple[int, ...]
    default_stop: Sequence[str] = ()
    starts: Sequence[int] = ()
    is_continuation: bool = False  # of a state: the document has begun
    form: AnswerForm | None = None  # of the answer to a chat
    # The last one is what the answer must match; those before it are its parts, so that an error
    # in one names the right field.
    grammars: Sequence[NamedGrammar] = ()


@dataclass(frozen=True, slots=True)
class EncodedPrompt:
    """`hints` are numbers of ids: those that lie wholly before each message but the first."""

    ids: tuple[int, ...]
    hints: tuple[int, ...] = ()


async def encode(prompt: Prompt, tokenizer: Tokenizer) -> EncodedPrompt:
    """The tokens of a prompt; others run between the slices of a long text."""
    if not isinstance(prompt.content, str):
        return EncodedPrompt(prompt.content)
    ids = [] if prompt.is_continuation else [BEGIN_OF_DOCUMENT]
    # What is before the first message is shared with nobody.
    finder = BorderFinder(tokenizer, prompt.content, prompt.starts[1:], len(ids))
    for number, part in enumerate(tokenizer.encode_slices(prompt.content)):
        if number:
            await asyncio.sleep(0)
        ids += part
        finder.feed(part)
    return EncodedPrompt(tuple(ids), tuple(finder.found))


class BorderFinder:
    """Numbers of tokens that lie wholly before given places of a text, as its tokens come."""

    def __init__(
        self, tokenizer: Tokenizer, text: str, places: Sequence[int], num_tokens: int
    ) -> None:
        """`places` are numbers of characters, ascending; `num_tokens` precede the text."""
        self.found: list[int] = []
        self._token_bytes = tokenizer.token_bytes
        self._places = deque(_num_bytes(text, places))
        self._num_tokens = num_tokens
        self._num_bytes = 0

    def feed(self, ids: Sequence[int]) -> None:
        for token_id in ids:
            if not self._places:
                return
            self._num_bytes += len(self._token_bytes(token_id))
            while self._places and self._num_bytes > self._places[0]:
                self._places.popleft()
                self.found.append(self._num_tokens)
            self._num_tokens += 1


def _num_bytes(text: str, places: Sequence[int]) -> list[int]:
    """Of UTF-8 before each place."""
    counts, begin, num_bytes = [], 0, 0
    for place in places:
        num_bytes += len(text[begin:place].encode())
        begin = place
        counts.append(num_bytes)
    return counts
