"""OutputDelta -> chat.completion and chat.completion.chunk. Knows no sockets."""

from __future__ import annotations

import uuid
from collections.abc import Sequence

import orjson

from api.answer_parts import CallArguments, CallBegin, Content, Part, Reasoning
from api.answer_reader import AnswerForm, MessageReader
from api.encode import AnswerHead, ChoicePrompt, ChunkFrame, Details, Usage, whole_answer
from api.logprobs import ChatLogprobs
from engine.types import FinishReason, OutputDelta

CHUNK = "chat.completion.chunk"


class ChatEncoder:
    """`form` says what the answers may hold, `text_before` what a resumed one has said.

    Log probabilities are told of all tokens, also of those whose text belongs to the form.
    `prompt` is needed for token ids.
    """

    def __init__(
        self,
        head: AnswerHead,
        *,
        has_usage_chunk: bool = False,
        form: AnswerForm = AnswerForm(),  # noqa: B008 (frozen)
        text_before: str = "",
        details: Details | None = None,
        prompt: ChoicePrompt | None = None,
    ) -> None:
        self._head = head
        self._frame = ChunkFrame(head, CHUNK, has_usage_chunk)
        self._readers = [MessageReader(form) for _ in range(head.num_choices)]
        for reader in self._readers:
            reader.feed(text_before)
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
        deltas = [_delta(part) for part in self._readers[index].feed(delta.text)]
        if self._logprobs is None and not self._has_token_ids:
            return [self._chunk(index, one) for one in deltas]
        if not deltas and not delta.token_ids:
            return []
        first, *others = deltas or [b'{"content":""}']
        details = orjson.dumps(self._details(index, delta))
        choice = b'{"index":%d,"delta":%b,"finish_reason":null,%b' % (index, first, details[1:])
        return [self._frame.around(choice), *(self._chunk(index, one) for one in others)]

    def last(self, index: int, delta: OutputDelta) -> list[bytes]:
        assert delta.finish_reason is not None, "not the last delta"
        reader = self._readers[index]
        held = [self._chunk(index, _delta(part)) for part in _end(reader, delta)]
        choice: dict[str, object] = {
            "index": index,
            "delta": {},
            "logprobs": None,
            "finish_reason": _finish_reason(delta.finish_reason, reader),
        }
        return [*held, self._frame.around_last(choice, delta)]

    def end(self, usage: Usage) -> list[bytes]:
        return self._frame.end(usage)

    def whole(self, deltas: Sequence[OutputDelta], usage: Usage) -> bytes:
        choices = [self._choice(index, delta) for index, delta in enumerate(deltas)]
        return whole_answer(self._head, "chat.completion", choices, deltas, usage, self._beside)

    def _choice(self, index: int, delta: OutputDelta) -> dict[str, object]:
        reader = self._readers[index]
        return {
            "index": index,
            "message": chat_message(reader.feed(delta.text) + _end(reader, delta)),
            **self._details(index, delta),
            "finish_reason": _finish_reason(delta.finish_reason, reader),
        }

    def _chunk(self, index: int, delta: bytes) -> bytes:
        choice = b'{"index":%d,"delta":%b,"logprobs":null,"finish_reason":null}'
        return self._frame.around(choice % (index, delta))

    def _details(self, index: int, delta: OutputDelta) -> dict[str, object]:
        logprobs = None if self._logprobs is None else self._logprobs[index].answer(delta)
        fields: dict[str, object] = {"logprobs": logprobs}
        if self._has_token_ids:
            fields["token_ids"] = delta.token_ids
        return fields


def chat_message(parts: Sequence[Part]) -> dict[str, object]:
    """The message of a whole answer. A thought has two names, as with vLLM, old and new."""
    content = "".join(part.text for part in parts if isinstance(part, Content))
    reasoning = "".join(part.text for part in parts if isinstance(part, Reasoning))
    called: dict[int, tuple[str, str]] = {}
    for part in parts:
        if isinstance(part, CallBegin):
            called[part.index] = part.name, ""
        elif isinstance(part, CallArguments):  # of a call that may have begun before a resumption
            name, before = called.get(part.index, ("", ""))
            called[part.index] = name, before + part.text
    calls = [_call(name, arguments) for name, arguments in called.values()]
    message: dict[str, object] = {"role": "assistant", "content": content, "refusal": None}
    if reasoning:
        message |= {"reasoning_content": reasoning, "reasoning": reasoning}
    if calls:
        message |= {"content": content or None, "tool_calls": calls}
    return message


def _call(name: str, arguments: str = "") -> dict[str, object]:
    function = {"name": name, "arguments": arguments}
    return {"id": f"call_{uuid.uuid4().hex}", "type": "function", "function": function}


def _end(reader: MessageReader, delta: OutputDelta) -> list[Part]:
    """What was held back; of a suspended answer it comes when that goes on."""
    return [] if delta.finish_reason is FinishReason.SUSPENDED else reader.finish()


def _finish_reason(reason: FinishReason | None, reader: MessageReader) -> str | None:
    return "tool_calls" if reason is FinishReason.STOP and reader.has_called else reason


def _delta(part: Part) -> bytes:
    """As the delta of a chunk."""
    match part:
        case Content(text):
            return b'{"content":%b}' % orjson.dumps(text)
        case Reasoning(text):
            json = orjson.dumps(text)
            return b'{"reasoning_content":%b,"reasoning":%b}' % (json, json)
        case CallBegin(number, name):
            return orjson.dumps({"tool_calls": [{"index": number} | _call(name)]})
        case CallArguments(number, text):
            call = {"index": number, "function": {"arguments": text}}
            return orjson.dumps({"tool_calls": [call]})
