"""What answers of /v1/responses and /v1/messages look like: described, never built.

As api/openapi/answers.py, for the protocols that came later.
"""

from __future__ import annotations

from typing import Literal

from msgspec import UNSET, Struct, UnsetType

from api.openapi.answers import Answer

Anything = object  # where a field of that name hides it


class InputText(Answer, kw_only=True):
    type: Literal["input_text"]
    text: str


class OutputText(Answer, kw_only=True):
    type: Literal["output_text"]
    text: str
    annotations: list[Anything]
    logprobs: list[Anything]


class ThoughtText(Answer, kw_only=True):
    type: Literal["reasoning_text"]
    text: str


class Item(Answer, kw_only=True, tag_field="type"):
    """Of an input or an output."""

    id: str
    status: Literal["completed", "incomplete"]


class OutputMessage(Item, kw_only=True, tag="message"):
    role: Literal["assistant"]
    content: list[OutputText]


class Thought(Item, kw_only=True, tag="reasoning"):
    """It is told of whole; there are no summaries."""

    summary: list[Anything]
    content: list[ThoughtText]


class FunctionCall(Item, kw_only=True, tag="function_call"):
    """Its arguments are JSON, or as much of it as there was."""

    call_id: str
    name: str
    arguments: str


class FunctionCallOutput(Item, kw_only=True, tag="function_call_output"):
    call_id: str
    output: str | list[InputText]


class GivenMessage(Item, kw_only=True, tag="message"):
    """Those of the assistant have output parts."""

    role: Literal["user", "assistant", "system", "developer"]
    content: list[dict[str, Anything]]


class ResponseItemList(Answer, kw_only=True):
    object: Literal["list"]
    data: list[GivenMessage | Thought | FunctionCall | FunctionCallOutput]
    first_id: str | None
    last_id: str | None
    has_more: bool


class InputTokensDetails(Answer, kw_only=True):
    cached_tokens: int
    cache_write_tokens: int


class OutputTokensDetails(Answer, kw_only=True):
    reasoning_tokens: int


class ResponseUsage(Answer, kw_only=True):
    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int
    context_exceeded: bool | UnsetType = UNSET


class ResponseError(Answer, kw_only=True):
    code: str
    message: str


class IncompleteDetails(Answer, kw_only=True):
    reason: Literal["max_output_tokens"]


class ResponseAnswer(Answer, kw_only=True):
    """OpenAI's response object; fields of what is not served say so by their neutral value."""

    id: str
    object: Literal["response"]
    created_at: int
    status: Literal["in_progress", "completed", "incomplete", "failed", "cancelled"]
    completed_at: int | None
    background: bool
    error: ResponseError | None
    incomplete_details: IncompleteDetails | None
    instructions: str | None
    max_output_tokens: int
    metadata: dict[str, str]
    model: str
    output: list[OutputMessage | Thought | FunctionCall]
    parallel_tool_calls: bool
    previous_response_id: str | None
    reasoning: dict[str, Anything]
    service_tier: str
    store: bool
    system_fingerprint: str
    temperature: float
    text: dict[str, Anything]
    tool_choice: str | dict[str, Anything]
    tools: list[dict[str, Anything]]
    top_logprobs: int
    top_p: float
    truncation: str
    usage: ResponseUsage | None


class ResponseEvent(Struct, kw_only=True):
    """The data of one event of a stream; what else is in it depends on its type."""

    type: str
    sequence_number: int


class ResponseDeleted(Answer, kw_only=True):
    id: str
    object: Literal["response"]
    deleted: bool


class AnthropicErrorDetails(Answer, kw_only=True):
    """The details tell programs what is not supported."""

    type: str
    message: str
    details: dict[str, Anything] | UnsetType = UNSET


class AnthropicError(Answer, kw_only=True):
    """Whatever went wrong, as Anthropic's clients parse it."""

    type: Literal["error"]
    error: AnthropicErrorDetails
    request_id: str | None


class TextBlock(Answer, kw_only=True, tag_field="type", tag="text"):
    text: str


class ThinkingBlock(Answer, kw_only=True, tag_field="type", tag="thinking"):
    """The signature is empty."""

    thinking: str
    signature: str


class ToolUseBlock(Answer, kw_only=True, tag_field="type", tag="tool_use"):
    id: str
    name: str
    input: dict[str, Anything]


class ThinkingTokens(Answer, kw_only=True):
    thinking_tokens: int


class MessageUsage(Answer, kw_only=True):
    """Cached tokens are counted beside the input tokens, not among them."""

    input_tokens: int
    cache_creation_input_tokens: int
    cache_read_input_tokens: int
    output_tokens: int
    output_tokens_details: ThinkingTokens


class Message(Answer, kw_only=True):
    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[TextBlock | ThinkingBlock | ToolUseBlock]
    stop_reason: Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"] | None
    stop_sequence: str | None
    usage: MessageUsage


class MessageEvent(Struct, kw_only=True):
    """The data of one event of a stream; what else is in it depends on its type."""

    type: str


class TokenCount(Answer, kw_only=True):
    input_tokens: int
