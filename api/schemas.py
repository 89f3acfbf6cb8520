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
from api.generation_body import MAX_NUM_CHOICES, GenerationBody
from api.sampling import Integer, integer
from api.unsupported import CHAT, COMPLETIONS, refuse_unsupported
from config.convert import did_you_mean

BodyT = TypeVar("BodyT", bound=msgspec.Struct)
GenerationT = TypeVar("GenerationT", bound=GenerationBody)

PATH_OF_ERROR = re.compile(r"^(?P<what>.*) - at `\$\.?(?P<path>[^`]*)`$", re.DOTALL)
MAX_TOKEN_ID = 2**31 - 1

PromptField = str | list[str | int | list[int]]


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
        """The messages, checked; none only where a state goes on. Raises ApiError 400."""
        if not self.messages and self.state is None and self.resume is None:
            raise invalid("'messages' must be a list of at least one message", param="messages")
        return chat_messages(self.messages or [])


class CompletionBody(GenerationBody, kw_only=True):
    """POST /v1/completions."""

    prompt: PromptField | None = None
    best_of: Integer | None = None

    @property
    def num_candidates(self) -> int:
        if self.best_of is None:
            return self.num_choices
        low = self.num_choices
        return integer("best_of", self.best_of, low, MAX_NUM_CHOICES, "'n' of them are returned")

    def text_or_ids(self) -> str | tuple[int, ...]:
        """The one prompt, as text or as token ids. Raises ApiError 400."""
        if self.prompt is not None:
            return text_or_ids(self.prompt)
        if self.state is None and self.resume is None:
            raise invalid("'prompt' is missing: send a string or a list of token ids", "prompt")
        return ""

    def check(self) -> None:
        super().check()
        if self.stream and self.num_candidates > self.num_choices:
            raise invalid(
                f"'best_of' = {self.best_of} answers can only be compared when they are complete; "
                "leave out 'stream', or ask for 'n' answers",
                "best_of",
            )


def chat_messages(messages: Sequence[MessageBody]) -> list[ChatMessage]:
    """Checked. Raises ApiError 400 that names the place."""
    return [_message(index, message) for index, message in enumerate(messages)]


def text_or_ids(prompt: PromptField) -> str | tuple[int, ...]:
    """The one prompt in any of its forms. Raises ApiError 400."""
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
