"""How deep the objects and lists of a body lie inside one another. Knows no fields."""

from __future__ import annotations

from collections.abc import Mapping

from api.errors import invalid

MAX_JSON_DEPTH = 200  # orjson writes 254, json some 990, and what is asked may be in the answer

Container = dict[str, object] | list[object]


def check_depth(data: bytes, fields: Mapping[str, object]) -> None:
    """Raise ApiError 400 for what could be read and not be written. `fields` are `data`, parsed."""
    num_brackets = data.count(b"{") + data.count(b"[")
    if num_brackets > MAX_JSON_DEPTH and _is_too_deep(dict(fields)):
        raise invalid(
            f"the body has objects or lists inside one another more than {MAX_JSON_DEPTH} deep",
            code="invalid_json",
        )


def _is_too_deep(value: Container) -> bool:
    level = [value]
    for _ in range(MAX_JSON_DEPTH):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, dict | list)
        ]
        if not level:
            return False
    return True
