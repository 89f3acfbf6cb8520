"""PrefixIndex against a list that is searched from end to end, and what a chain promises."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.plan import SlotRef
from engine.state.prefix import Page, PrefixIndex, link, root

LENGTH, MAX_PROTECTED, MAX_GHOSTS = 2, 3, 8
Text = tuple[int, ...]

# Texts of few tokens and few values, so that most share a beginning.
TEXTS = st.lists(st.integers(0, 1), max_size=12).map(tuple)


def chain_of(text: Text, salt: str = "", seed: bytes = b"seed") -> list[bytes]:
    chain = [root(seed, salt)]
    for end in range(LENGTH, len(text) + 1, LENGTH):
        chain.append(link(chain[-1], text[end - LENGTH : end]))
    return chain


def prefixes(text: Text, max_tokens: int) -> list[Text]:
    """Beginnings of whole paragraphs, the longest first."""
    longest = min(len(text), max_tokens) // LENGTH * LENGTH
    return [text[:end] for end in range(longest, 0, -LENGTH)]


class ListIndex:
    """The same as plain lists of texts, the one to give up first in front."""

    def __init__(self) -> None:
        self.probation: list[Text] = []
        self.protected: list[Text] = []
        self.ghosts: list[Text] = []

    @property
    def texts(self) -> list[Text]:
        return self.probation + self.protected

    def match(self, text: Text, max_tokens: int) -> Text | None:
        return next((one for one in prefixes(text, max_tokens) if one in self.texts), None)

    def insert(self, text: Text) -> bool:
        if text in self.texts:
            return False
        self.ghosts = [ghost for ghost in self.ghosts if ghost != text]
        self.probation.append(text)
        return True

    def touch(self, text: Text) -> None:
        self.probation = [one for one in self.probation if one != text]
        self.protected = [one for one in self.protected if one != text] + [text]
        if len(self.protected) > MAX_PROTECTED:
            self.probation.append(self.protected.pop(0))

    def remove(self, text: Text) -> None:
        self.probation = [one for one in self.probation if one != text]
        self.protected = [one for one in self.protected if one != text]
        self.remember(text)

    def remember(self, text: Text) -> None:
        self.ghosts = ([ghost for ghost in self.ghosts if ghost != text] + [text])[-MAX_GHOSTS:]

    def note(self, text: Text) -> None:
        for one in prefixes(text, len(text)):
            if one not in self.texts:
                self.remember(one)

    def shared_depth(self, text: Text, max_tokens: int) -> int:
        known = self.texts + self.ghosts
        return max((len(one) for one in prefixes(text, max_tokens) if one in known), default=0)


ACTIONS = ("insert", "insert", "use", "use", "remove", "note", "evict")


@given(st.lists(st.tuples(st.sampled_from(ACTIONS), TEXTS, st.integers(0, 12)), max_size=60))
def test_the_index_equals_a_list(script: list[tuple[str, Text, int]]) -> None:
    index = PrefixIndex(LENGTH, max_protected=MAX_PROTECTED, max_ghosts=MAX_GHOSTS)
    oracle, slots = ListIndex(), count(1)
    pages: dict[Text, Page] = {}
    for action, text, max_tokens in script:
        chain = chain_of(text)
        page, expected = index.match(chain, max_tokens), oracle.match(text, max_tokens)
        assert page is (None if expected is None else pages[expected])
        assert index.shared_depth(chain, max_tokens) == oracle.shared_depth(text, max_tokens)
        whole = text[: len(text) // LENGTH * LENGTH]
        if action == "insert" and whole:
            new = Page(chain[-1], len(whole), SlotRef(next(slots), 0))
            assert index.insert(new) == oracle.insert(whole)
            pages[whole] = pages[whole] if index.get(chain[-1]) is not new else new
        elif action == "use" and page is not None and expected is not None:
            index.touch(page)
            oracle.touch(expected)
            assert index.is_protected(page)
        elif action == "remove" and page is not None and expected is not None:
            index.remove(page)
            oracle.remove(expected)
        elif action == "evict" and oracle.texts:
            victim = next(index.victims())
            assert victim is pages[oracle.texts[0]]
            index.remove(victim)
            oracle.remove(oracle.texts[0])
        elif action == "note":
            index.note(chain)
            oracle.note(text)
        assert list(index.victims()) == [pages[one] for one in oracle.texts]
        assert len(index) == len(oracle.texts)
        index.check()


@given(TEXTS, TEXTS)
def test_chains_agree_as_far_as_the_texts_do(first: Text, second: Text) -> None:
    beginnings = zip(prefixes(first, 99)[::-1], prefixes(second, 99)[::-1], strict=False)
    chains = zip(chain_of(first)[1:], chain_of(second)[1:], strict=False)
    assert [a == b for a, b in chains] == [a == b for a, b in beginnings]


def test_equal_paragraphs_behind_different_ones_have_different_links() -> None:
    assert chain_of((1, 2, 7, 7))[2] != chain_of((2, 1, 7, 7))[2]


def test_a_chain_depends_on_seed_and_salt() -> None:
    chains = [chain_of((1, 2), salt, seed) for salt in ("", "a") for seed in (b"x", b"y")]
    assert len({link for chain in chains for link in chain}) == 8


def test_a_link_is_16_bytes_and_the_same_on_every_machine() -> None:
    assert link(root(b"seed", ""), (1, 65535)).hex() == "e6dd5eb3c216806dc4be0ccf13632042"


def test_evicted_pages_are_remembered_as_ghosts() -> None:
    index = PrefixIndex(LENGTH, max_protected=1, max_ghosts=1)
    chain = chain_of((1, 2, 3, 4))
    page = Page(chain[2], 4, SlotRef(1, 0))
    index.insert(page)
    index.remove(page)
    assert index.match(chain, 4) is None
    assert index.shared_depth(chain, 4) == 4


def test_of_too_many_ghosts_the_shallow_ones_stay() -> None:
    index = PrefixIndex(LENGTH, max_protected=1, max_ghosts=2)
    chain = chain_of((1, 2, 3, 4, 5, 6, 7, 8))
    index.note(chain)
    assert index.shared_depth(chain, 8) == 4


PAGE = Page(chain_of((1, 2))[1], 2, SlotRef(1, 0))


@pytest.mark.parametrize(
    ("misuse", "message"),
    [
        (lambda index: index.insert(Page(b"x", 3, SlotRef(1, 0))), "3 is off the grid"),
        (lambda index: index.insert(Page(b"x", 0, SlotRef(1, 0))), "the empty text"),
        (lambda index: index.remove(PAGE), "is not indexed"),
        (lambda index: index.touch(PAGE), "is not indexed"),
    ],
)
def test_misuse_is_noticed(misuse: Callable[[PrefixIndex], object], message: str) -> None:
    index = PrefixIndex(LENGTH, max_protected=1, max_ghosts=1)
    with pytest.raises(AssertionError, match=message):
        misuse(index)
