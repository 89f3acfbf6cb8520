"""Streamed text is what decoding the whole would give, cut at the stop string, and never late."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.output import TextOutput
from engine.tokenizer import Tokenizer

BYTE_TABLE = {byte + 1: bytes([byte]) for byte in range(256)}

# Every beginning of every character. Python's decoder waits for the last byte of a surrogate too,
# though its second byte already shows that no character can come of it.
CHARACTER_BEGINNINGS = {
    encoded[:length]
    for code in range(0x80, 0x110000, 64)
    for encoded in [chr(code).encode("utf-8", "surrogatepass")]
    for length in range(1, len(encoded))
}

STOPS = st.lists(st.text(alphabet="ab:你\n", max_size=5), max_size=4).map(tuple)
VALID_PIECES = st.text(alphabet="ab:你好\n", min_size=1, max_size=5).map(str.encode)
BYTE_PIECES = st.lists(
    st.sampled_from(b"ab:\n\xe4\xbd\xa0\xf0\x9f\x91\xa9\xed\xa0\xc3\xff"), min_size=1, max_size=4
).map(bytes)
PIECES = st.lists(st.one_of(VALID_PIECES, BYTE_PIECES, st.just(b"")), max_size=25)


def tokenize(pieces: list[bytes]) -> tuple[Tokenizer, list[int]]:
    """A vocabulary that has every piece as a token, and the pieces' ids; b"" is id 0."""
    longer = sorted({piece for piece in pieces if len(piece) > 1})
    table = BYTE_TABLE | dict(enumerate(longer, 257))
    ids = {token: token_id for token_id, token in table.items()} | {b"": 0}
    return Tokenizer(table), [ids[piece] for piece in pieces]


def run(
    pieces: list[bytes],
    stop: tuple[str, ...] = (),
    *,
    min_tokens: int = 0,
    includes_stop: bool = False,
) -> tuple[list[str], str | None]:
    """What each push gave (up to a stop string) and, last, what finish gave; the stop string."""
    tokenizer, ids = tokenize(pieces)
    output = TextOutput(tokenizer, stop, min_tokens=min_tokens, includes_stop=includes_stop)
    texts = []
    for token_id in ids:
        texts.append(output.push(token_id))
        if output.matched_stop is not None:
            break
    return [*texts, output.finish()], output.matched_stop


def naive(
    pieces: list[bytes],
    stop: tuple[str, ...],
    *,
    min_tokens: int = 0,
    includes_stop: bool = False,
) -> tuple[str, str | None]:
    """Search all bytes again after every token; what was complete before the token is text."""
    whole = b""
    for number, piece in enumerate(pieces):
        begin, whole = len(whole), whole + piece
        found = [
            (start, -len(word), word)
            for word in (s.encode() for s in stop if s)
            for start in range(len(whole))
            if whole.startswith(word, start) and start + len(word) > begin
        ]
        if found and number >= min_tokens:
            start, _, matched = min(found)
            end = start + len(matched) if includes_stop else start
            return whole[:end].decode("utf-8", "replace"), matched.decode()
    return whole.decode("utf-8", "replace"), None


def certain_text(whole: bytes, stop: tuple[str, ...]) -> str:
    """All that cannot change any more, whatever comes: neither a stop string nor a character."""
    beginnings = {s.encode()[:n] for s in stop for n in range(1, len(s.encode()))}
    num_held = max((len(b) for b in beginnings if whole.endswith(b)), default=0)
    whole = whole[: len(whole) - num_held]
    num_held = max((len(b) for b in CHARACTER_BEGINNINGS if whole.endswith(b)), default=0)
    return whole[: len(whole) - num_held].decode("utf-8", "replace")


@given(PIECES, STOPS)
def test_text_is_the_whole_decoded_and_cut_at_the_stop(
    pieces: list[bytes], stop: tuple[str, ...]
) -> None:
    texts, matched = run(pieces, stop)
    assert ("".join(texts), matched) == naive(pieces, stop)


@given(PIECES, STOPS, st.integers(0, 6), st.booleans())
def test_stops_count_behind_the_least_number_of_tokens_and_may_stay(
    pieces: list[bytes], stop: tuple[str, ...], min_tokens: int, includes_stop: bool
) -> None:
    rules = dict(min_tokens=min_tokens, includes_stop=includes_stop)
    texts, matched = run(pieces, stop, **rules)
    assert ("".join(texts), matched) == naive(pieces, stop, **rules)


def test_stop_that_began_before_the_least_number_of_tokens_and_ends_behind_counts() -> None:
    assert run([b"xa", b"b", b"y"], ("ab",), min_tokens=1) == (["x", "", ""], "ab")
    assert run([b"xa", b"b", b"y"], ("ab",), min_tokens=2) == (["x", "", "aby", ""], None)


@given(PIECES, STOPS, st.booleans())
def test_emitted_bytes_are_those_of_the_text(
    pieces: list[bytes], stop: tuple[str, ...], includes_stop: bool
) -> None:
    tokenizer, ids = tokenize(pieces)
    output = TextOutput(tokenizer, stop, includes_stop=includes_stop)
    num_bytes = 0
    for token_id in ids:
        output.push(token_id)
        num_bytes += len(tokenizer.token_bytes(token_id))
        if output.matched_stop is not None:
            break
        assert output.num_emitted_bytes + output.num_held_bytes == num_bytes
    output.finish()
    text, _ = naive(pieces, stop, includes_stop=includes_stop)
    whole = b"".join(pieces)[: output.num_emitted_bytes]
    assert whole.decode("utf-8", "replace") == text


@given(st.lists(st.binary(min_size=1, max_size=4)))
def test_any_bytes_decode_as_bytes_decode_does(pieces: list[bytes]) -> None:
    texts, _ = run(pieces)
    assert "".join(texts) == b"".join(pieces).decode("utf-8", "replace")


@given(PIECES, STOPS)
def test_only_what_may_still_change_is_held_back(
    pieces: list[bytes], stop: tuple[str, ...]
) -> None:
    texts, matched = run(pieces, stop)
    num_unmatched = len(texts) - 1 - (matched is not None)
    for n in range(num_unmatched + 1):
        assert "".join(texts[:n]) == certain_text(b"".join(pieces[:n]), stop)


@given(st.lists(st.sampled_from([b"a", b"b", b"aa", b"ab", b"ba", b"bab"]), max_size=40))
def test_periodic_stops_are_found(pieces: list[bytes]) -> None:
    for stop in [("aab",), ("abab", "bb"), ("aaaa", "aabaa", "aba"), ("babba", "abba", "b" * 6)]:
        texts, matched = run(pieces, stop)
        assert ("".join(texts), matched) == naive(pieces, stop)


def test_character_appears_with_its_last_byte() -> None:
    assert run([b"\xe4", b"\xbd", b"\xa0", b"!"]) == (["", "", "你", "!", ""], None)


def test_broken_character_is_replaced_as_soon_as_it_is_broken() -> None:
    assert run([b"\xe4\xbd", b"x", b"\xff"]) == (["", "\ufffdx", "\ufffd", ""], None)


def test_unfinished_character_is_replaced_at_the_end() -> None:
    assert run([b"a\xf0\x9f", b"\x91"]) == (["a", "", "\ufffd"], None)


def test_stop_across_tokens_is_removed() -> None:
    assert run([b"Hi.", b"\n", b"User", b":", b" x"], ("\nUser:",)) == (
        ["Hi.", "", "", "", ""],
        "\nUser:",
    )


def test_text_around_a_stop_in_one_token_is_kept_before_and_dropped_behind() -> None:
    assert run([b"ok STOP no"], (" STOP",)) == (["ok", ""], " STOP")


def test_text_that_only_began_like_a_stop_is_released() -> None:
    assert run([b"Hi\n", b"User", b" name"], ("\nUser:",)) == (
        ["Hi", "", "\nUser name", ""],
        None,
    )


def test_held_beginning_of_a_stop_comes_at_the_end() -> None:
    assert run([b"Hi\nUser"], ("\nUser:",)) == (["Hi", "\nUser"], None)


def test_no_more_is_held_than_the_beginning_of_a_stop() -> None:
    assert run([b"aaab", b"aa"], ("aabb",))[0] == ["a", "aab", "aa"]


@pytest.mark.parametrize("stop", [("ab", "abc"), ("abc", "ab"), ("b", "ab", "abc", "c")])
def test_longest_of_the_earliest_stops_wins(stop: tuple[str, ...]) -> None:
    assert run([b"xabcab"], stop) == (["x", ""], "abc")


def test_request_ends_with_the_first_token_that_completes_a_stop() -> None:
    assert run([b"xabc", b"d"], ("abcd", "bc")) == (["xa", ""], "bc")


def test_unfinished_character_in_front_of_a_stop_is_replaced() -> None:
    assert run([b"a\xe4\xbd", b"END"], ("END",)) == (["a", "\ufffd", ""], "END")


def test_empty_stops_are_ignored() -> None:
    assert run([b"a", b"b"], ("", "")) == (["a", "b", ""], None)
    assert run([b"a", b"b"], ("", "b")) == (["a", "", ""], "b")


def test_token_zero_gives_nothing() -> None:
    assert run([b"\xe4", b"", b"\xbd\xa0", b""]) == (["", "", "你", "", ""], None)


def test_push_behind_a_stop_is_a_mistake() -> None:
    output = TextOutput(Tokenizer(BYTE_TABLE), ("a",))
    output.push(1 + ord("a"))
    with pytest.raises(AssertionError, match="behind the stop"):
        output.push(1 + ord("b"))


def test_stop_without_utf8_form_is_refused() -> None:
    with pytest.raises(ValueError, match=r"stop string .* lone surrogate"):
        TextOutput(Tokenizer(BYTE_TABLE), ("ok", "\ud800"))


def test_unknown_token_is_refused() -> None:
    with pytest.raises(ValueError, match="token id 999"):
        TextOutput(Tokenizer(BYTE_TABLE)).push(999)
