"""Bodies with more values than anybody needs are refused before they are parsed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from api import json_size
from api.json_size import has_too_many_values
from tests.api.harness import running

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(alphabet='a,[{"\\\n'),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(alphabet='b,]{"\\'), inner),
    max_leaves=30,
)


def num_marks(value: object) -> int:
    """Commas and opening brackets outside of strings."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    own = 1 + max(0, len(inner) - 1) if isinstance(value, list | dict) else 0
    return own + sum(map(num_marks, inner))


@given(JSON)
def test_only_what_is_outside_of_strings_counts(value: object):
    data = json.dumps(value).encode()
    count = num_marks(value)
    assert not has_too_many_values(data, count)
    assert has_too_many_values(data, count - 1)


@pytest.mark.parametrize("item", ["[]", "{}", "1", '"a"', '{"a":1}', '","'])
async def test_more_values_than_anybody_needs_are_413(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, item: str
):
    monkeypatch.setattr(json_size, "MAX_NUM_VALUES", 1000)
    body = '{"model":"m","prompt":"x","max_tokens":1,"extra":[%s]}'
    async with running(tmp_path) as server:
        fits = await server.post("/v1/completions", (body % ",".join([item] * 300)).encode())
        many = await server.post("/v1/completions", (body % ",".join([item] * 2000)).encode())
        text = await server.post("/v1/completions", (body % f'"{",[{" * 2000}"').encode())
    assert (fits.status, text.status) == (200, 200)
    assert (many.status, many.error["code"]) == (413, "request_too_large")


async def test_errors_do_not_repeat_megabytes(tmp_path: Path):
    word = "a" * 100_000
    async with running(tmp_path) as server:
        model = await server.post("/v1/completions", {"model": word, "prompt": "x"})
        field = await server.post("/tokenize", {word: 1})
    assert model.error["code"] == "model_not_found"
    assert model.error["message"].endswith("available models: m")
    assert field.error["param"].startswith("aaa")
    assert len(model.body) < 3000
    assert len(field.body) < 3000
