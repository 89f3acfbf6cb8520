"""OutputDelta -> text_completion, whole and as chunks, with the extra fields of rwkv-rs.

Knows no sockets.
"""

from __future__ import annotations

from collections.abc import Sequence

import orjson

from api.encode import AnswerHead, ChoicePrompt, ChunkFrame, Details, Usage, whole_answer
from api.logprobs import CompletionLogprobs, Lists, joined
from engine.types import OutputDelta

KIND = "text_completion"


class CompletionEncoder:
    """`prompts`, one per choice, are needed for token ids and for `echoes`: then the text, and
    what is told of it, begin with the prompt."""

    def __init__(
        self,
        head: AnswerHead,
        *,
        stops: Sequence[str] = (),
        has_usage_chunk: bool = False,
        details: Details | None = None,
        prompts: Sequence[ChoicePrompt] = (),
        echoes: bool = False,
    ) -> None:
        self._head = head
        self._stops = list(stops)
        self._frame = ChunkFrame(head, KIND, has_usage_chunk)
        self._prompts = prompts
        self._echoes = echoes
        details = details or Details()
        self._has_token_ids = details.has_token_ids
        tokenizer = details.logprobs_by
        self._logprobs = (
            None
            if tokenizer is None
            else [CompletionLogprobs(tokenizer) for _ in range(head.num_choices)]
        )
        # Choices whose prompt is still to be told of; what the model says of it comes with the
        # first delta.
        has_opening = echoes or (details.has_token_ids and bool(prompts))
        self._unopened = set(range(head.num_choices)) if has_opening else set()

    def first(self) -> list[bytes]:
        if self._echoes and self._logprobs is not None:
            return []
        return [chunk for index in sorted(self._unopened) for chunk in self._opening(index, None)]

    def piece(self, index: int, delta: OutputDelta) -> list[bytes]:
        opening = self._opening(index, delta) if index in self._unopened else []
        if self._logprobs is None and not self._has_token_ids:
            if not delta.text:
                return opening
            fast = b'{"text":%b,"index":%d,"logprobs":null,"finish_reason":null}'
            return [*opening, self._frame.around(fast % (orjson.dumps(delta.text), index))]
        if not delta.text and not delta.token_ids:
            return opening
        choice = self._piece(index, delta.text, self._answer_logprobs(index, delta))
        if self._has_token_ids:
            choice["token_ids"] = delta.token_ids
        return [*opening, self._frame.around(orjson.dumps(choice))]

    def last(self, index: int, delta: OutputDelta) -> list[bytes]:
        assert delta.finish_reason is not None, "not the last delta"
        choice = self._piece(index, "", None) | self._ending(delta)
        return [self._frame.around_last(choice, delta)]

    def end(self, usage: Usage) -> list[bytes]:
        return self._frame.end(usage)

    def whole(self, deltas: Sequence[OutputDelta], usage: Usage) -> bytes:
        choices = [self._choice(index, delta) for index, delta in enumerate(deltas)]
        return whole_answer(self._head, KIND, choices, deltas, usage, {})

    def _choice(self, index: int, delta: OutputDelta) -> dict[str, object]:
        text, logprobs = delta.text, None
        if self._echoes:
            text = self._prompts[index].text + text
            logprobs = self._prompt_logprobs(index, delta)
        logprobs = joined(logprobs, self._answer_logprobs(index, delta))
        choice = self._piece(index, text, logprobs) | self._ending(delta)
        if self._has_token_ids:
            choice["token_ids"] = delta.token_ids
            if self._prompts:
                choice["prompt_token_ids"] = self._prompts[index].ids
        return choice

    def _opening(self, index: int, delta: OutputDelta | None) -> list[bytes]:
        """What is said of the prompt in a stream."""
        self._unopened.discard(index)
        text, logprobs = "", None
        if self._echoes:
            text = self._prompts[index].text
            logprobs = None if delta is None else self._prompt_logprobs(index, delta)
        if not text and logprobs is None and not self._has_token_ids:
            return []
        choice = self._piece(index, text, logprobs)
        if self._has_token_ids:
            choice |= {"token_ids": [], "prompt_token_ids": self._prompts[index].ids}
        return [self._frame.around(orjson.dumps(choice))]

    def _prompt_logprobs(self, index: int, delta: OutputDelta) -> Lists | None:
        if self._logprobs is None:
            return None
        return self._logprobs[index].prompt(self._prompts[index].ids, delta)

    def _answer_logprobs(self, index: int, delta: OutputDelta) -> Lists | None:
        return None if self._logprobs is None else self._logprobs[index].answer(delta)

    def _piece(self, index: int, text: str, logprobs: Lists | None) -> dict[str, object]:
        return {"text": text, "index": index, "logprobs": logprobs, "finish_reason": None}

    def _ending(self, delta: OutputDelta) -> dict[str, object]:
        fields: dict[str, object] = {
            "finish_reason": delta.finish_reason,
            "generated_tokens": delta.num_output_tokens,
        }
        if delta.matched_stop is not None:
            fields["matched_stop_suffix"] = delta.matched_stop
            if delta.matched_stop in self._stops:  # a resumed answer's are not known here
                fields["matched_stop_suffix_index"] = self._stops.index(delta.matched_stop)
        return fields
