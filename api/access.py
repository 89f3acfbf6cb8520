"""Who may call: the API keys, and which web pages may read the answers (CORS).

Works on raw ASGI headers, so that its verdict comes before the body is read and its headers are
on every answer, errors included.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence
from dataclasses import dataclass

from api.errors import ApiError, Headers
from config import InferConfig

OPEN_PATHS = frozenset({"/", "/docs", "/health", "/health/live", "/health/ready"})
ALLOWED_METHODS = b"GET, POST, PATCH, DELETE, OPTIONS"
ALLOWED_HEADERS = b"authorization, content-type, x-api-key, x-request-id"
EXPOSED_HEADERS = b"x-request-id, retry-after"
PREFLIGHT_MAX_AGE_S = 600
OWNER_HASH_KEY = b"owner of states"  # the same for ever: states outlive the process


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks, as far as keys tell. `owner` says whose states may be used: see `owner_of`."""

    owner: str = ""  # on an open server all states are everybody's
    has_key: bool = False  # it has sent one of the configured keys
    is_admin: bool = False

    def check_admin(self) -> None:
        """Raise ApiError 401 without any key, 403 with one that is not for /admin routes."""
        if self.is_admin:
            return
        if self.has_key:
            raise ApiError(403, "this needs the admin_api_key", code="admin_key_required")
        raise _unauthorized("send the admin_api_key in the Authorization header: Bearer YOUR_KEY")


def caller_of(config: InferConfig, path: str, headers: Headers) -> Caller:
    """Raises ApiError 401 unless the Authorization header holds a key, with or without Bearer.

    X-Api-Key, which clients of Anthropic's API may send, holds it where there is none of these.
    Open paths, and servers without keys for clients, ask for none; /admin routes have a check of
    their own, `Caller.check_admin`, since only the router knows which these are.
    """
    client_keys, admin_key = config.client_api_keys, config.admin_api_key
    key = None if path in OPEN_PATHS else _presented_key(headers)
    is_client = key is not None and _is_one_of(key, client_keys)
    is_admin = key is not None and admin_key is not None and _is_one_of(key, [admin_key])
    if not (is_client or is_admin) and client_keys and path not in OPEN_PATHS:
        if key is None:
            raise _unauthorized("send the API key in the Authorization header: Bearer YOUR_KEY")
        raise _unauthorized("the API key is wrong")
    return Caller(
        owner=owner_of(key) if key is not None and client_keys else "",
        has_key=is_client or is_admin,
        is_admin=is_admin or admin_key is None,
    )


def owner_of(key: bytes) -> str:
    """Whose states a key may use: 32 hex digits that follow from it and do not show it."""
    return hashlib.blake2b(key, digest_size=16, key=OWNER_HASH_KEY).hexdigest()


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
    """Raises ApiError 401 where a header comes twice: a proxy may have looked at the other one."""
    for name in (b"authorization", b"x-api-key"):
        values = [value for key, value in headers if key == name]
        if len(values) > 1:
            raise _unauthorized(f"the header {name.decode()} came {len(values)} times")
        if values:
            return _without_scheme(values[0]) if name == b"authorization" else values[0]
    return None


def _without_scheme(given: bytes) -> bytes:
    scheme, _, token = given.partition(b" ")
    return token.strip() if scheme.lower() == b"bearer" else given.strip()


def _is_one_of(key: bytes, keys: Sequence[str]) -> bool:
    """In a time that tells neither how much of a key was right, nor how long it is, nor which."""
    digest = owner_of(key)
    matches = [hmac.compare_digest(digest, owner_of(known.encode())) for known in keys]
    return any(matches)


def _unauthorized(message: str) -> ApiError:
    return ApiError(
        401, message, code="invalid_api_key", headers=((b"www-authenticate", b"Bearer"),)
    )
