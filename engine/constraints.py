"""What a request forbids or favours: bias, allowed and banned tokens, words that must not appear.

Knows the tokens of one request and their bytes, no other request and no probabilities.

Legend: V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from engine.tokenizer import END_OF_TEXT, Tokenizer
from engine.types import SamplingParams


class Constraints:
    """The rules of one request, as far as it has come.

    They act on logits: biases are added, what may not be drawn gets -inf, in this order.
    """

    def __init__(
        self, params: SamplingParams, tokenizer: Tokenizer | None, device: torch.device
    ) -> None:
        """`tokenizer` is needed for `bad_words` only."""
        self._min_tokens = params.min_tokens
        self._num_drawn = 0
        self._words: BadWords | None = None
        banned = set(params.banned_token_ids)
        if params.bad_words:
            assert tokenizer is not None, "words have no tokens without a tokenizer"
            self._words = BadWords(params.bad_words, tokenizer)
            banned |= self._words.whole
        self._device = device
        self._banned = self._ids(sorted(banned))
        self._allowed = self._ids(params.allowed_token_ids)
        self._stops = self._ids(params.stop_token_ids)
        self._biased = self._ids([token_id for token_id, _ in params.logit_bias])
        self._biases = torch.tensor([bias for _, bias in params.logit_bias], device=device)

    @classmethod
    def of(
        cls, params: SamplingParams, tokenizer: Tokenizer | None, device: torch.device
    ) -> Constraints | None:
        """None for requests without any, which are nearly all."""
        has_any = (
            params.logit_bias
            or params.allowed_token_ids
            or params.banned_token_ids
            or params.bad_words
            or params.min_tokens
        )
        return cls(params, tokenizer, device) if has_any else None

    def apply(self, logits_V: Tensor) -> None:
        """In place, to the logits of the next token."""
        if len(self._biased):
            logits_V.index_add_(0, self._biased, self._biases.to(logits_V.dtype))
        if len(self._allowed):
            kept = logits_V[self._allowed]
            logits_V.fill_(-torch.inf)
            logits_V[self._allowed] = kept
        for ids in (self._banned, self._ids(self._last_pieces())):
            if len(ids):
                logits_V.index_fill_(0, ids, -torch.inf)
        if self._num_drawn < self._min_tokens:
            logits_V.index_fill_(0, self._stops, -torch.inf)

    def update(self, tokens: Sequence[int]) -> None:
        """These were drawn."""
        self._num_drawn += len(tokens)
        if self._words is not None:
            for token in tokens:
                self._words.update(token)

    def _last_pieces(self) -> list[int]:
        return [] if self._words is None else sorted(self._words.completing())

    def _ids(self, ids: Sequence[int]) -> Tensor:
        return torch.tensor(ids, dtype=torch.int64, device=self._device)


class BadWords:
    """Texts that must not be spelt by a run of whole tokens, however it is split into tokens.

    Each text counts as it is and with a space in front, as words are within a line. The last
    token of every such run is forbidden. What is part of a longer token is not found: where
    "cat" is bad, " cats" may be drawn if it is one token, and so may "conc" + "at".
    """

    def __init__(self, words: Sequence[str], tokenizer: Tokenizer) -> None:
        plain = [word.encode() for word in words]
        spaced = [b" " + word for word in plain if not word.startswith(b" ")]
        self._words = list(dict.fromkeys(plain + spaced))
        self._token_bytes, self._token_id = tokenizer.token_bytes, tokenizer.token_id
        # How much of each word the tokens drawn so far may be the beginning of: bytes.
        self._begun: list[set[int]] = [set() for _ in self._words]
        found = (self._token_id(word) for word in self._words)
        self.whole = {token_id for token_id in found if token_id is not None}

    def completing(self) -> set[int]:
        """The tokens that would now complete a word which has begun."""
        rests = (
            word[begun:]
            for word, lengths in zip(self._words, self._begun, strict=True)
            for begun in lengths
        )
        found = map(self._token_id, rests)
        return {token_id for token_id in found if token_id is not None}

    def update(self, token: int) -> None:
        """A token was drawn."""
        if token == END_OF_TEXT:
            self._begun = [set() for _ in self._words]
            return
        piece = self._token_bytes(token)
        self._begun = [
            {
                begun + len(piece)
                for begun in (0, *lengths)
                if begun + len(piece) < len(word) and word.startswith(piece, begun)
            }
            for word, lengths in zip(self._words, self._begun, strict=True)
        ]
