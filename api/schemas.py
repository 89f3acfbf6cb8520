"""Request bodies: JSON bytes -> checked, typed objects. Knows neither engine nor socket.

Null counts as absent everywhere, since OpenAI clients send it for defaults. Fields that are in
no schema are ignored, save those of `api.unsupported`, which would change the answer.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import ClassVar, TypeVar

import msgspec
import orjson

from api.chat import ROLE_OF_NAME, ChatMessage
from api.errors import invalid
from api.generation_body import MAX_NUM_CHOICES, GenerationBody
from api.json_depth import check_depth
from api.sampling import MAX_TOKEN_ID, Integer, integer
from api.tools import ToolCallBody, ToolFields, chat_calls
from api.unsupported import CHAT, COMPLETIONS, refuse_unsupported
from config.convert import did_you_mean

BodyT = TypeVar("BodyT", bound=msgspec.Struct)
GenerationT = TypeVar("GenerationT", bound=GenerationBody)

PATH_OF_ERROR = re.compile(r"^(?P<what>.*) - at `\$\.?(?P<path>[^`]*)`$", re.DOTALL)
MAX_NUM_PROMPTS = 2048
MAX_TOP_LOGPROBS_CHAT = 20
MAX_TOP_LOGPROBS = 5

PromptField = str | list[str | int | list[int]]


class ContentPart(msgspec.Struct, kw_only=True):
    type: str
    text: str | None = None


class MessageBody(msgspec.Struct, kw_only=True):
    role: str
    content: str | list[ContentPart] | None = None
    tool_calls: list[ToolCallBody] | None = None
    tool_call_id: str | None = None


class ChatBody(ToolFields, kw_only=True):
    """POST /v1/chat/completions."""

    messages: list[MessageBody] | None = None
    logprobs: bool | None = None
    top_logprobs: Integer | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None

    @property
    def asks_answer(self) -> bool:
        """Whether the prompt ends where the assistant begins to speak."""
        return not self.continues_last and self.add_generation_prompt is not False

    @property
    def continues_last(self) -> bool:
        """Whether the answer goes on with the last message."""
        return self.continue_final_message is True

    @property
    def num_top_logprobs(self) -> int | None:
        count = integer("top_logprobs", self.top_logprobs or 0, 0, MAX_TOP_LOGPROBS_CHAT)
        if count and not self.logprobs:
            raise invalid("'top_logprobs' goes with 'logprobs': true only", "top_logprobs")
        return count if self.logprobs else None

    def check(self) -> None:
        super().check()
        if self.tool_use() is not None:
            self._check_asks_answer()
        if self.continues_last:
            self._check_continues_last()

    def _check_asks_answer(self) -> None:
        """Calls are looked for in whole answers only."""
        if self.continues_last or not self.asks_answer or (self.state and not self.messages):
            raise invalid(
                "'tools' need 'messages' and a prompt that ends where the assistant begins to "
                "speak; send 'tool_choice' = 'none' to go on with a text",
                "tools",
            )

    def _check_continues_last(self) -> None:
        if self.add_generation_prompt:
            raise invalid(
                "'continue_final_message' and 'add_generation_prompt' exclude each other; send one "
                "of them",
                "continue_final_message",
            )
        last = self.messages[-1] if self.messages else None
        if last is None or last.role.strip().lower() != "assistant":
            raise invalid(
                "'continue_final_message' goes on with an answer, so the last of 'messages' must "
                "have the role assistant",
                "continue_final_message",
            )
        if last.tool_calls:
            raise invalid(
                "'continue_final_message' goes on with a text, and the last message has "
                "'tool_calls'",
                "continue_final_message",
            )

    def chat_messages(self) -> list[ChatMessage]:
        """The messages, checked; none only where a state goes on. Raises ApiError 400."""
        if not self.messages and self.state is None and self.resume is None:
            raise invalid("'messages' must be a list of at least one message", param="messages")
        return chat_messages(self.messages or [])


class CompletionBody(GenerationBody, kw_only=True):
    """POST /v1/completions."""

    LEAST_MAX_TOKENS: ClassVar[int] = 0

    prompt: PromptField | None = None
    best_of: Integer | None = None
    echo: bool | None = None
    logprobs: Integer | None = None

    @property
    def num_candidates(self) -> int:
        if self.best_of is None:
            return self.num_choices
        low = self.num_choices
        return integer("best_of", self.best_of, low, MAX_NUM_CHOICES, "'n' of them are returned")

    @property
    def num_prompts(self) -> int:
        is_list = isinstance(self.prompt, list) and not is_ids(self.prompt)
        return len(self.prompt or ()) if is_list else 1

    @property
    def num_top_logprobs(self) -> int | None:
        if self.logprobs is None:
            return None
        return integer("logprobs", self.logprobs, 0, MAX_TOP_LOGPROBS)

    @property
    def echoes(self) -> bool:
        return self.echo or False

    def prompts(self) -> list[str | tuple[int, ...]]:
        """Texts or token ids, at least one. Raises ApiError 400."""
        if self.prompt is not None:
            return texts_or_ids(self.prompt)
        if self.state is None and self.resume is None:
            raise invalid(
                "'prompt' is missing: send a string or a list of token ids, or a list of these",
                "prompt",
            )
        return [""]

    def check(self) -> None:
        super().check()
        if self.stream and self.num_candidates > self.num_choices:
            raise invalid(
                f"'best_of' = {self.best_of} answers can only be compared when they are complete; "
                "leave out 'stream', or ask for 'n' answers",
                "best_of",
            )
        if self.echo and self.resumable:
            raise invalid(
                "'echo' repeats the prompt, which an answer that is resumed does not know; leave "
                "out 'echo' or 'resumable'",
                "echo",
            )


def chat_messages(messages: Sequence[MessageBody]) -> list[ChatMessage]:
    """Checked. Raises ApiError 400 that names the place."""
    return [_message(index, message) for index, message in enumerate(messages)]


def texts_or_ids(prompt: PromptField) -> list[str | tuple[int, ...]]:
    """The prompts in any of their forms. Raises ApiError 400."""
    if isinstance(prompt, str):
        return [prompt]
    if is_ids(prompt):
        return [_token_ids(prompt)]
    if len(prompt) > MAX_NUM_PROMPTS:
        raise invalid(f"'prompt' has {len(prompt)} prompts, at most {MAX_NUM_PROMPTS}", "prompt")
    return [item if isinstance(item, str) else _token_ids(item) for item in prompt]


def is_ids(prompt: Sequence[str | int | list[int]]) -> bool:
    """It is meant as one prompt of token ids."""
    return not prompt or isinstance(prompt[0], int)


def text_or_ids(prompt: PromptField) -> str | tuple[int, ...]:
    """The one prompt in any of its forms. Raises ApiError 400."""
    only, *others = texts_or_ids(prompt)
    if others:
        raise invalid(f"'prompt' has {1 + len(others)} prompts, must be one", "prompt")
    return only


class ReloadBody(msgspec.Struct, kw_only=True):
    """POST /admin/models/reload."""

    upsert: list[dict[str, object]] = []
    remove_model_names: list[str] = []
    dry_run: bool = False


def parse_chat(data: bytes) -> ChatBody:
    """Raises ApiError 400 that names the first field in the way."""
    return _parse_generation(data, ChatBody, CHAT)


def parse_completion(data: bytes) -> CompletionBody:
    """Raises ApiError 400 that names the first field in the way."""
    return _parse_generation(data, CompletionBody, COMPLETIONS)


def parse_reload(data: bytes) -> ReloadBody:
    """Unknown fields are errors here: a misspelt `dry_run` must not change anything."""
    return parse_strict(data, ReloadBody)


def parse_strict(data: bytes, kind: type[BodyT]) -> BodyT:
    """Raises ApiError 400, for fields that `kind` does not have too."""
    return convert_strict(json_object(data), kind)


def convert_strict(
    fields: Mapping[str, object], kind: type[BodyT], *, is_text: bool = False
) -> BodyT:
    """With `is_text` all values are strings, as in the query of a URL. Raises ApiError 400."""
    known = kind.__struct_fields__
    for name in fields:
        if name not in known:
            raise invalid(f"unknown field {name!r}{did_you_mean(name, known)}", param=name)
    return _convert(fields, kind, is_text=is_text)


def _parse_generation(
    data: bytes, kind: type[GenerationT], unsupported: Mapping[str, tuple[object, ...]]
) -> GenerationT:
    fields = json_object(data)
    refuse_unsupported(fields, unsupported)
    body = _convert(fields, kind)
    body.check()
    return body


def json_object(data: bytes) -> dict[str, object]:
    try:
        # orjson, not msgspec: it refuses lone surrogates and NaN, which no tokenizer can take.
        fields = orjson.loads(data)
    except orjson.JSONDecodeError as error:
        raise invalid(f"the body is not valid JSON: {error}", code="invalid_json") from None
    if not isinstance(fields, dict):
        raise invalid("the body must be a JSON object", code="invalid_json")
    check_depth(data, fields)
    return fields


def _convert(fields: Mapping[str, object], kind: type[BodyT], *, is_text: bool = False) -> BodyT:
    try:
        return msgspec.convert(fields, kind, strict=not is_text)
    except msgspec.ValidationError as error:
        match = PATH_OF_ERROR.match(str(error))
        path = match["path"] if match else ""
        what = match["what"] if match else str(error)
        place = f"'{path}': " if path else ""
        raise invalid(f"{place}{what.replace('`', '')}", param=path or None) from None


def _message(index: int, message: MessageBody) -> ChatMessage:
    place = f"messages[{index}]"
    role = ROLE_OF_NAME.get(message.role.strip().lower())
    if role is None:
        known = ", ".join(ROLE_OF_NAME)
        raise invalid(
            f"'{place}.role' = {message.role!r} is unknown; known are {known}", f"{place}.role"
        )
    if message.tool_calls and role != "assistant":
        raise invalid(
            f"'{place}.tool_calls' belongs to messages with role assistant", f"{place}.tool_calls"
        )
    if message.tool_call_id is not None and role != "tool":
        raise invalid(
            f"'{place}.tool_call_id' belongs to messages with role tool", f"{place}.tool_call_id"
        )
    calls = chat_calls(message.tool_calls or [], f"{place}.tool_calls")
    return ChatMessage(role, _text(f"{place}.content", message.content), calls)


def _text(place: str, content: str | list[ContentPart] | None) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    texts = []
    for index, part in enumerate(content):
        if part.type != "text" or part.text is None:
            raise invalid(
                f"'{place}[{index}]' of type {part.type!r} is not supported; send parts of type "
                "text with a text",
                f"{place}[{index}]",
            )
        texts.append(part.text)
    return "\n".join(texts)


def _token_ids(prompt: int | Sequence[str | int | list[int]]) -> tuple[int, ...]:
    items = () if isinstance(prompt, int) else prompt
    ids = tuple(item for item in items if isinstance(item, int))
    if not ids or len(ids) != len(items):
        raise invalid(
            "'prompt' must be a string or a non-empty list of token ids, or a list of such prompts",
            "prompt",
        )
    outside = next((token for token in ids if not 0 <= token <= MAX_TOKEN_ID), None)
    if outside is not None:
        raise invalid(f"'prompt' has the token id {outside}, which no vocabulary has", "prompt")
    return ids
