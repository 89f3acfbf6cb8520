"""Operations: what each route takes and gives, for the OpenAPI document.

The fields are those of the types that the routes parse with; what is said here besides is held
against the running server by the tests, which also demand an operation for every route.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from msgspec import Struct

from api.embedding_body import EmbeddingBody
from api.message_body import MessagesBody
from api.openapi import answers, chat_answers, other_answers
from api.response_body import ResponseBody
from api.routes.abort import AbortManyBody, AbortOneBody
from api.routes.responses import ItemListFields, RetrieveFields
from api.routes.states import FilingFields, ListFields, ModelFields
from api.schemas import ChatBody, CompletionBody, ReloadBody
from api.score_body import ScoreBody
from api.state_body import StateBody
from api.token_bodies import DetokenizeBody, TokenizeBody

JSON = "application/json"
EVENTS = "text/event-stream"
TEXT = "text/plain"
HTML = "text/html"
BYTES = "application/octet-stream"

# What the way to any route may answer: access, size and speed of a request, and the unforeseen.
ALWAYS = (400, 401, 408, 413, 431, 500)
BODY = (415,)
MODEL = (404,)
ENGINE = (404, 429, 503)
KEEPING = (*ENGINE, 507)
ANSWERING = (*KEEPING, 504)


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """`gives` is the type of a JSON answer, or the content type of another one.

    `event` is that of the data of each event of a stream, where there is one; `also` are other
    statuses with an answer like that of success.
    """

    tag: str
    summary: str
    gives: type | str
    takes: type[Struct] | str | None = None
    is_body_needed: bool = True
    query: type[Struct] | None = None
    event: type[Struct] | None = None
    error: type[Struct] = answers.Error
    errors: tuple[int, ...] = ()
    also: tuple[int, ...] = ()


def _utilities(prefix: str) -> dict[tuple[str, str], Operation]:
    return {
        ("POST", f"{prefix}/tokenize"): Operation(
            tag="tokenizer",
            summary="Token ids of a text or a conversation",
            takes=TokenizeBody,
            gives=answers.Tokens,
            errors=(*BODY, *MODEL),
        ),
        ("POST", f"{prefix}/detokenize"): Operation(
            tag="tokenizer",
            summary="The text of token ids",
            takes=DetokenizeBody,
            gives=answers.Text,
            errors=(*BODY, *MODEL),
        ),
        ("GET", f"{prefix}/tokenizer_info"): Operation(
            tag="tokenizer",
            summary="Vocabulary, special tokens and chat template",
            query=ModelFields,
            gives=answers.TokenizerInfo,
            errors=MODEL,
        ),
    }


ONE_RESPONSE = "/v1/responses/{response_id}"
ONE_STATE = "/v1/states/{state_id}"

OPERATIONS: Mapping[tuple[str, str], Operation] = {
    ("POST", "/v1/chat/completions"): Operation(
        tag="generation",
        summary="Answer a conversation, whole or as a stream",
        takes=ChatBody,
        gives=chat_answers.ChatCompletion,
        event=chat_answers.ChatCompletionChunk,
        errors=(*BODY, *ANSWERING),
    ),
    ("POST", "/v1/completions"): Operation(
        tag="generation",
        summary="Continue a text or token ids, whole or as a stream",
        takes=CompletionBody,
        gives=answers.Completion,
        event=answers.CompletionChunk,
        errors=(*BODY, *ANSWERING),
    ),
    ("POST", "/v1/chat/completions/render"): Operation(
        tag="generation",
        summary="The exact prompt that a chat body gives; nothing is computed",
        takes=ChatBody,
        gives=answers.RenderedPrompt,
        errors=(*BODY, *MODEL),
    ),
    ("POST", "/v1/completions/render"): Operation(
        tag="generation",
        summary="The exact prompts that a completion body gives; nothing is computed",
        takes=CompletionBody,
        gives=list[answers.RenderedPrompt],
        errors=(*BODY, *MODEL),
    ),
    ("POST", "/v1/responses"): Operation(
        tag="responses",
        summary="Answer and store, to be gone on from; whole, as a stream or in the background",
        takes=ResponseBody,
        gives=other_answers.ResponseAnswer,
        event=other_answers.ResponseEvent,
        errors=(*BODY, *ANSWERING),
    ),
    ("GET", ONE_RESPONSE): Operation(
        tag="responses",
        summary="A stored response, or one that is being computed in the background",
        query=RetrieveFields,
        gives=other_answers.ResponseAnswer,
        errors=MODEL,
    ),
    ("DELETE", ONE_RESPONSE): Operation(
        tag="responses",
        summary="Delete a response",
        gives=other_answers.ResponseDeleted,
        errors=MODEL,
    ),
    ("POST", f"{ONE_RESPONSE}/cancel"): Operation(
        tag="responses",
        summary="End a response that is being computed in the background",
        gives=other_answers.ResponseAnswer,
        errors=MODEL,
    ),
    ("GET", f"{ONE_RESPONSE}/input_items"): Operation(
        tag="responses",
        summary="What a response was the answer to",
        query=ItemListFields,
        gives=other_answers.ResponseItemList,
        errors=MODEL,
    ),
    ("POST", "/v1/messages"): Operation(
        tag="messages",
        summary="Answer a conversation as Anthropic's API does",
        takes=MessagesBody,
        gives=other_answers.Message,
        event=other_answers.MessageEvent,
        error=other_answers.AnthropicError,
        errors=(*BODY, *ANSWERING),
    ),
    ("POST", "/v1/messages/count_tokens"): Operation(
        tag="messages",
        summary="Tokens of a conversation",
        takes=MessagesBody,
        gives=other_answers.TokenCount,
        error=other_answers.AnthropicError,
        errors=(*BODY, *MODEL),
    ),
    ("POST", "/v1/completions/score"): Operation(
        tag="generation",
        summary="How probable given continuations of a prompt are",
        takes=ScoreBody,
        gives=answers.Scores,
        errors=(*BODY, *ENGINE),
    ),
    ("POST", "/v1/embeddings"): Operation(
        tag="embeddings",
        summary="A vector for each text, from the model's last row",
        takes=EmbeddingBody,
        gives=answers.EmbeddingList,
        errors=(*BODY, *ENGINE),
    ),
    **_utilities(""),
    **_utilities("/v1"),
    ("POST", "/abort_requests"): Operation(
        tag="generation",
        summary="End some of one's own requests",
        takes=AbortManyBody,
        gives=answers.AbortedMany,
        errors=BODY,
    ),
    ("POST", "/abort_request"): Operation(
        tag="generation",
        summary="End one of one's own requests, or all",
        takes=AbortOneBody,
        gives=answers.AbortedOne,
        errors=BODY,
    ),
    ("POST", "/v1/states"): Operation(
        tag="states",
        summary="Compute a state and keep it",
        takes=StateBody,
        query=ModelFields,
        gives=answers.State,
        errors=(*BODY, *KEEPING),
    ),
    ("GET", "/v1/states"): Operation(
        tag="states",
        summary="The states of this API key, newest first",
        query=ListFields,
        gives=answers.StateList,
        errors=MODEL,
    ),
    ("POST", "/v1/states/import"): Operation(
        tag="states",
        summary="A state from a safetensors file",
        takes=BYTES,
        query=FilingFields,
        gives=answers.State,
        errors=(404, 507),
    ),
    ("GET", ONE_STATE): Operation(
        tag="states", summary="One state", query=ModelFields, gives=answers.State, errors=MODEL
    ),
    **{
        (method, ONE_STATE): Operation(
            tag="states",
            summary="Change how a state is filed",
            takes=FilingFields,
            is_body_needed=False,
            query=ModelFields,
            gives=answers.State,
            errors=(*BODY, *MODEL),
        )
        for method in ("POST", "PATCH")
    },
    ("DELETE", ONE_STATE): Operation(
        tag="states",
        summary="Delete a state",
        query=ModelFields,
        gives=answers.StateDeleted,
        errors=MODEL,
    ),
    ("POST", f"{ONE_STATE}/fork"): Operation(
        tag="states",
        summary="A second id for the same state",
        takes=FilingFields,
        is_body_needed=False,
        query=ModelFields,
        gives=answers.State,
        errors=(*BODY, 404, 507),
    ),
    ("GET", f"{ONE_STATE}/export"): Operation(
        tag="states",
        summary="A state as a safetensors file",
        query=ModelFields,
        gives=BYTES,
        errors=MODEL,
    ),
    ("GET", "/v1/models"): Operation(
        tag="models", summary="The models that are served", gives=answers.ModelList
    ),
    ("GET", "/v1/models/{model_id}"): Operation(
        tag="models", summary="One model", gives=answers.Model, errors=MODEL
    ),
    ("POST", "/admin/models/reload"): Operation(
        tag="server",
        summary="Change the configuration file and the running models together",
        takes=ReloadBody,
        gives=answers.Reloaded,
        errors=(403, *BODY, 503),
    ),
    ("GET", "/health"): Operation(
        tag="server",
        summary="Everything about the state of the server; 503 when a device has failed",
        gives=answers.Health,
        also=(503,),
    ),
    ("GET", "/health/live"): Operation(
        tag="server",
        summary="503 when only a restart helps",
        gives=answers.Status,
        also=(503,),
    ),
    ("GET", "/health/ready"): Operation(
        tag="server",
        summary="503 while new requests are refused",
        gives=answers.Status,
        also=(503,),
    ),
    ("GET", "/metrics"): Operation(tag="server", summary="Prometheus text", gives=TEXT),
    ("GET", "/version"): Operation(
        tag="server", summary="The version of the server", gives=answers.Version
    ),
    ("GET", "/"): Operation(tag="server", summary="What this is, as text", gives=TEXT),
    ("GET", "/openapi.json"): Operation(
        tag="server", summary="This document", gives=dict[str, object]
    ),
    ("GET", "/docs"): Operation(tag="server", summary="This document, to be read", gives=HTML),
}
