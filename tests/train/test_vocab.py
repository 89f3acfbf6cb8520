"""Choosing a small vocabulary."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.tokenizer import Tokenizer
from train.vocab import BYTES, longest_match, main, select_tokens, write_vocabulary


@given(st.binary(max_size=30), st.sets(st.binary(min_size=2, max_size=5), max_size=20))
def test_cutting_equals_the_tokenizer(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, more: set[bytes]
) -> None:
    tokens = [*BYTES, *sorted(more)]
    path = tmp_path_factory.mktemp("v") / "v.txt"
    write_vocabulary(path, tokens)
    tokenizer = Tokenizer.load(path)
    cut = list(longest_match(data, frozenset(tokens), 5))
    assert cut == [tokenizer.token_bytes(i) for i in tokenizer.encode_bytes(data)]


def test_the_bytes_come_first_and_the_size_counts_id_zero() -> None:
    tokens = select_tokens(Counter({b" hello": 5}), [b" hello", b"he", b"ll"], 258)
    assert tokens == [*BYTES, b" hello"]


def test_only_tokens_of_the_larger_vocabulary_that_occur_are_taken() -> None:
    tokens = select_tokens(Counter({b"abab": 5}), [b"ab", b"zz", b"ba"], 300)
    assert set(tokens[256:]) <= {b"ab", b"ba"}
    assert b"ab" in tokens


def test_uses_count_after_longer_tokens_have_taken_theirs() -> None:
    # "ab" occurs in every chunk, but "abc" takes all of them: it must not keep a place.
    tokens = select_tokens(Counter({b"abc": 9, b"xy": 1}), [b"ab", b"abc", b"xy"], 259)
    assert tokens[256:] == [b"abc", b"xy"]


def test_too_small_a_size_is_refused() -> None:
    with pytest.raises(ValueError, match="--size 256"):
        select_tokens(Counter(), [], 256)


def test_a_bad_option_of_the_command_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "t.jsonl").write_text("")
    for more in (["--size", "256"], ["--larger", "none.txt"]):
        with pytest.raises(SystemExit, match="2"):
            main([str(tmp_path / "o.txt"), str(tmp_path / "t.jsonl"), *more])
        assert more[1] in capsys.readouterr().err


def test_the_command_writes_a_loadable_vocabulary(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_vocabulary(tmp_path / "large.txt", [*BYTES, b" the", b"the", b" cat", b" dog", b"qq"])
    (tmp_path / "t.jsonl").write_text(json.dumps({"text": "the cat the cat the dog"}) + "\n")
    out = tmp_path / "small.txt"
    large = str(tmp_path / "large.txt")
    assert main([str(out), str(tmp_path / "t.jsonl"), "--size", "260", "--larger", large]) == 0
    tokenizer = Tokenizer.load(out)
    assert tokenizer.vocab_size == 260
    assert {tokenizer.token_bytes(i) for i in (257, 258, 259)} == {b" the", b" cat", b" dog"}
    assert "259 tokens" in capsys.readouterr().out
