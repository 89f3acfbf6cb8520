"""PrefixIndex: which page is the state after which tokens. Knows no sequence and no place.

A chain of digests stands for a text: link d is the digest of its first d paragraphs, and link 0
that of nothing, which carries what must agree besides the tokens. Pages for any continuation lie
on that grid; a page of a whole prompt, which may end off the grid, is found by the digest of all
of it. Pages are whole and independent, so a dict finds them; there is no tree to split.
"""

from __future__ import annotations

import struct
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from hashlib import blake2b

from engine.state.page import Page

DIGEST_BYTES = 16


def root(seed: bytes, salt: str, base: bytes = b"") -> bytes:
    """Link 0. `seed` (at most 64 bytes) names weights, layout and tokenizer, `salt` the tenant,
    `base` (16 bytes) the state that a text begins from, if that is not the zero state."""
    return blake2b(salt.encode(), key=seed, person=base, digest_size=DIGEST_BYTES).digest()


def link(previous: bytes, tokens: Sequence[int]) -> bytes:
    """The link after `previous`: the digest of some further tokens behind all before it.

    Bytes are little-endian everywhere, so that a digest means the same on every machine.
    """
    data = struct.pack(f"<{len(tokens)}I", *tokens)
    return blake2b(data, key=previous, digest_size=DIGEST_BYTES).digest()


def extend(
    chain: list[bytes],
    tokens: Callable[[int, int], tuple[int, ...]],
    num_tokens: int,
    paragraph_len: int,
) -> None:
    """Make a chain reach over the whole paragraphs of `num_tokens` tokens; `tokens(begin, end)`
    gives those of the text."""
    while (end := len(chain) * paragraph_len) <= num_tokens:
        chain.append(link(chain[-1], tokens(end - paragraph_len, end)))


def digest_of(
    chain: Sequence[bytes],
    tokens: Callable[[int, int], tuple[int, ...]],
    num_tokens: int,
    paragraph_len: int,
) -> bytes:
    """Of a text's first `num_tokens` tokens, on the grid or off it, from its chain."""
    depth = num_tokens // paragraph_len
    rest = tokens(depth * paragraph_len, num_tokens)
    return link(chain[depth], rest) if rest else chain[depth]


class PrefixIndex:
    """Digest to page. *Ghosts* are links that were seen without a page, the last `max_ghosts` of
    them: a link seen twice is where texts part."""

    def __init__(self, paragraph_len: int, *, max_ghosts: int) -> None:
        self._paragraph_len = paragraph_len
        self._max_ghosts = max_ghosts
        self._pages: dict[bytes, Page] = {}
        # In order of insertion. A dict would look for its first one past all that were deleted.
        self._ghosts: OrderedDict[bytes, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._pages)

    def __iter__(self) -> Iterator[Page]:
        return iter(self._pages.values())

    def get(self, digest: bytes) -> Page | None:
        return self._pages.get(digest)

    def matches(self, chain: Sequence[bytes], max_tokens: int) -> Iterator[tuple[Page, int]]:
        """The pages of a chain and the tokens they save, at most `max_tokens`, deepest first."""
        for depth in self._depths(chain, max_tokens):
            if (page := self._pages.get(chain[depth])) is not None:
                yield page, depth * self._paragraph_len

    def insert(self, page: Page) -> None:
        """Add a page; its digest must have none."""
        assert page.digest not in self._pages, f"two pages of {page.num_tokens} tokens are equal"
        self._ghosts.pop(page.digest, None)
        self._pages[page.digest] = page

    def remove(self, page: Page) -> None:
        """Take a page out, if it is in; its digest stays behind as a ghost."""
        if self._pages.get(page.digest) is page:
            del self._pages[page.digest]
            self._remember(page.digest)

    def note(self, chain: Sequence[bytes]) -> None:
        """A text came by: its links without a page become ghosts, the shallow ones newest.

        The links of a very long one that would push each other out are left alone.
        """
        for digest in reversed(chain[1 : 1 + self._max_ghosts]):
            if digest not in self._pages:
                self._remember(digest)

    def has_seen(self, digest: bytes) -> bool:
        """A text with this link came by, or left a page, not too long ago."""
        return digest in self._ghosts or digest in self._pages

    def shared_depth(self, chain: Sequence[bytes], max_tokens: int) -> int:
        """Tokens that the text shares with one seen before, as far as ghosts and pages know."""
        for depth in self._depths(chain, max_tokens):
            if self.has_seen(chain[depth]):
                return depth * self._paragraph_len
        return 0

    def check(self) -> None:
        """Raise AssertionError if any invariant is broken. O(pages)."""
        assert len(self._ghosts) <= self._max_ghosts, "too many ghosts"
        for digest, page in self._pages.items():
            assert page.digest == digest, "a page is filed under another digest"
            assert page.exists, f"a page of {page.num_tokens} tokens lies nowhere"
            assert digest not in self._ghosts, "a ghost has a page"

    def _depths(self, chain: Sequence[bytes], max_tokens: int) -> range:
        return range(min(len(chain) - 1, max_tokens // self._paragraph_len), 0, -1)

    def _remember(self, digest: bytes) -> None:
        self._ghosts.pop(digest, None)
        self._ghosts[digest] = None
        if len(self._ghosts) > self._max_ghosts:
            self._ghosts.popitem(last=False)
