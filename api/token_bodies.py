"""TokenizeBody, DetokenizeBody: the fields of the tokenizer's routes, those of vLLM.

Knows neither engine nor socket.
"""

from __future__ import annotations

import msgspec

from api.chat import ChatMessage
from api.errors import invalid
from api.schemas import MessageBody, chat_messages, parse_strict


class TokenizeBody(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """POST /tokenize, of a text or of a conversation; null = absent."""

    model: str | None = None
    prompt: str | None = None
    messages: list[MessageBody] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    return_token_strs: bool | None = None

    @property
    def begins_document(self) -> bool:
        return self.add_special_tokens is not False

    def check(self) -> None:
        """Raises ApiError 400 for what does not go together."""
        if (self.prompt is None) == (self.messages is None):
            raise invalid("send 'prompt' or 'messages', one of them", "prompt")
        if self.messages == []:
            raise invalid("'messages' must be a list of at least one message", "messages")
        if self.add_generation_prompt is not None and self.messages is None:
            raise invalid(
                "'add_generation_prompt' goes with 'messages' only", "add_generation_prompt"
            )

    @property
    def chat(self) -> list[ChatMessage] | None:
        return None if self.messages is None else chat_messages(self.messages)


class DetokenizeBody(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """POST /detokenize; null = absent."""

    model: str | None = None
    tokens: list[int] | None = None

    def check(self) -> None:
        if self.tokens is None:
            raise invalid("'tokens' is missing: send a list of token ids", "tokens")


def parse_tokenize(data: bytes) -> TokenizeBody:
    """Raises ApiError 400 that names the first field in the way."""
    body = parse_strict(data, TokenizeBody)
    body.check()
    return body


def parse_detokenize(data: bytes) -> DetokenizeBody:
    """Raises ApiError 400 that names the first field in the way."""
    body = parse_strict(data, DetokenizeBody)
    body.check()
    return body
