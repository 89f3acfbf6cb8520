"""ApiError: every error a client can see, in the shape OpenAI clients parse. Knows no route."""

from __future__ import annotations

import math

import orjson

from engine.errors import (
    ContextTooLong,
    Draining,
    EngineDead,
    EngineError,
    InvalidRequest,
    Overloaded,
    StateMismatch,
    StateNotFound,
    StatesFull,
)

INVALID_REQUEST = "invalid_request_error"
SERVER_ERROR = "server_error"
TYPE_OF_STATUS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    500: SERVER_ERROR,
    503: SERVER_ERROR,
    504: SERVER_ERROR,
    507: SERVER_ERROR,
}
FIELD_OF_ENGINE = {"state_id": "state", "resume_id": "resume", "keep_state": "return_state"}
DRAIN_RETRY_AFTER_S = 1
MAX_MESSAGE_CHARS = 2000  # it may quote what was sent, which may be megabytes
MAX_PARAM_CHARS = 200

Headers = tuple[tuple[bytes, bytes], ...]


class ApiError(Exception):
    """An error with its HTTP status. `param` names the field of the request that caused it."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Headers = (),
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = _cut(message, MAX_MESSAGE_CHARS)
        self.param = None if param is None else _cut(param, MAX_PARAM_CHARS)
        self.code = code
        self.headers = headers

    def body(self) -> bytes:
        """{"error": {"message", "type", "param", "code"}}, as JSON."""
        error = {
            "message": self.message,
            "type": TYPE_OF_STATUS.get(self.status, INVALID_REQUEST),
            "param": self.param,
            "code": self.code,
        }
        return orjson.dumps({"error": error})


def _cut(text: str, most: int) -> str:
    """The beginning and the end of a long text; a message ends with the remedy."""
    half = most // 2
    return text if len(text) <= most else f"{text[:half]} ... {text[-half:]}"


def invalid(message: str, param: str | None = None, code: str = "invalid_value") -> ApiError:
    """A request that can never be served as it is."""
    return ApiError(400, message, param=param, code=code)


def draining() -> ApiError:
    """The server goes down; another one, or this one restarted, can serve the request."""
    return ApiError(
        503,
        "the server is shutting down; try again",
        code="draining",
        headers=((b"retry-after", b"%d" % DRAIN_RETRY_AFTER_S), (b"connection", b"close")),
    )


def timed_out() -> ApiError:
    """The client's own deadline; its library is told not to try again by itself."""
    return ApiError(
        504,
        "the answer was not complete within 'timeout_ms'",
        param="timeout_ms",
        code="timeout",
        headers=((b"x-should-retry", b"false"),),
    )


def cancelled() -> ApiError:
    """Ended by its owner through the abort routes; not to be tried again, as 5xx would be."""
    return ApiError(400, "the request was aborted by its owner", code="cancelled")


def state_not_found(message: str, param: str | None = None) -> ApiError:
    """Unknown, expired or another owner's; which of these is not told."""
    return ApiError(404, message, param=param, code="state_not_found")


def from_engine(error: EngineError, prompt_field: str = "prompt") -> ApiError:
    """What a client is told about an engine's refusal or failure.

    The engine's names of fields become those of the request, where the prompt is `prompt_field`.
    """
    field = error.field if isinstance(error, InvalidRequest) else None
    if field is not None:
        field = prompt_field if field == "prompt_ids" else FIELD_OF_ENGINE.get(field, field)
    match error:
        case ContextTooLong():
            return invalid(str(error), field, "context_length_exceeded")
        case StateNotFound():
            return state_not_found(str(error), field)
        case StateMismatch():
            return invalid(str(error), field, "state_mismatch")
        case InvalidRequest():
            return invalid(str(error), field)
        case Overloaded():
            retry_after_s = max(1, math.ceil(error.retry_after_s))
            header = (b"retry-after", b"%d" % retry_after_s)
            return ApiError(429, str(error), code="queue_full", headers=(header,))
        case StatesFull():
            return ApiError(507, str(error), code="states_full")
        case Draining():
            return draining()
        case EngineDead():
            return ApiError(503, str(error), code="engine_dead")
        case _:
            return ApiError(500, str(error), code="internal_error")
