"""Slru: in which order the pages of one tier give way. Knows nothing else about them."""

from __future__ import annotations

from collections.abc import Iterator

from engine.state.page import Page


class Slru:
    """A segmented LRU: a new page is on probation, one that was used is protected.

    At most `max_protected` are, then the one not used for longest goes back on probation.
    """

    def __init__(self, max_protected: int) -> None:
        self._max_protected = max_protected
        # Dicts keep the order of insertion: the first is the least recently used.
        self._probation: dict[Page, None] = {}
        self._protected: dict[Page, None] = {}

    def __len__(self) -> int:
        return len(self._probation) + len(self._protected)

    def __contains__(self, page: Page) -> bool:
        return page in self._probation or page in self._protected

    def __iter__(self) -> Iterator[Page]:
        """The one to give up first in front. End the iteration before a change."""
        yield from self._probation
        yield from self._protected

    def insert(self, page: Page) -> None:
        """Add a page on probation; one that is there keeps its place."""
        if page not in self._protected:
            self._probation.setdefault(page)

    def remove(self, page: Page) -> None:
        """Take a page out, if it is there."""
        self._probation.pop(page, None)
        self._protected.pop(page, None)

    def touch(self, page: Page) -> None:
        """The page was used. Only this one: refreshing all pages of a text would fill the
        protected part with whole conversations of which one page each is worth keeping."""
        assert page in self, f"a page of {page.num_tokens} tokens is not in this tier"
        self.remove(page)
        self._protected[page] = None
        if len(self._protected) > self._max_protected:
            oldest = next(iter(self._protected))
            del self._protected[oldest]
            self._probation[oldest] = None

    def is_protected(self, page: Page) -> bool:
        return page in self._protected

    def check(self) -> None:
        """Raise AssertionError if any invariant is broken."""
        assert not self._probation.keys() & self._protected.keys(), "a page is in both segments"
        assert len(self._protected) <= self._max_protected, "too many pages are protected"
