"""Which protocol a path speaks, where it shows outside the routes: in errors and request ids.

OpenAI's is api/errors.py; here is Anthropic's, of /v1/messages and what is below it.
"""

from __future__ import annotations

import orjson

from api.errors import ApiError, Headers

ANTHROPIC_PATH = "/v1/messages"
INVALID_REQUEST = "invalid_request_error"
TYPE_OF_STATUS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    503: "overloaded_error",
}


def is_anthropic(path: str) -> bool:
    return path == ANTHROPIC_PATH or path.startswith(f"{ANTHROPIC_PATH}/")


def error_body(path: str, error: ApiError, request_id: str) -> bytes:
    """The error as clients of that path parse it."""
    return anthropic_error(error, request_id) if is_anthropic(path) else error.body()


def anthropic_error(error: ApiError, request_id: str | None = None) -> bytes:
    """{"type": "error", "error": {"type", "message"}, "request_id"}, as JSON."""
    default = "api_error" if error.status >= 500 else INVALID_REQUEST
    kind = TYPE_OF_STATUS.get(error.status, default)
    told: dict[str, object] = {"type": kind, "message": error.message}
    if error.param == "thread":
        # Told this, clients go on by sending the whole conversation.
        told["details"] = {"error_code": "thread_unsupported_request", "unsupported": ["thread"]}
    return orjson.dumps({"type": "error", "error": told, "request_id": request_id})


def request_id_headers(path: str, request_id: str) -> Headers:
    """X-Request-Id for everybody, and the name that Anthropic's clients look for."""
    given = request_id.encode()
    both: Headers = ((b"x-request-id", given),)
    return (*both, (b"request-id", given)) if is_anthropic(path) else both
