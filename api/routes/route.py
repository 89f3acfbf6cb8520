"""Route: a method, a path and what handles them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from blacksheep import Request, Response

Handler = Callable[[Request], Awaitable[Response]]


@dataclass(frozen=True, slots=True)
class Route:
    """`path` is a BlackSheep pattern; the handler's parameter must be called `request`.

    Those with `needs_admin` are closed to the API keys of clients, where there is an admin_api_key.
    """

    method: str
    path: str
    handler: Handler
    needs_admin: bool = False
