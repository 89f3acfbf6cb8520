"""What answers to chats look like; as in api/openapi/answers.py."""

from __future__ import annotations

from typing import Literal

from msgspec import UNSET, UnsetType

from api.openapi.answers import Answer, CompletionHead, TokenLogprob, Usage

ChatFinishReason = Literal["stop", "length", "tool_calls", "suspended", "abort"]


class ChatLogprobs(Answer, kw_only=True):
    content: list[TokenLogprob]
    refusal: None


class Function(Answer, kw_only=True):
    """`arguments` is the text of a JSON object."""

    name: str
    arguments: str


class ToolCall(Answer, kw_only=True):
    id: str
    type: Literal["function"]
    function: Function


class ChatAnswerMessage(Answer, kw_only=True):
    """A thought has two names, an old one and a new one."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    reasoning_content: str | UnsetType = UNSET
    reasoning: str | UnsetType = UNSET
    tool_calls: list[ToolCall] | UnsetType = UNSET


class ChatChoice(Answer, kw_only=True):
    index: int
    message: ChatAnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: ChatFinishReason
    token_ids: list[int] | UnsetType = UNSET


class ChatCompletion(CompletionHead, kw_only=True):
    object: Literal["chat.completion"]
    choices: list[ChatChoice]
    usage: Usage
    prompt_token_ids: list[int] | UnsetType = UNSET


class FunctionDelta(Answer, kw_only=True):
    name: str | UnsetType = UNSET
    arguments: str


class ToolCallDelta(Answer, kw_only=True):
    """The first one of a call has its id and the name of the function."""

    index: int
    id: str | UnsetType = UNSET
    type: Literal["function"] | UnsetType = UNSET
    function: FunctionDelta


class ChatDelta(Answer, kw_only=True):
    role: Literal["assistant"] | UnsetType = UNSET
    content: str | UnsetType = UNSET
    reasoning_content: str | UnsetType = UNSET
    reasoning: str | UnsetType = UNSET
    tool_calls: list[ToolCallDelta] | UnsetType = UNSET


class ChatChunkChoice(Answer, kw_only=True):
    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: ChatFinishReason | None
    token_ids: list[int] | UnsetType = UNSET


class ChatCompletionChunk(CompletionHead, kw_only=True):
    """The data of one event of a stream."""

    object: Literal["chat.completion.chunk"]
    choices: list[ChatChunkChoice]
    prompt_token_ids: list[int] | UnsetType = UNSET
    usage: Usage | UnsetType | None = UNSET
