"""More engines that replay their decode steps, by hand: see test_replayed_engines.py."""

from __future__ import annotations

import pytest

from tests.engine.test_engine import vocab
from tests.engine.test_engine_cache import test_what_is_cached_equals_what_is_computed
from tests.engine.test_engine_pages import test_poison_in_whatever_is_free_changes_no_text
from tests.engine.test_engine_random import (
    test_pool_accounting_and_answers_hold_after_random_operations,
)
from tests.engine.test_replayed_engines import switched

__all__ = [
    "switched",
    "test_poison_in_whatever_is_free_changes_no_text",
    "test_pool_accounting_and_answers_hold_after_random_operations",
    "test_what_is_cached_equals_what_is_computed",
    "vocab",
]
pytestmark = pytest.mark.slow
