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
)

INVALID_REQUEST = "invalid_request_error"
SERVER_ERROR = "server_error"
TYPE_OF_STATUS = {
    401: "authentication_error",
    404: "not_found_error",
    429: "rate_limit_error",
    500: SERVER_ERROR,
    503: SERVER_ERROR,
}
DRAIN_RETRY_AFTER_S = 1

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
        self.message = message
        self.param = param
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


def from_engine(error: EngineError) -> ApiError:
    """What a client is told about an engine's refusal or failure."""
    match error:
        case ContextTooLong():
            return invalid(str(error), error.field, "context_length_exceeded")
        case InvalidRequest():
            return invalid(str(error), error.field)
        case Overloaded():
            retry_after_s = max(1, math.ceil(error.retry_after_s))
            header = (b"retry-after", b"%d" % retry_after_s)
            return ApiError(429, str(error), code="queue_full", headers=(header,))
        case Draining():
            return draining()
        case EngineDead():
            return ApiError(503, str(error), code="engine_dead")
        case _:
            return ApiError(500, str(error), code="internal_error")
