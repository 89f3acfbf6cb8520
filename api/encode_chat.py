"""OutputDelta -> chat.completion and chat.completion.chunk. Knows no sockets."""

from __future__ import annotations

from collections.abc import Sequence

import orjson

from api.encode import AnswerHead, ChoicePrompt, ChunkFrame, Details, Usage, whole_answer
from api.logprobs import ChatLogprobs
from engine.types import OutputDelta

CHUNK = "chat.completion.chunk"


class ChatEncoder:
    """With `strips_start`, white space before the first word is dropped: the prompt ends in
    "Assistant:", so the answer begins with the space after the colon. (It stays in the tokens
    that log probabilities are told of.)

    `prompt` is needed for token ids.
    """

    def __init__(
        self,
        head: AnswerHead,
        *,
        has_usage_chunk: bool = False,
        strips_start: bool = False,
        details: Details | None = None,
        prompt: ChoicePrompt | None = None,
    ) -> None:
        self._head = head
        self._frame = ChunkFrame(head, CHUNK, has_usage_chunk)
        self._unbegun = set(range(head.num_choices)) if strips_start else set()
        details = details or Details()
        self._has_token_ids = details.has_token_ids
        tokenizer = details.logprobs_by
        self._logprobs = (
            None
            if tokenizer is None
            else [ChatLogprobs(tokenizer) for _ in range(head.num_choices)]
        )
        self._beside: dict[str, object] = {}  # what the answer says of its prompt
        if details.has_token_ids and prompt is not None:
            self._beside["prompt_token_ids"] = prompt.ids

    def first(self) -> list[bytes]:
        delta = {"role": "assistant", "content": ""}
        chunks = []
        for index in range(self._head.num_choices):
            choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
            chunks.append(self._frame.around_with(choice, {} if index else self._beside))
        return chunks

    def piece(self, index: int, delta: OutputDelta) -> list[bytes]:
        text = self._text(index, delta)
        if self._logprobs is None and not self._has_token_ids:
            if not text:
                return []
            fast = b'{"index":%d,"delta":{"content":%b},"logprobs":null,"finish_reason":null}'
            return [self._frame.around(fast % (index, orjson.dumps(text)))]
        if not text and not delta.token_ids:
            return []
        choice: dict[str, object] = {
            "index": index,
            "delta": {"content": text},
            "finish_reason": None,
        }
        return [self._frame.around(orjson.dumps(choice | self._details(index, delta)))]

    def last(self, index: int, delta: OutputDelta) -> list[bytes]:
        assert delta.finish_reason is not None, "not the last delta"
        choice: dict[str, object] = {
            "index": index,
            "delta": {},
            "logprobs": None,
            "finish_reason": delta.finish_reason,
        }
        return [self._frame.around_last(choice, delta)]

    def end(self, usage: Usage) -> list[bytes]:
        return self._frame.end(usage)

    def whole(self, deltas: Sequence[OutputDelta], usage: Usage) -> bytes:
        choices = [self._choice(index, delta) for index, delta in enumerate(deltas)]
        return whole_answer(self._head, "chat.completion", choices, deltas, usage, self._beside)

    def _choice(self, index: int, delta: OutputDelta) -> dict[str, object]:
        message = {"role": "assistant", "content": self._text(index, delta), "refusal": None}
        return {
            "index": index,
            "message": message,
            **self._details(index, delta),
            "finish_reason": delta.finish_reason,
        }

    def _text(self, index: int, delta: OutputDelta) -> str:
        if index not in self._unbegun:
            return delta.text
        text = delta.text.lstrip()
        if text:
            self._unbegun.discard(index)
        return text

    def _details(self, index: int, delta: OutputDelta) -> dict[str, object]:
        logprobs = None if self._logprobs is None else self._logprobs[index].answer(delta)
        fields: dict[str, object] = {"logprobs": logprobs}
        if self._has_token_ids:
            fields["token_ids"] = delta.token_ids
        return fields
