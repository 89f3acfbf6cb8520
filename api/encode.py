"""OutputDelta -> the bytes of OpenAI responses and stream chunks. Knows no sockets.

What is the same in every chunk of an answer is encoded once; a token then costs one
`orjson.dumps` of its text and one concatenation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import orjson

from api.states import state_object
from engine.types import FinishReason, OutputDelta

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


class Encoder(Protocol):
    """Answers as one JSON object (`whole`), or as a stream of JSON objects (the others).

    Each of the stream's methods gives the JSON objects to send, none of them framed; `index` is
    the number of the choice.
    """

    def first(self) -> list[bytes]: ...

    def text(self, index: int, text: str) -> list[bytes]: ...

    def last(self, index: int, delta: OutputDelta) -> list[bytes]:
        """The end of one choice."""
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

    def around_last(self, choice: dict[str, object], delta: OutputDelta) -> bytes:
        chunk = self.around(orjson.dumps(choice))
        endings = self._head.endings(delta)
        return chunk[:-1] + b"," + orjson.dumps(endings)[1:] if endings else chunk

    def end(self, usage: Usage) -> list[bytes]:
        """The chunk with the usage, where one was asked for."""
        if not self._usage_chunk:
            return []
        return [orjson.dumps(self._head.fields(self._kind) | {"choices": [], "usage": usage})]


class ChatEncoder:
    """chat.completion and chat.completion.chunk.

    With `strips_start`, white space before the first word is dropped: the prompt ends in
    "Assistant:", so the answer begins with the space after the colon.
    """

    def __init__(
        self, head: AnswerHead, *, has_usage_chunk: bool = False, strips_start: bool = False
    ) -> None:
        self._head = head
        self._frame = ChunkFrame(head, "chat.completion.chunk", has_usage_chunk)
        self._unbegun = set(range(head.num_choices)) if strips_start else set()

    def first(self) -> list[bytes]:
        delta = {"role": "assistant", "content": ""}
        return [
            self._frame.around(orjson.dumps(_chat_choice(index, delta, None)))
            for index in range(self._head.num_choices)
        ]

    def text(self, index: int, text: str) -> list[bytes]:
        if index in self._unbegun:
            text = text.lstrip()
            if text:
                self._unbegun.discard(index)
        if not text:
            return []
        choice = b'{"index":%d,"delta":{"content":%b},"logprobs":null,"finish_reason":null}'
        return [self._frame.around(choice % (index, orjson.dumps(text)))]

    def last(self, index: int, delta: OutputDelta) -> list[bytes]:
        assert delta.finish_reason is not None, "not the last delta"
        return [self._frame.around_last(_chat_choice(index, {}, delta.finish_reason), delta)]

    def end(self, usage: Usage) -> list[bytes]:
        return self._frame.end(usage)

    def whole(self, deltas: Sequence[OutputDelta], usage: Usage) -> bytes:
        choices: list[dict[str, object]] = [
            {
                "index": index,
                "message": {
                    "role": "assistant",
                    "content": delta.text.lstrip() if index in self._unbegun else delta.text,
                    "refusal": None,
                },
                "logprobs": None,
                "finish_reason": delta.finish_reason,
            }
            for index, delta in enumerate(deltas)
        ]
        return _whole(self._head, "chat.completion", choices, deltas, usage)


class CompletionEncoder:
    """text_completion, whole and as chunks, with the three extra fields of rwkv-rs."""

    def __init__(
        self, head: AnswerHead, *, stops: Sequence[str] = (), has_usage_chunk: bool = False
    ) -> None:
        self._head = head
        self._stops = list(stops)
        self._frame = ChunkFrame(head, "text_completion", has_usage_chunk)

    def first(self) -> list[bytes]:
        return []

    def text(self, index: int, text: str) -> list[bytes]:
        if not text:
            return []
        choice = b'{"text":%b,"index":%d,"logprobs":null,"finish_reason":null}'
        return [self._frame.around(choice % (orjson.dumps(text), index))]

    def last(self, index: int, delta: OutputDelta) -> list[bytes]:
        assert delta.finish_reason is not None, "not the last delta"
        return [self._frame.around_last(self._choice(index, "", delta), delta)]

    def end(self, usage: Usage) -> list[bytes]:
        return self._frame.end(usage)

    def whole(self, deltas: Sequence[OutputDelta], usage: Usage) -> bytes:
        choices = [self._choice(index, delta.text, delta) for index, delta in enumerate(deltas)]
        return _whole(self._head, "text_completion", choices, deltas, usage)

    def _choice(self, index: int, text: str, delta: OutputDelta) -> dict[str, object]:
        choice: dict[str, object] = {
            "text": text,
            "index": index,
            "logprobs": None,
            "finish_reason": delta.finish_reason,
            "generated_tokens": delta.num_output_tokens,
        }
        if delta.matched_stop is not None:
            choice["matched_stop_suffix"] = delta.matched_stop
            if delta.matched_stop in self._stops:  # a resumed answer's are not known here
                choice["matched_stop_suffix_index"] = self._stops.index(delta.matched_stop)
        return choice


def usage_of(answers: Sequence[OutputDelta], reported_context_len: int = 0) -> Usage:
    """OpenAI's usage object for all answers to one prompt, which counts once.

    The begin-of-document token counts as a prompt token, the tokens of a continued state do not.
    Beyond `reported_context_len` tokens of state, prompt and answer it says so; 0 = never.
    """
    first = answers[0]
    num_output_tokens = sum(answer.num_output_tokens for answer in answers)
    details = {"cached_tokens": first.num_cached_tokens}
    if first.num_state_tokens:
        details["state_tokens"] = first.num_state_tokens
    usage: Usage = {
        "prompt_tokens": first.num_prompt_tokens,
        "completion_tokens": num_output_tokens,
        "total_tokens": first.num_prompt_tokens + num_output_tokens,
        "prompt_tokens_details": details,
    }
    if any(_context_len(answer) > reported_context_len > 0 for answer in answers):
        usage["context_exceeded"] = True
    return usage


_HOLE = 0  # stands for the choice of a chunk while its surroundings are encoded


def _context_len(answer: OutputDelta) -> int:
    return answer.num_state_tokens + answer.num_prompt_tokens + answer.num_output_tokens


def _chat_choice(
    index: int, delta: dict[str, str], finish_reason: FinishReason | None
) -> dict[str, object]:
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish_reason}


def _whole(
    head: AnswerHead,
    kind: str,
    choices: Sequence[dict[str, object]],
    deltas: Sequence[OutputDelta],
    usage: Usage,
) -> bytes:
    fields = {"choices": choices, "usage": usage} | head.endings(deltas[0])
    return orjson.dumps(head.fields(kind) | fields)
