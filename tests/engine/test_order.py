"""Slru against two lists."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from engine.plan import SlotRef
from engine.state.order import Slru
from engine.state.page import Page

MAX_PROTECTED = 3
PAGES = [Page(bytes([place]), place, slot=SlotRef(place, 0)) for place in range(1, 9)]
pages = st.sampled_from(PAGES)


class SlruMachine(RuleBasedStateMachine):
    """The lists hold the one to give up first in front."""

    def __init__(self) -> None:
        super().__init__()
        self.slru = Slru(MAX_PROTECTED)
        self.probation: list[Page] = []
        self.protected: list[Page] = []

    @rule(page=pages)
    def insert(self, page: Page) -> None:
        self.slru.insert(page)
        if page not in self.probation + self.protected:
            self.probation.append(page)

    @rule(page=pages)
    def remove(self, page: Page) -> None:
        self.slru.remove(page)
        self.probation = [one for one in self.probation if one is not page]
        self.protected = [one for one in self.protected if one is not page]

    @rule(page=pages)
    def touch(self, page: Page) -> None:
        if page not in self.probation + self.protected:
            return
        self.slru.touch(page)
        self.probation = [one for one in self.probation if one is not page]
        self.protected = [one for one in self.protected if one is not page] + [page]
        if len(self.protected) > MAX_PROTECTED:
            self.probation.append(self.protected.pop(0))

    @invariant()
    def agrees_with_the_lists(self) -> None:
        self.slru.check()
        assert list(self.slru) == self.probation + self.protected
        assert len(self.slru) == len(self.probation) + len(self.protected)
        for page in PAGES:
            assert (page in self.slru) == (page in self.probation + self.protected)
            assert self.slru.is_protected(page) == (page in self.protected)


TestSlruMachine = SlruMachine.TestCase
TestSlruMachine.settings = settings(max_examples=50, stateful_step_count=40)


def test_what_was_used_is_given_up_after_what_was_not() -> None:
    slru = Slru(1)
    for page in PAGES[:3]:
        slru.insert(page)
    slru.touch(PAGES[0])
    assert list(slru) == [PAGES[1], PAGES[2], PAGES[0]]


def test_where_nothing_may_be_protected_a_use_still_counts() -> None:
    slru = Slru(0)
    for page in PAGES[:3]:
        slru.insert(page)
    slru.touch(PAGES[0])
    assert list(slru) == [PAGES[1], PAGES[2], PAGES[0]]
    assert not slru.is_protected(PAGES[0])


def test_equal_pages_are_not_the_same() -> None:
    slru = Slru(1)
    slru.insert(Page(b"x", 1))
    assert Page(b"x", 1) not in slru


def test_touching_a_page_that_is_not_there_is_noticed() -> None:
    with pytest.raises(AssertionError, match="of 1 tokens is not in this tier"):
        Slru(1).touch(PAGES[0])
