"""Route: a method, a path and what handles them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from blacksheep import Request, Response

Handler = Callable[[Request], Awaitable[Response]]


@dataclass(frozen=True, slots=True)
class Route:
    """`path` is a BlackSheep pattern; the handler's parameter must be called `request`."""

    method: str
    path: str
    handler: Handler
