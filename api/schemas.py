"""Request bodies: JSON bytes -> checked, typed objects. Knows neither engine nor socket.

Null counts as absent everywhere, since OpenAI clients send it for defaults. Fields that are in
no schema are ignored, save those of `api.unsupported`, which would change the answer.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TypeVar

import msgspec
import orjson

from api.chat import ROLE_OF_NAME, ChatMessage
from api.errors import invalid
from api.sampling import SamplingFields
from api.unsupported import CHAT, COMPLETIONS, refuse_unsupported

BodyT = TypeVar("BodyT", bound=msgspec.Struct)
GenerationT = TypeVar("GenerationT", bound="GenerationBody")

PATH_OF_ERROR = re.compile(r"^(?P<what>.*) - at `\$\.?(?P<path>[^`]*)`$", re.DOTALL)
MAX_TOKEN_ID = 2**31 - 1


class StreamOptions(msgspec.Struct, kw_only=True):
    include_usage: bool | None = None


class GenerationBody(SamplingFields, kw_only=True):
    """What both completion routes understand."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    cache_salt: str | None = None  # states are reused only among requests of the same salt

    @property
    def has_usage_chunk(self) -> bool:
        options = self.stream_options
        return options is not None and options.include_usage is True

    def check(self) -> None:
        if self.stream_options is not None and not self.stream:
            raise invalid(
                "'stream_options' is only allowed with 'stream': true", param="stream_options"
            )


class ContentPart(msgspec.Struct, kw_only=True):
    type: str
    text: str | None = None


class MessageBody(msgspec.Struct, kw_only=True):
    role: str
    content: str | list[ContentPart] | None = None
    tool_calls: list[object] | None = None
    tool_call_id: str | None = None


class ChatBody(GenerationBody, kw_only=True):
    """POST /v1/chat/completions."""

    messages: list[MessageBody] | None = None

    def chat_messages(self) -> list[ChatMessage]:
        """The messages, checked. Raises ApiError 400."""
        if not self.messages:
            raise invalid("'messages' must be a list of at least one message", param="messages")
        return [_message(index, message) for index, message in enumerate(self.messages)]


class CompletionBody(GenerationBody, kw_only=True):
    """POST /v1/completions."""

    prompt: str | list[str | int | list[int]] | None = None

    def text_or_ids(self) -> str | tuple[int, ...]:
        """The one prompt, as text or as token ids. Raises ApiError 400."""
        prompt = self.prompt
        if prompt is None:
            raise invalid("'prompt' is missing: send a string or a list of token ids", "prompt")
        if isinstance(prompt, str):
            return prompt
        if len(prompt) == 1 and isinstance(prompt[0], str):
            return prompt[0]
        only = prompt[0] if len(prompt) == 1 else None
        return _token_ids(only if isinstance(only, list) else prompt)


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
    fields = _json_object(data)
    for name in fields.keys() - set(ReloadBody.__struct_fields__):
        known = ", ".join(ReloadBody.__struct_fields__)
        raise invalid(f"unknown field {name!r}; known are {known}", param=name)
    return _convert(fields, ReloadBody)


def _parse_generation(
    data: bytes, kind: type[GenerationT], unsupported: Mapping[str, tuple[object, ...]]
) -> GenerationT:
    fields = _json_object(data)
    refuse_unsupported(fields, unsupported)
    body = _convert(fields, kind)
    body.check()
    return body


def _json_object(data: bytes) -> dict[str, object]:
    try:
        # orjson, not msgspec: it refuses lone surrogates and NaN, which no tokenizer can take.
        fields = orjson.loads(data)
    except orjson.JSONDecodeError as error:
        raise invalid(f"the body is not valid JSON: {error}", code="invalid_json") from None
    if not isinstance(fields, dict):
        raise invalid("the body must be a JSON object", code="invalid_json")
    return fields


def _convert(fields: dict[str, object], kind: type[BodyT]) -> BodyT:
    try:
        return msgspec.convert(fields, kind)
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
    if message.tool_calls:
        raise invalid(
            f"'{place}.tool_calls' is not supported yet; put the call into the text",
            f"{place}.tool_calls",
            "unsupported_parameter",
        )
    if message.tool_call_id is not None and role != "tool":
        raise invalid(
            f"'{place}.tool_call_id' belongs to messages with role tool", f"{place}.tool_call_id"
        )
    return ChatMessage(role, _text(f"{place}.content", message.content))


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


def _token_ids(prompt: Sequence[str | int | list[int]]) -> tuple[int, ...]:
    ids = tuple(item for item in prompt if isinstance(item, int))
    if not ids or len(ids) != len(prompt):
        raise invalid(
            "'prompt' must be one string, or one non-empty list of token ids; several prompts in "
            "one request are not supported yet: send one request each",
            "prompt",
        )
    outside = next((token for token in ids if not 0 <= token <= MAX_TOKEN_ID), None)
    if outside is not None:
        raise invalid(f"'prompt' has the token id {outside}, which no vocabulary has", "prompt")
    return ids
