"""What answers look like: types that are only described, never built.

The routes write plain dictionaries. These types become the schemas of the OpenAPI document, and
the tests hold every answer of the server against them, so what is here is neither more nor less
than what is sent.
"""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import UNSET, Meta, Struct, UnsetType

Anything = object  # where a field of that name hides it


class Answer(Struct, kw_only=True, forbid_unknown_fields=True):
    """A JSON object with these fields and no others."""


class ErrorDetails(Answer, kw_only=True):
    message: str
    type: str
    param: str | None
    code: str | None


class Error(Answer, kw_only=True):
    """Whatever went wrong; `param` is the field that caused it."""

    error: ErrorDetails


class PromptTokensDetails(Answer, kw_only=True):
    cached_tokens: int
    state_tokens: int | UnsetType = UNSET


class CompletionTokensDetails(Answer, kw_only=True):
    reasoning_tokens: int


class Usage(Answer, kw_only=True):
    """Tokens; those of the prompt count once, whatever the number of choices."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails | UnsetType = UNSET
    context_exceeded: bool | UnsetType = UNSET


class State(Answer, kw_only=True):
    """A state that is kept."""

    id: str
    object: Literal["state"]
    model: str
    num_tokens: int
    bytes: int
    created: int
    expires_at: int | None
    label: str
    pinned: bool
    has_logits: bool
    parent: str | None
    tier: Literal["device", "host", "disk"]


class StateList(Answer, kw_only=True):
    object: Literal["list"]
    data: list[State]
    first_id: str | None
    last_id: str | None
    has_more: bool


class StateDeleted(Answer, kw_only=True):
    id: str
    object: Literal["state"]
    deleted: bool


class Resume(Answer, kw_only=True):
    """What goes on with a suspended answer."""

    id: str


FinishReason = Literal["stop", "length", "suspended", "abort"]


class TopLogprob(Answer, kw_only=True):
    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(TopLogprob, kw_only=True):
    top_logprobs: list[TopLogprob]


class CompletionLogprobs(Answer, kw_only=True):
    """Lists of equal length; the first token of an echoed prompt has null."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionHead(Answer, kw_only=True):
    id: str
    created: int
    model: str
    system_fingerprint: str
    state: State | UnsetType | None = UNSET
    resume: Resume | UnsetType = UNSET


class CompletionChoice(Answer, kw_only=True):
    text: str
    index: int
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason
    generated_tokens: int
    token_ids: list[int] | UnsetType = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET
    matched_stop_suffix: str | UnsetType = UNSET
    matched_stop_suffix_index: int | UnsetType = UNSET


class Completion(CompletionHead, kw_only=True):
    object: Literal["text_completion"]
    choices: list[CompletionChoice]
    usage: Usage


class CompletionChunkChoice(Answer, kw_only=True):
    text: str
    index: int
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason | None
    generated_tokens: int | UnsetType = UNSET
    token_ids: list[int] | UnsetType = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET
    matched_stop_suffix: str | UnsetType = UNSET
    matched_stop_suffix_index: int | UnsetType = UNSET


class CompletionChunk(CompletionHead, kw_only=True):
    """The data of one event of a stream."""

    object: Literal["text_completion"]
    choices: list[CompletionChunkChoice]
    usage: Usage | UnsetType | None = UNSET


class RenderedPrompt(Answer, kw_only=True):
    """The exact prompt; with a `state`, what follows the text that it stands for."""

    object: Literal["rendered_prompt"]
    model: str
    prompt: str
    token_ids: list[int]
    state: str | None
    initial_state: str | None
    sampling_params: dict[str, Anything]


class ChoiceScore(Answer, kw_only=True):
    """`logprob` is the sum of `token_logprobs`, natural logarithms."""

    index: int
    logprob: float
    num_tokens: int
    is_greedy: bool
    token_ids: list[int]
    token_logprobs: list[float]


class Scores(Answer, kw_only=True):
    id: str
    object: Literal["completion.scores"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChoiceScore]
    usage: Usage


class EmbeddingUsage(Answer, kw_only=True):
    prompt_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class Embedding(Answer, kw_only=True):
    """A vector of length 1; with `base64`, its little-endian float32 numbers."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingList(Answer, kw_only=True):
    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage


class Tokens(Answer, kw_only=True):
    count: int
    max_model_len: Annotated[int | None, Meta(description="null = no limit")]
    tokens: list[int]
    token_strs: list[str] | UnsetType = UNSET


class Text(Answer, kw_only=True):
    prompt: str


class TokenizerInfo(Answer, kw_only=True):
    model: str
    tokenizer_class: str
    fingerprint: str
    vocab_size: int
    model_max_length: int | None
    bos_token: str
    eos_token: str
    pad_token: str
    chat_template: Annotated[str, Meta(description="Jinja")]


class AbortedMany(Answer, kw_only=True):
    """Those of the ids that were running."""

    aborted: list[str]


class AbortedOne(Answer, kw_only=True):
    num_aborted: int


class Model(Answer, kw_only=True):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int | UnsetType = UNSET


class ModelList(Answer, kw_only=True):
    object: Literal["list"]
    data: list[Model]


class Reloaded(Answer, kw_only=True):
    changed_model_names: list[str]
    rebuilt_model_names: list[str]
    removed_model_names: list[str]
    active_model_names: list[str]
    dry_run: bool
    message: str


class ModelHealth(Answer, kw_only=True):
    model_name: str
    fingerprint: str
    num_parameters: int
    device: str
    dtype: str
    state_dtype: str
    page_bytes: int
    max_batch_size: int
    paragraph_len: int
    accepting: bool
    dead: bool
    error: str | None
    running: int
    waiting: int
    slots: int
    free_slots: int
    seconds_since_commit: float | None


class LastReload(Answer, kw_only=True):
    result: Literal["applied", "rejected"]
    source: Literal["file", "admin"]
    at_unix_s: float
    message: str
    file: str | None
    key: str | None


HealthStatus = Literal["ok", "draining", "dead"]


class Health(Answer, kw_only=True):
    status: HealthStatus
    server_time_unix_ms: int
    models: list[ModelHealth]
    last_reload: LastReload | None


class Status(Answer, kw_only=True):
    status: HealthStatus


class Version(Answer, kw_only=True):
    version: str
