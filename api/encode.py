"""OutputDelta -> the bytes of OpenAI responses and stream chunks. Knows no sockets.

What is the same in every chunk of an answer is encoded once; a token then costs one
`orjson.dumps` of its text and one concatenation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import orjson

from engine.types import FinishReason, OutputDelta


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerHead:
    """What identifies an answer; repeated in each of its chunks."""

    answer_id: str
    created: int  # unix seconds
    model_name: str
    fingerprint: str

    def fields(self, kind: str) -> dict[str, object]:
        return {
            "id": self.answer_id,
            "object": kind,
            "created": self.created,
            "model": self.model_name,
            "system_fingerprint": self.fingerprint,
        }


class Encoder(Protocol):
    """One answer as one JSON object (`whole`), or as a stream of JSON objects (the others).

    Each of the stream's methods gives the JSON objects to send, none of them framed.
    """

    def first(self) -> list[bytes]: ...

    def text(self, text: str) -> list[bytes]: ...

    def last(self, delta: OutputDelta) -> list[bytes]: ...

    def whole(self, delta: OutputDelta) -> bytes: ...


class ChatEncoder:
    """chat.completion and chat.completion.chunk.

    With `strips_start`, white space before the first word is dropped: the prompt ends in
    "Assistant:", so the answer begins with the space after the colon.
    """

    def __init__(
        self, head: AnswerHead, *, has_usage_chunk: bool = False, strips_start: bool = False
    ) -> None:
        self._head = head
        self._usage_chunk = has_usage_chunk
        self._strips = strips_start
        chunk = head.fields("chat.completion.chunk") | {"choices": [_HOLE]}
        self._before, self._after = _around_hole(chunk, has_usage_chunk)

    def first(self) -> list[bytes]:
        return [self._chunk({"role": "assistant", "content": ""}, None)]

    def text(self, text: str) -> list[bytes]:
        if self._strips:
            text = text.lstrip()
            self._strips = not text
        if not text:
            return []
        choice = b'{"index":0,"delta":{"content":%b},"logprobs":null,"finish_reason":null}'
        return [b"".join((self._before, choice % orjson.dumps(text), self._after))]

    def last(self, delta: OutputDelta) -> list[bytes]:
        assert delta.finish_reason is not None, "not the last delta"
        end = [self._chunk({}, delta.finish_reason)]
        if self._usage_chunk:
            end.append(_usage_chunk(self._head.fields("chat.completion.chunk"), delta))
        return end

    def whole(self, delta: OutputDelta) -> bytes:
        text = delta.text.lstrip() if self._strips else delta.text
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": text, "refusal": None},
            "logprobs": None,
            "finish_reason": delta.finish_reason,
        }
        answer = {"choices": [choice], "usage": usage(delta)}
        return orjson.dumps(self._head.fields("chat.completion") | answer)

    def _chunk(self, delta: dict[str, str], finish_reason: FinishReason | None) -> bytes:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        return b"".join((self._before, orjson.dumps(choice), self._after))


class CompletionEncoder:
    """text_completion, whole and as chunks, with the three extra fields of rwkv-rs."""

    def __init__(
        self, head: AnswerHead, *, stops: Sequence[str] = (), has_usage_chunk: bool = False
    ) -> None:
        self._head = head
        self._stops = list(stops)
        self._usage_chunk = has_usage_chunk
        chunk = head.fields("text_completion") | {"choices": [_HOLE]}
        self._before, self._after = _around_hole(chunk, has_usage_chunk)

    def first(self) -> list[bytes]:
        return []

    def text(self, text: str) -> list[bytes]:
        if not text:
            return []
        choice = b'{"text":%b,"index":0,"logprobs":null,"finish_reason":null}'
        return [b"".join((self._before, choice % orjson.dumps(text), self._after))]

    def last(self, delta: OutputDelta) -> list[bytes]:
        assert delta.finish_reason is not None, "not the last delta"
        choice = orjson.dumps(self._choice("", delta))
        end = [b"".join((self._before, choice, self._after))]
        if self._usage_chunk:
            end.append(_usage_chunk(self._head.fields("text_completion"), delta))
        return end

    def whole(self, delta: OutputDelta) -> bytes:
        answer = {"choices": [self._choice(delta.text, delta)], "usage": usage(delta)}
        return orjson.dumps(self._head.fields("text_completion") | answer)

    def _choice(self, text: str, delta: OutputDelta) -> dict[str, object]:
        choice: dict[str, object] = {
            "text": text,
            "index": 0,
            "logprobs": None,
            "finish_reason": delta.finish_reason,
            "generated_tokens": delta.num_output_tokens,
        }
        if delta.matched_stop is not None:
            choice["matched_stop_suffix"] = delta.matched_stop
            choice["matched_stop_suffix_index"] = self._stops.index(delta.matched_stop)
        return choice


def usage(delta: OutputDelta) -> dict[str, object]:
    """OpenAI's usage object. The begin-of-document token counts as a prompt token."""
    return {
        "prompt_tokens": delta.num_prompt_tokens,
        "completion_tokens": delta.num_output_tokens,
        "total_tokens": delta.num_prompt_tokens + delta.num_output_tokens,
        "prompt_tokens_details": {"cached_tokens": delta.num_cached_tokens},
    }


_HOLE = 0  # stands for the choice of a chunk while its surroundings are encoded


def _around_hole(chunk: dict[str, object], has_usage_chunk: bool) -> tuple[bytes, bytes]:
    """The JSON before and after the one choice. With a usage chunk to come, others say null."""
    if has_usage_chunk:
        chunk = chunk | {"usage": None}
    before, hole, after = orjson.dumps(chunk).rpartition(b'"choices":[0]')
    return before + hole[:-2], hole[-1:] + after


def _usage_chunk(fields: dict[str, object], delta: OutputDelta) -> bytes:
    return orjson.dumps(fields | {"choices": [], "usage": usage(delta)})
