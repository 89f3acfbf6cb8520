"""Prompts of known length: random words as token ids. Knows no server."""

from __future__ import annotations

import random
from pathlib import Path

from engine.tokenizer import Tokenizer

BEGIN_OF_DOCUMENT = 0


class Words:
    """Texts that share nothing, unless made so, and that every server reads as the same tokens."""

    def __init__(self, vocabulary: Path | str) -> None:
        self.tokenizer = Tokenizer.load(vocabulary)
        self._ids = [
            token_id
            for token_id in range(1, self.tokenizer.vocab_size)
            if self.tokenizer.has_text(token_id) and _is_word(self.tokenizer.token_bytes(token_id))
        ]

    def ids(self, seed: str, num_tokens: int) -> list[int]:
        """The same for the same seed. A text and its beginning need the same seed."""
        return random.Random(seed).choices(self._ids, k=num_tokens)

    def text(self, seed: str, num_tokens: int) -> str:
        """A text of about so many tokens: encoded again, neighbours may be joined or split."""
        return self.tokenizer.decode(self.ids(seed, num_tokens)).strip()

    def document(self, seed: str, num_tokens: int) -> list[int]:
        """`num_tokens` in all, the begin-of-document token included."""
        return [BEGIN_OF_DOCUMENT, *self.ids(seed, num_tokens - 1)]


def _is_word(token: bytes) -> bool:
    return token[:1] == b" " and token[1:].isalpha()
