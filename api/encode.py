"""OutputDelta -> the bytes of OpenAI responses and stream chunks: what both protocols share.

What is the same in every chunk of an answer is encoded once; a token then costs one
`orjson.dumps` of its text and one concatenation. Knows no sockets.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import orjson

from api.states import state_object
from engine.tokenizer import Tokenizer
from engine.types import OutputDelta

Usage = dict[str, object]


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerHead:
    """What identifies an answer; repeated in each of its chunks."""

    answer_id: str
    created: int  # unix seconds
    model_name: str
    fingerprint: str
    num_choices: int = 1
    returns_state: bool = False  # the state at the end was asked for

    def fields(self, kind: str) -> dict[str, object]:
        return {
            "id": self.answer_id,
            "object": kind,
            "created": self.created,
            "model": self.model_name,
            "system_fingerprint": self.fingerprint,
        }

    def endings(self, delta: OutputDelta) -> dict[str, object]:
        """Fields beside `choices` that the end of an answer brings."""
        fields: dict[str, object] = {}
        if delta.state is not None:
            fields["state"] = state_object(delta.state, self.model_name)
        elif self.returns_state and delta.resume_id is None:
            fields["state"] = None  # it could not be kept
        if delta.resume_id is not None:
            fields["resume"] = {"id": delta.resume_id}
        return fields


@dataclass(frozen=True, slots=True, kw_only=True)
class Details:
    """What is told of each choice beside its text."""

    logprobs_by: Tokenizer | None = None  # log probabilities, of tokens of this vocabulary
    has_token_ids: bool = False


@dataclass(frozen=True, slots=True)
class ChoicePrompt:
    """What a choice continues."""

    text: str
    ids: tuple[int, ...]


class Encoder(Protocol):
    """Answers as one JSON object (`whole`), or as a stream of JSON objects (the others).

    Each of the stream's methods gives the JSON objects to send, none of them framed; `index` is
    the number of the choice.
    """

    def first(self) -> list[bytes]: ...

    def piece(self, index: int, delta: OutputDelta) -> list[bytes]:
        """What a delta adds to its choice, the last one too."""
        ...

    def last(self, index: int, delta: OutputDelta) -> list[bytes]:
        """The end of one choice, after its last piece."""
        ...

    def end(self, usage: Usage) -> list[bytes]:
        """The end of all of them."""
        ...

    def whole(self, deltas: Sequence[OutputDelta], usage: Usage) -> bytes: ...


class ChunkFrame:
    """What surrounds the one choice of a chunk."""

    def __init__(self, head: AnswerHead, kind: str, has_usage_chunk: bool) -> None:
        self._head = head
        self._kind = kind
        self._usage_chunk = has_usage_chunk
        chunk = head.fields(kind) | {"choices": [_HOLE]}
        if has_usage_chunk:
            chunk |= {"usage": None}  # until the chunk that has it
        before, hole, after = orjson.dumps(chunk).rpartition(b'"choices":[0]')
        self._before, self._after = before + hole[:-2], hole[-1:] + after

    def around(self, choice: bytes) -> bytes:
        return b"".join((self._before, choice, self._after))

    def around_with(self, choice: dict[str, object], fields: dict[str, object]) -> bytes:
        """With further fields beside `choices`."""
        chunk = self.around(orjson.dumps(choice))
        return chunk[:-1] + b"," + orjson.dumps(fields)[1:] if fields else chunk

    def around_last(self, choice: dict[str, object], delta: OutputDelta) -> bytes:
        return self.around_with(choice, self._head.endings(delta))

    def end(self, usage: Usage) -> list[bytes]:
        """The chunk with the usage, where one was asked for."""
        if not self._usage_chunk:
            return []
        return [orjson.dumps(self._head.fields(self._kind) | {"choices": [], "usage": usage})]


def whole_answer(
    head: AnswerHead,
    kind: str,
    choices: Sequence[dict[str, object]],
    deltas: Sequence[OutputDelta],
    usage: Usage,
    beside: Mapping[str, object],
) -> bytes:
    """`beside` are further fields beside `choices`."""
    fields = {"choices": choices, "usage": usage, **beside} | head.endings(deltas[0])
    return orjson.dumps(head.fields(kind) | fields)


def usage_of(
    answers: Sequence[OutputDelta],
    num_per_prompt: int = 1,
    reported_context_len: int = 0,
    num_reasoning_tokens: int | None = None,
) -> Usage:
    """OpenAI's usage object for all answers, `num_per_prompt` to each prompt, which counts once.

    The begin-of-document token counts as a prompt token, the tokens of a continued state do not.
    Beyond `reported_context_len` tokens of state, prompt and answer it says so; 0 = never.
    `num_reasoning_tokens` are those of all thoughts; None where there are no chat messages.
    """
    firsts = answers[::num_per_prompt]
    num_prompt_tokens = sum(first.num_prompt_tokens for first in firsts)
    num_output_tokens = sum(answer.num_output_tokens for answer in answers)
    details = {"cached_tokens": sum(first.num_cached_tokens for first in firsts)}
    if firsts[0].num_state_tokens:
        details["state_tokens"] = firsts[0].num_state_tokens
    usage: Usage = {
        "prompt_tokens": num_prompt_tokens,
        "completion_tokens": num_output_tokens,
        "total_tokens": num_prompt_tokens + num_output_tokens,
        "prompt_tokens_details": details,
    }
    if num_reasoning_tokens is not None:
        usage["completion_tokens_details"] = {"reasoning_tokens": num_reasoning_tokens}
    if any(_context_len(answer) > reported_context_len > 0 for answer in answers):
        usage["context_exceeded"] = True
    return usage


def num_reasoning_tokens(usage: Usage) -> int:
    """Those of all thoughts, as far as they are known."""
    details = usage.get("completion_tokens_details")
    found = details.get("reasoning_tokens") if isinstance(details, dict) else None
    return found if isinstance(found, int) else 0


_HOLE = 0  # stands for the choice of a chunk while its surroundings are encoded


def _context_len(answer: OutputDelta) -> int:
    return answer.num_state_tokens + answer.num_prompt_tokens + answer.num_output_tokens
