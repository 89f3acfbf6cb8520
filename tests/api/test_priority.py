"""The request field `priority`."""

from __future__ import annotations

import pytest

from api.errors import ApiError
from api.schemas import parse_chat


def rank(value: str) -> int:
    body = (
        f'{{"model": "m", "messages": [{{"role": "user", "content": "x"}}], "priority": {value}}}'
    )
    return parse_chat(body.encode()).rank


@pytest.mark.parametrize(("value", "expected"), [("null", 0), ("5", 5), ("-3.0", -3)])
def test_a_priority_is_an_integer(value: str, expected: int) -> None:
    assert rank(value) == expected


@pytest.mark.parametrize("value", ["1001", "-1001", "0.5"])
def test_other_priorities_are_refused_by_name(value: str) -> None:
    with pytest.raises(ApiError, match="priority") as caught:
        rank(value)
    assert caught.value.param == "priority"
