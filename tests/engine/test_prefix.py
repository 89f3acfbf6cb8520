"""PrefixIndex against a list that is searched from end to end, and what a chain promises."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.plan import SlotRef
from engine.state.page import Page
from engine.state.prefix import PrefixIndex, extend, link, root

LENGTH, MAX_GHOSTS = 2, 8
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


def page_of(text: Text) -> Page:
    return Page(chain_of(text)[-1], len(text), slot=SlotRef(1, 0))


class ListIndex:
    """The same as plain lists of texts."""

    def __init__(self) -> None:
        self.texts: list[Text] = []
        self.ghosts: list[Text] = []

    def matches(self, text: Text, max_tokens: int) -> list[Text]:
        return [one for one in prefixes(text, max_tokens) if one in self.texts]

    def insert(self, text: Text) -> None:
        self.ghosts = [ghost for ghost in self.ghosts if ghost != text]
        self.texts.append(text)

    def remove(self, text: Text) -> None:
        self.texts.remove(text)
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


ACTIONS = ("insert", "insert", "remove", "note", "evict")


@given(st.lists(st.tuples(st.sampled_from(ACTIONS), TEXTS, st.integers(0, 12)), max_size=60))
def test_the_index_equals_a_list(script: list[tuple[str, Text, int]]) -> None:
    index = PrefixIndex(LENGTH, max_ghosts=MAX_GHOSTS)
    oracle = ListIndex()
    pages: dict[Text, Page] = {}
    for action, text, max_tokens in script:
        chain = chain_of(text)
        expected = oracle.matches(text, max_tokens)
        assert list(index.matches(chain, max_tokens)) == [(pages[t], len(t)) for t in expected]
        assert index.shared_depth(chain, max_tokens) == oracle.shared_depth(text, max_tokens)
        whole = text[: len(text) // LENGTH * LENGTH]
        if action == "insert" and whole and whole not in oracle.texts:
            pages[whole] = page_of(whole)
            index.insert(pages[whole])
            oracle.insert(whole)
        elif action == "remove" and expected:
            index.remove(pages[expected[0]])
            oracle.remove(expected[0])
        elif action == "evict" and oracle.texts:
            index.remove(pages[oracle.texts[0]])
            oracle.remove(oracle.texts[0])
        elif action == "note":
            index.note(chain)
            oracle.note(text)
        assert list(index) == [pages[one] for one in oracle.texts]
        assert len(index) == len(oracle.texts)
        known = oracle.texts + oracle.ghosts
        for end in range(LENGTH, len(whole) + 1, LENGTH):
            assert index.has_seen(chain[end // LENGTH]) == (text[:end] in known)
            assert (index.get(chain[end // LENGTH]) is not None) == (text[:end] in oracle.texts)
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


def test_a_chain_depends_on_the_state_it_goes_on_from() -> None:
    bases = [b"", b"a" * 16, b"b" * 16]
    assert len({link(root(b"seed", "", base), (1, 2)) for base in bases}) == 3


def test_a_chain_is_extended_by_whole_paragraphs_only() -> None:
    text = (1, 2, 3, 4, 5)
    chain = [root(b"seed", "")]
    for num_tokens in (1, 4, 4, 5):
        extend(chain, lambda begin, end: text[begin:end], num_tokens, LENGTH)
    assert chain == chain_of(text)


def test_evicted_pages_are_remembered_as_ghosts() -> None:
    index = PrefixIndex(LENGTH, max_ghosts=1)
    chain, page = chain_of((1, 2, 3, 4)), page_of((1, 2, 3, 4))
    index.insert(page)
    index.remove(page)
    assert list(index.matches(chain, 4)) == []
    assert index.shared_depth(chain, 4) == 4


def test_of_too_many_ghosts_the_shallow_ones_stay() -> None:
    index = PrefixIndex(LENGTH, max_ghosts=2)
    chain = chain_of((1, 2, 3, 4, 5, 6, 7, 8))
    index.note(chain)
    assert index.shared_depth(chain, 8) == 4


def test_removing_what_another_page_has_replaced_changes_nothing() -> None:
    index = PrefixIndex(LENGTH, max_ghosts=9)
    old, new = page_of((1, 2)), page_of((1, 2))
    index.insert(old)
    index.remove(old)
    index.insert(new)
    index.remove(old)
    assert index.get(new.digest) is new


def test_a_second_page_of_the_same_text_is_refused() -> None:
    index = PrefixIndex(LENGTH, max_ghosts=1)
    index.insert(page_of((1, 2)))
    with pytest.raises(AssertionError, match="two pages of 2 tokens are equal"):
        index.insert(page_of((1, 2)))


def test_check_finds_a_page_that_lies_nowhere() -> None:
    index = PrefixIndex(LENGTH, max_ghosts=1)
    index.insert(Page(b"x", 2))
    with pytest.raises(AssertionError, match="lies nowhere"):
        index.check()
