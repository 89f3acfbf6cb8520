"""docs/api.md names every field, error code and metric there is."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from api.message_body import MESSAGES, MessagesBody
from api.metrics import Metrics
from api.response_body import RESPONSES, ResponseBody
from api.schemas import ChatBody, CompletionBody
from api.unsupported import CHAT, COMPLETIONS

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "api.md").read_text()


@pytest.mark.parametrize(
    "name",
    sorted(
        {
            *ChatBody.__struct_fields__,
            *CompletionBody.__struct_fields__,
            *ResponseBody.__struct_fields__,
            *MessagesBody.__struct_fields__,
        }
        - {"stream_options", "text", "reasoning"}
    ),
)
def test_every_field_is_explained(name: str):
    assert f"`{name}`" in TEXT


@pytest.mark.parametrize("name", sorted({*CHAT, *COMPLETIONS, *RESPONSES, *MESSAGES}))
def test_every_refused_field_is_named(name: str):
    assert f"`{name}`" in TEXT


def test_every_error_code_is_named():
    sources = "".join(path.read_text() for path in (ROOT / "api").rglob("*.py"))
    codes = set(re.findall(r'code: str = "(\w+)"|code="(\w+)"', sources))
    for code in {first or second for first, second in codes}:
        assert f"`{code}`" in TEXT, code


async def test_every_metric_is_named():
    text = (await Metrics(dict, has_vllm_names=True).render()).decode()
    for family in text_string_to_metric_families(text):
        if not family.name.startswith("process_"):
            assert re.search(f"{re.escape(family.name)}(_total)?[`{{]", TEXT), family.name
