"""Prompts to tokens: what is put in front, and which tokens lie before each message."""

from __future__ import annotations

from itertools import accumulate

import pytest
from hypothesis import given
from hypothesis import strategies as st

from api.prompt import BorderFinder, EncodedPrompt, Prompt, encode
from engine.tokenizer import Tokenizer

LONG_TOKENS = [b"ab", b"a\n\n", b"\n\n", b"\n\nUser", b"User:", "é\n".encode(), b"a" * 9]


def small_tokenizer() -> Tokenizer:
    singles = {byte + 1: bytes([byte]) for byte in range(256)}
    return Tokenizer(singles | {257 + i: token for i, token in enumerate(LONG_TOKENS)})


TOKENIZER = small_tokenizer()


@given(
    texts=st.lists(st.text(alphabet="ab \néUsr:語", max_size=20), min_size=1, max_size=5),
    num_before=st.integers(0, 2),
    num_each=st.integers(1, 4),
)
def test_border_finder_counts_the_tokens_that_end_before_each_place(
    texts: list[str], num_before: int, num_each: int
):
    text = "".join(texts) + "."
    places = list(accumulate(map(len, texts)))
    ids = TOKENIZER.encode(text)
    ends = list(accumulate(len(TOKENIZER.token_bytes(token_id)) for token_id in ids))
    finder = BorderFinder(TOKENIZER, text, places, num_before)
    for start in range(0, len(ids), num_each):
        finder.feed(ids[start : start + num_each])
    expected = [
        num_before + sum(end <= len(text[:place].encode()) for end in ends) for place in places
    ]
    assert finder.found == expected


@pytest.mark.parametrize("is_continuation", [False, True])
async def test_only_what_begins_a_document_gets_its_token(is_continuation: bool):
    prompt = Prompt("prompt", "b", is_continuation=is_continuation)
    assert (await encode(prompt, TOKENIZER)).ids == (
        (1 + ord("b"),) if is_continuation else (0, 99)
    )


async def test_token_ids_are_taken_as_they_are():
    assert await encode(Prompt("prompt", (5, 6)), TOKENIZER) == EncodedPrompt((5, 6))


async def test_hints_are_where_messages_begin_except_the_first():
    text = "User: a\n\nUser: bb\n\nAssistant:"
    starts = (0, text.index("User: b"))
    encoded = await encode(Prompt("messages", text, starts=starts), TOKENIZER)
    (hint,) = encoded.hints
    # "a\n\n" is one token, so the second message begins at a border.
    assert TOKENIZER.decode(encoded.ids[:hint]) == "User: a\n\n"


async def test_hint_is_before_a_token_that_crosses_into_a_message():
    text = "User: x\n\nUser: bb"
    encoded = await encode(Prompt("messages", text, starts=(0, 9)), TOKENIZER)
    (hint,) = encoded.hints
    assert TOKENIZER.decode(encoded.ids[:hint]) == "User: x"
    assert TOKENIZER.decode(encoded.ids[hint : hint + 1]) == "\n\nUser"


async def test_hints_of_a_long_text_reach_over_its_slices():
    text = "User: " + "word " * 1000 + "\n\nUser: b"
    start = text.rindex("User")
    encoded = await encode(Prompt("messages", text, starts=(0, start)), TOKENIZER)
    (hint,) = encoded.hints
    assert len(TOKENIZER.decode(encoded.ids[:hint])) in (start, start - 2)
