"""ResponseBody: the fields of POST /v1/responses, checked. Knows neither engine nor store."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from api.errors import invalid
from api.response_fields import ResponseFields
from api.response_items import InputItem, item_objects
from api.sampling import MAX_MAX_TOKENS, Integer, integer
from api.schemas import convert_strict, json_object
from api.unsupported import SHARED, refuse_unsupported

MAX_NUM_METADATA, MAX_METADATA_KEY_CHARS, MAX_METADATA_VALUE_CHARS = 16, 64, 512  # OpenAI's

# Fields that would change the answer and are not honoured, with the values that ask for nothing.
RESPONSES: dict[str, tuple[object, ...]] = SHARED | {
    "text.verbosity": ("medium",),
    "reasoning.context": ("auto",),
    "reasoning.generate_summary": (),
    "reasoning.mode": ("standard",),
    "reasoning.summary": (),
    "include": ([],),
    "top_logprobs": (0,),
    "truncation": ("disabled",),
    "conversation": (),
    "prompt": (),
    "context_management": ([],),
    "moderation": (),
    # Of the other routes; a response has words of its own for these.
    "messages": (),
    "max_tokens": (),
    "max_completion_tokens": (),
    "response_format": ({"type": "text"},),
    "reasoning_effort": ("none",),
    "chat_template_kwargs": ({}, {"enable_thinking": False}),
    "n": (1,),
    "best_of": (1,),
    "state": (),
    "return_state": (False,),
    "resumable": (False,),
    "resume": (),
    "request_id": (),
    "return_token_ids": (False,),
}


class ResponseBody(ResponseFields, kw_only=True):
    """POST /v1/responses; null = absent. The sampling fields of a chat may be used too."""

    CONVERSATION_FIELD: ClassVar[str] = "input"
    CALLS_FIELD: ClassVar[str] = "input"

    input: str | list[InputItem] | None = None
    instructions: str | None = None
    max_output_tokens: Integer | None = None
    previous_response_id: str | None = None
    store: bool | None = None
    background: bool | None = None
    metadata: dict[str, str] | None = None

    @property
    def is_stored(self) -> bool:
        return self.store is not False

    @property
    def is_background(self) -> bool:
        return self.background is True

    def items(self) -> list[dict[str, object]]:
        """The input as items with ids. Raises ApiError 400."""
        if self.input is None:
            raise invalid("'input' is missing: send a string or a list of items", "input")
        return item_objects(self.input)

    def check(self) -> None:
        """Raise ApiError 400 for what does not go together, and settle `max_tokens`."""
        super().check()
        if self.max_output_tokens is not None:
            self.max_tokens = integer(
                "max_output_tokens", self.max_output_tokens, 1, MAX_MAX_TOKENS
            )
        self._check_background()
        self._check_metadata()
        if self.previous_response_id is not None and self.initial_state is not None:
            raise invalid(
                "'initial_state' is what a text begins with, and 'previous_response_id' is the "
                "middle of one; send one of them",
                "initial_state",
            )

    def _check_background(self) -> None:
        if not self.is_background:
            return
        if not self.is_stored:
            raise invalid(
                "'background' = true needs 'store': its answer is only to be had from there",
                "background",
            )
        if self.stream:
            raise invalid(
                "'stream' = true is not supported yet with 'background'; poll "
                "GET /v1/responses/{id}, or leave out one of them",
                "stream",
                "unsupported_parameter",
            )

    def _check_metadata(self) -> None:
        metadata = self.metadata or {}
        if len(metadata) > MAX_NUM_METADATA:
            raise invalid(
                f"'metadata' has {len(metadata)} pairs, at most {MAX_NUM_METADATA} are kept",
                "metadata",
            )
        for key, value in metadata.items():
            if len(key) > MAX_METADATA_KEY_CHARS or len(value) > MAX_METADATA_VALUE_CHARS:
                raise invalid(
                    f"'metadata' has a key longer than {MAX_METADATA_KEY_CHARS} or a value longer "
                    f"than {MAX_METADATA_VALUE_CHARS} characters: {key[:MAX_METADATA_KEY_CHARS]!r}",
                    "metadata",
                )


def parse_response(data: bytes) -> ResponseBody:
    """Raises ApiError 400 that names the first field in the way."""
    fields = json_object(data)
    refuse_unsupported(_flattened(fields), RESPONSES)
    known = {name: fields[name] for name in ResponseBody.__struct_fields__ if name in fields}
    body = convert_strict(known, ResponseBody)
    body.check()
    return body


def _flattened(fields: Mapping[str, object]) -> dict[str, object]:
    """`text` and `reasoning` are objects of fields that are judged one by one."""
    flat = dict(fields)
    for outer in ("text", "reasoning"):
        inner = fields.get(outer)
        if isinstance(inner, Mapping):
            flat |= {f"{outer}.{name}": value for name, value in inner.items()}
    return flat
