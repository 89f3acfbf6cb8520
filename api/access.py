"""Who may call: the API key, and which web pages may read the answers (CORS).

Works on raw ASGI headers, so that its verdict comes before the body is read and its headers are
on every answer, errors included.
"""

from __future__ import annotations

import hashlib
import hmac

from api.errors import ApiError, Headers

OPEN_PATHS = frozenset({"/", "/docs", "/health", "/health/live", "/health/ready", "/metrics"})
ALLOWED_METHODS = b"GET, POST, PATCH, DELETE, OPTIONS"
ALLOWED_HEADERS = b"authorization, content-type, x-api-key, x-request-id"
EXPOSED_HEADERS = b"x-request-id, retry-after"
PREFLIGHT_MAX_AGE_S = 600
OWNER_HASH_KEY = b"owner of states"  # the same for ever: states outlive the process


def check_api_key(api_key: str | None, path: str, headers: Headers) -> None:
    """Raise ApiError 401 unless the Authorization header holds the key, with or without Bearer.

    X-Api-Key, which clients of Anthropic's API may send, holds it where there is none of these.
    """
    if api_key is None or path in OPEN_PATHS:
        return
    token = _presented_key(headers)
    if token is None:
        raise _unauthorized("send the API key in the Authorization header: Bearer YOUR_KEY")
    if not hmac.compare_digest(token, api_key.encode()):
        raise _unauthorized("the API key is wrong")


def owner_of(api_key: str | None, headers: Headers) -> str:
    """Whose states a request may use: 32 hex digits that follow from the key that it presents.

    "" on an open server, where all states are everybody's. Asked after `check_api_key`.
    """
    token = None if api_key is None else _presented_key(headers)
    if token is None:
        return ""
    return hashlib.blake2b(token, digest_size=16, key=OWNER_HASH_KEY).hexdigest()


def cors_headers(allowed_origins: tuple[str, ...] | None, headers: Headers) -> Headers:
    """The headers that let a page of that origin read the answer; none for foreign origins."""
    origin = header(headers, b"origin")
    if origin is None:
        return ()
    if allowed_origins is None:
        allowed: Headers = ((b"access-control-allow-origin", b"*"),)
    elif origin.decode("latin-1") in allowed_origins:
        allowed = ((b"access-control-allow-origin", origin), (b"vary", b"origin"))
    else:
        return ((b"vary", b"origin"),)
    return (*allowed, (b"access-control-expose-headers", EXPOSED_HEADERS))


def preflight_headers(allowed_origins: tuple[str, ...] | None, headers: Headers) -> Headers | None:
    """The answer to a CORS preflight, or None when the request is none."""
    if header(headers, b"access-control-request-method") is None:
        return None
    cors = cors_headers(allowed_origins, headers)
    if not any(name == b"access-control-allow-origin" for name, _ in cors):
        return cors
    # Clients add headers of their own (OpenAI's sends x-stainless-*): allow what is asked for.
    asked = header(headers, b"access-control-request-headers") or ALLOWED_HEADERS
    return (
        *cors,
        (b"access-control-allow-methods", ALLOWED_METHODS),
        (b"access-control-allow-headers", asked),
        (b"access-control-max-age", b"%d" % PREFLIGHT_MAX_AGE_S),
    )


def header(headers: Headers, name: bytes) -> bytes | None:
    """The first header of that (lower-case) name."""
    return next((value for key, value in headers if key == name), None)


def _presented_key(headers: Headers) -> bytes | None:
    given = header(headers, b"authorization")
    if given is None:
        return header(headers, b"x-api-key")
    scheme, _, token = given.partition(b" ")
    return token.strip() if scheme.lower() == b"bearer" else given.strip()


def _unauthorized(message: str) -> ApiError:
    return ApiError(
        401, message, code="invalid_api_key", headers=((b"www-authenticate", b"Bearer"),)
    )
