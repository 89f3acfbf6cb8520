"""What a guest has asked, what it must be told, and what its state must hold. Knows no engine."""

from __future__ import annotations

from dataclasses import dataclass, field

from engine.client import RequestStream
from engine.types import EngineRequest, FinishReason
from tests.engine.replica import hash_tokenizer
from tests.hash_model import oracle


@dataclass(slots=True, eq=False)
class Kept:
    """A state that somebody has an id of, and what is in it."""

    state_id: str
    owner: str
    base: tuple[int, int]


@dataclass(slots=True, eq=False)
class Asked:
    request: EngineRequest
    base: tuple[int, int]
    expected: tuple[tuple[int, ...], FinishReason, str] = field(init=False)
    stream: RequestStream | None = None
    tokens: tuple[int, ...] = ()
    text: str = ""
    is_aborted: bool = False
    reason: FinishReason | None = None

    def __post_init__(self) -> None:
        self.expected = expected(self.request, self.base)


def expected(
    request: EngineRequest, base: tuple[int, int]
) -> tuple[tuple[int, ...], FinishReason, str]:
    """Tokens, end and text of a request run alone, stop strings included."""
    answer = oracle(request, base=base)
    word, text = hash_tokenizer().token_bytes, b""
    for place, token in enumerate(answer.token_ids, start=1):
        if token in request.sampling.stop_token_ids:
            break
        text += word(token)
        stops = [stop.encode() for stop in request.sampling.stop if stop.encode() in text]
        if stops:
            shown = text[: min(map(text.index, stops))].decode("utf-8", "replace")
            return answer.token_ids[:place], FinishReason.STOP, shown
    return answer.token_ids, answer.finish_reason, text.decode("utf-8", "replace")


def emitted_ids(
    request: EngineRequest, tokens: tuple[int, ...], stop: str | None
) -> tuple[int, ...]:
    """The tokens of an answer that its state holds."""
    tokenizer = hash_tokenizer()
    ids = tuple(token for token in tokens if token not in request.sampling.stop_token_ids)
    if stop is None:
        return ids
    data = b"".join(map(tokenizer.token_bytes, ids))
    data, kept = data[: data.index(stop.encode())], []
    for token in ids:
        word = tokenizer.token_bytes(token)
        if len(word) > len(data):
            break
        kept.append(token)
        data = data[len(word) :]
    return (*kept, *tokenizer.encode_bytes(data))
