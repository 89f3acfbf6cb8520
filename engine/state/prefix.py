"""PrefixIndex: which page is the state after which tokens. Knows no sequence and no tensor.

A chain of digests stands for a text: link d is the digest of its first d paragraphs, and link 0
that of nothing, which carries what must agree besides the tokens. Pages exist on the paragraph
grid only and are whole and independent, so a dict finds them; there is no tree to split.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b

from engine.plan import SlotRef

DIGEST_BYTES = 16


def root(seed: bytes, salt: str) -> bytes:
    """Link 0. `seed` (at most 64 bytes) names weights, layout and tokenizer, `salt` the tenant."""
    return blake2b(salt.encode(), key=seed, digest_size=DIGEST_BYTES).digest()


def link(previous: bytes, tokens: Sequence[int]) -> bytes:
    """The link after `previous`: the digest of one further paragraph behind all before it.

    Bytes are little-endian everywhere, so that a digest means the same on every machine.
    """
    data = struct.pack(f"<{len(tokens)}I", *tokens)
    return blake2b(data, key=previous, digest_size=DIGEST_BYTES).digest()


@dataclass(frozen=True, slots=True, eq=False)
class Page:
    """A frozen state and the tokens it stands for."""

    digest: bytes
    num_tokens: int
    slot: SlotRef


class PrefixIndex:
    """Digest to page, in the order in which pages are given up: a segmented LRU.

    A new page is on probation; one that was used is protected. At most `max_protected` are, then
    the one not used for longest goes back on probation. *Ghosts* are links that were seen without
    a page, the last `max_ghosts` of them: a link seen twice is where texts part.
    """

    def __init__(self, paragraph_len: int, *, max_protected: int, max_ghosts: int) -> None:
        self._paragraph_len = paragraph_len
        self._max_protected = max_protected
        self._max_ghosts = max_ghosts
        # Dicts keep the order of insertion: the first is the least recently used.
        self._probation: dict[bytes, Page] = {}
        self._protected: dict[bytes, Page] = {}
        self._ghosts: dict[bytes, None] = {}

    def __len__(self) -> int:
        return len(self._probation) + len(self._protected)

    def get(self, digest: bytes) -> Page | None:
        return self._probation.get(digest) or self._protected.get(digest)

    def match(self, chain: Sequence[bytes], max_tokens: int) -> Page | None:
        """The deepest page of a chain with at most `max_tokens` tokens. Changes no order."""
        for digest in self._deepest_first(chain, max_tokens):
            if (page := self.get(digest)) is not None:
                return page
        return None

    def touch(self, page: Page) -> None:
        """The page was used. Only this one: refreshing all pages of a chain would fill the
        protected part with whole conversations of which one page each is worth keeping."""
        assert self.get(page.digest) is page, f"page of {page.num_tokens} tokens is not indexed"
        self._probation.pop(page.digest, None)
        self._protected.pop(page.digest, None)
        self._protected[page.digest] = page
        if len(self._protected) > self._max_protected:
            oldest = next(iter(self._protected))
            self._probation[oldest] = self._protected.pop(oldest)

    def is_protected(self, page: Page) -> bool:
        return self._protected.get(page.digest) is page

    def insert(self, page: Page) -> bool:
        """Add a page on probation. False, and nothing changes, if its digest has one already."""
        assert page.num_tokens > 0, "the empty text needs no page"
        assert page.num_tokens % self._paragraph_len == 0, f"{page.num_tokens} is off the grid"
        if self.get(page.digest) is not None:
            return False
        self._ghosts.pop(page.digest, None)
        self._probation[page.digest] = page
        return True

    def remove(self, page: Page) -> None:
        """Take a page out; its digest stays behind as a ghost."""
        assert self.get(page.digest) is page, f"page of {page.num_tokens} tokens is not indexed"
        self._probation.pop(page.digest, None)
        self._protected.pop(page.digest, None)
        self._remember(page.digest)

    def victims(self) -> Iterator[Page]:
        """All pages, the one to give up first in front. End the iteration before a change."""
        yield from self._probation.values()
        yield from self._protected.values()

    def note(self, chain: Sequence[bytes]) -> None:
        """A text came by: its links without a page become ghosts, the shallow ones newest."""
        for digest in self._deepest_first(chain, len(chain) * self._paragraph_len):
            if self.get(digest) is None:
                self._remember(digest)

    def shared_depth(self, chain: Sequence[bytes], max_tokens: int) -> int:
        """Tokens that the text shares with one seen before, as far as ghosts and pages know."""
        depth = min(len(chain) - 1, max_tokens // self._paragraph_len)
        while depth > 0 and chain[depth] not in self._ghosts and self.get(chain[depth]) is None:
            depth -= 1
        return depth * self._paragraph_len

    def check(self) -> None:
        """Raise AssertionError if any invariant is broken. O(pages)."""
        assert not self._probation.keys() & self._protected.keys(), "a page is in both segments"
        assert len(self._protected) <= self._max_protected, "too many pages are protected"
        assert len(self._ghosts) <= self._max_ghosts, "too many ghosts"
        slots = [page.slot for page in self.victims()]
        assert len(set(slots)) == len(slots), f"a slot is indexed twice: {slots}"
        for digest, page in (self._probation | self._protected).items():
            assert page.digest == digest, "a page is filed under another digest"
            assert page.num_tokens % self._paragraph_len == 0, f"{page.num_tokens} is off the grid"
            assert digest not in self._ghosts, "a ghost has a page"

    def _deepest_first(self, chain: Sequence[bytes], max_tokens: int) -> Iterator[bytes]:
        for depth in range(min(len(chain) - 1, max_tokens // self._paragraph_len), 0, -1):
            yield chain[depth]

    def _remember(self, digest: bytes) -> None:
        self._ghosts.pop(digest, None)
        self._ghosts[digest] = None
        if len(self._ghosts) > self._max_ghosts:
            del self._ghosts[next(iter(self._ghosts))]
