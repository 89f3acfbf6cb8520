"""docs/reliability.md names tests that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
TEXT = (TESTS.parent / "docs" / "reliability.md").read_text()
NAMED = sorted(set(re.findall(r"`(test_\w+)::(test_\w+)`", TEXT)))


def test_many_are_named():
    assert len(NAMED) > 50


@pytest.mark.parametrize(("file", "name"), NAMED)
def test_it_exists(file: str, name: str):
    found = [path for path in TESTS.rglob(f"{file}.py") if f"def {name}(" in path.read_text()]
    assert found, f"no tests/**/{file}.py has {name}"
