"""docs/config.md says what the schema says."""

from __future__ import annotations

from pathlib import Path

import pytest

from config.docs import TABLES, render, update
from config.key import keys_of

DOCS = Path(__file__).parents[2] / "docs" / "config.md"


def test_docs_are_in_step_with_the_schema() -> None:
    text = DOCS.read_text()
    assert update(text) == text, "run: python -m config.docs docs/config.md"


@pytest.mark.parametrize("config_class", TABLES)
def test_every_key_has_a_row(config_class: type) -> None:
    rows = render(config_class).splitlines()[2:]
    assert len(rows) == len(keys_of(config_class))
    assert all(row.count("|") == rows[0].count("|") for row in rows)


def test_a_page_without_a_table_is_an_error() -> None:
    with pytest.raises(ValueError, match="keys of ModelConfig"):
        update("nothing here")
