"""Encoding is exact greedy longest match, for any vocabulary and any bytes; files are checked."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import chain
from pathlib import Path

import pytest
import rwkv.rwkv_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from rwkv.rwkv_tokenizer import TRIE_TOKENIZER

from engine import tokenizer as tokenizer_module
from engine.tokenizer import WORLD_VOCAB, Tokenizer, TokenizerError

BYTE_TABLE = {byte + 1: bytes([byte]) for byte in range(256)}
BYTE_LINES = [f"{i} {token!r} 1" for i, token in BYTE_TABLE.items()]

# Words, scripts, emoji with joiners, controls, and the three bytes that glue whitespace.
CHARACTERS = st.sampled_from(" \n\t。、éİﷺ\u0301\u2002\u2028\x00\x1c\xa0")
WORDS = st.sampled_from(
    ("  ", "\r\n", "你好", "世界", "мир", "👩\u200d👩\u200d👧", " the", "User:", "42", "'s")
)
GLUED_BYTES = st.lists(st.sampled_from(b" \t\r\n\x82\xa6\x8cab\xe3\x80")).map(bytes)
TEXT = st.one_of(st.text(), st.lists(CHARACTERS | WORDS, max_size=40).map("".join))


@cache
def world() -> Tokenizer:
    return Tokenizer.load(WORLD_VOCAB)


@cache
def bulk_world() -> Tokenizer:
    return Tokenizer.load(WORLD_VOCAB, is_bulk=True)


@cache
def reference_world() -> TRIE_TOKENIZER:
    return TRIE_TOKENIZER(str(reference_world_path()))


def reference_world_path() -> Path:
    return Path(rwkv.rwkv_tokenizer.__file__).with_name(f"{WORLD_VOCAB}.txt")


def small_path(shared_dir: Path) -> Path:
    return shared_dir / "assets" / "vocab" / "rwkv_vocab_small2047.txt"


def longest_match(table: dict[int, bytes], data: bytes) -> list[int]:
    """The definition, as slowly as it is written down."""
    ids = []
    while data:
        best = max((i for i in table if data.startswith(table[i])), key=lambda i: len(table[i]))
        ids.append(best)
        data = data[len(table[best]) :]
    return ids


def with_tokens(tokens: Iterable[bytes]) -> dict[int, bytes]:
    longer = sorted({token for token in tokens if len(token) > 1})
    return BYTE_TABLE | dict(enumerate(longer, 257))


def write_vocabulary(folder: Path, lines: list[str]) -> Path:
    path = folder / "vocab.txt"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8", newline="")
    return path


# Encoding


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("Hello world", [33155, 40213]),
        ("你好", [10464, 11685]),
        (" 42", [3515]),
        ("\n\n", [261]),
        ("User", [24281]),
        ("System", [40812]),
        ("", []),
    ],
)
def test_world_vocabulary_gives_published_ids(text: str, ids: list[int]) -> None:
    assert world().encode(text) == ids
    assert bulk_world().encode(text) == ids


@given(TEXT)
def test_text_encodes_as_in_rwkv_package(text: str) -> None:
    expected = reference_world().encode(text)
    assert world().encode(text) == expected
    assert bulk_world().encode(text) == expected


@given(st.one_of(st.binary(), GLUED_BYTES))
def test_any_bytes_encode_as_in_rwkv_package(data: bytes) -> None:
    assert world().encode_bytes(data) == reference_world().encodeBytes(data)


@given(st.lists(st.integers(1, 65529), max_size=30))
def test_joined_tokens_encode_as_in_rwkv_package(ids: list[int]) -> None:
    data = b"".join(map(world().token_bytes, ids))
    assert world().encode_bytes(data) == reference_world().encodeBytes(data)


def test_source_code_encodes_as_in_rwkv_package() -> None:
    for path in (Path(__file__), Path(tokenizer_module.__file__)):
        text = path.read_text(encoding="utf-8")
        expected = reference_world().encode(text)
        assert world().encode(text) == bulk_world().encode(text) == expected


def test_every_token_is_its_own_encoding() -> None:
    for token_id, token in reference_world().idx2token.items():
        assert world().encode_bytes(token) == [token_id]
        assert world().token_bytes(token_id) == token


def test_every_token_that_is_text_is_its_own_bulk_encoding() -> None:
    for token_id, token in reference_world().idx2token.items():
        try:
            text = token.decode()
        except UnicodeDecodeError:
            continue
        assert bulk_world().encode(text) == [token_id]


def test_small_vocabulary_encodes_as_in_rwkv_package(shared_dir: Path) -> None:
    path = small_path(shared_dir)
    ours, bulk = Tokenizer.load(path), Tokenizer.load(path, is_bulk=True)
    reference = TRIE_TOKENIZER(str(path))
    assert ours.vocab_size == 2048

    @given(TEXT)
    def check_text(text: str) -> None:
        assert ours.encode(text) == bulk.encode(text) == reference.encode(text)

    @given(st.binary())
    def check_bytes(data: bytes) -> None:
        assert ours.encode_bytes(data) == reference.encodeBytes(data)

    check_text()
    check_bytes()


# Few letters make tokens overlap, nest, skip prefixes and cross whitespace.
PIECE = st.text(alphabet="ab \n\x82", min_size=2, max_size=6).map(lambda s: s.encode("latin-1"))


@given(st.lists(PIECE, max_size=20), st.text(alphabet="ab \n\x82\x83", max_size=60))
def test_any_vocabulary_encodes_by_longest_match(tokens: list[bytes], text: str) -> None:
    table = with_tokens(tokens)
    data = text.encode("latin-1")
    assert Tokenizer(table).encode_bytes(data) == longest_match(table, data)


def test_longest_match_is_found_past_missing_prefixes() -> None:
    table = with_tokens([b"abcde", b"bc"])
    assert Tokenizer(table).encode("abcdabcde") == longest_match(table, b"abcdabcde")
    assert Tokenizer(table).encode("abcde") == [257]


def test_full_memo_does_not_change_ids(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer_module, "_MEMO_NUM_CHUNKS", 2)
    text = Path(__file__).read_text(encoding="utf-8")
    assert Tokenizer.load(WORLD_VOCAB).encode(text) == world().encode(text)


def test_threads_may_share_a_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer_module, "_MEMO_NUM_CHUNKS", 2)
    text = Path(__file__).read_text(encoding="utf-8")
    shared = Tokenizer.load(WORLD_VOCAB)
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(shared.encode, [text] * 8))
    assert all(ids == reference_world().encode(text) for ids in results)


@pytest.mark.parametrize("load", [world, bulk_world])
def test_lone_surrogate_is_refused_with_its_place(load: Callable[[], Tokenizer]) -> None:
    with pytest.raises(ValueError, match=r"lone surrogate, U\+D83D, at character 2"):
        load().encode("ab\ud83dc")
    with pytest.raises(ValueError, match="at character 2"):
        list(load().encode_slices("ab\ud83dc"))


# Slices


@given(st.lists(st.tuples(TEXT, st.integers(1, 400)), max_size=6))
def test_slices_joined_are_the_whole_encoding(parts: list[tuple[str, int]]) -> None:
    text = "".join(part * times for part, times in parts)
    pieces = list(world().encode_slices(text))
    assert list(chain.from_iterable(pieces)) == world().encode(text)
    assert all(pieces)


@pytest.mark.parametrize(
    "unit", ["word ", "你好世界", " ", "。\n", "x", "x" * 5000 + " ", "\n \n  -- ="]
)
def test_no_slice_is_long(unit: str) -> None:
    text = unit * (20_000 // len(unit))
    pieces = list(world().encode_slices(text))
    assert list(chain.from_iterable(pieces)) == reference_world().encode(text)
    longest = max(sum(len(world().token_bytes(i)) for i in piece) for piece in pieces)
    assert longest <= 1024 + 256 + 128


# Decoding


@given(TEXT)
def test_decode_gives_the_text_back(text: str) -> None:
    assert world().decode(world().encode(text)) == text


@given(st.binary())
def test_decode_of_broken_utf8_is_that_of_bytes_decode(data: bytes) -> None:
    assert world().decode(world().encode_bytes(data)) == data.decode("utf-8", "replace")


def test_id_zero_has_no_text() -> None:
    assert world().token_bytes(0) == b""
    assert not world().has_text(0)
    assert world().decode([0, 33155, 0, 40213, 0]) == "Hello world"


@pytest.mark.parametrize("token_id", [65530, 65535, -1])
def test_unknown_id_is_named(token_id: int) -> None:
    with pytest.raises(ValueError, match=f"token id {token_id} is not in the vocabulary"):
        world().decode([33155, token_id])
    assert not world().has_text(token_id)


def test_ids_without_text_are_those_behind_the_vocabulary_and_in_its_gaps() -> None:
    assert world().vocab_size == 65530
    assert world().ids_without_text(65536) == (65530, 65531, 65532, 65533, 65534, 65535)
    assert world().ids_without_text(65530) == ()
    gapped = Tokenizer(BYTE_TABLE | {260: b"ab"})
    assert gapped.ids_without_text(263) == (257, 258, 259, 261, 262)
    assert gapped.has_text(260)


# Files


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
@pytest.mark.parametrize("last", ["", "\n", "\r\n"])
def test_line_ends_do_not_matter(tmp_path: Path, ending: str, last: str) -> None:
    path = tmp_path / "vocab.txt"
    path.write_bytes((ending.join([*BYTE_LINES, "257 'ab' 2"]) + last).encode())
    copy = Tokenizer.load(path)
    assert copy.fingerprint == Tokenizer(BYTE_TABLE | {257: b"ab"}).fingerprint
    assert Tokenizer.load(reference_world_path()).fingerprint == world().fingerprint


def test_fingerprint_tells_tables_apart() -> None:
    tables = [
        BYTE_TABLE,
        BYTE_TABLE | {257: b"ab"},
        BYTE_TABLE | {258: b"ab"},
        BYTE_TABLE | {257: b"abc"},
        BYTE_TABLE | {1: b"\x01", 2: b"\x00"},
    ]
    assert len({Tokenizer(table).fingerprint for table in tables}) == len(tables)
    assert Tokenizer(dict(reversed(BYTE_TABLE.items()))).fingerprint == (
        Tokenizer(BYTE_TABLE).fingerprint
    )


@pytest.mark.parametrize(
    ("literal", "token"),
    [
        ("'a b'", b"a b"),
        ('"it\'s"', b"it's"),
        (r"'it\'s'", b"it's"),
        (r"'\n\n'", b"\n\n"),
        (r"b'\xe4\xbd'", b"\xe4\xbd"),
        ("'你好'", "你好".encode()),
        (r"'\x85'", b"\xc2\x85"),
        ("'\u2028x'", "\u2028x".encode()),
        (r"'\\\\'", b"\\\\"),
    ],
)
def test_literals_mean_what_they_mean_in_python(tmp_path: Path, literal: str, token: bytes) -> None:
    path = write_vocabulary(tmp_path, [*BYTE_LINES, f"257 {literal} {len(token)}"])
    assert Tokenizer.load(path).token_bytes(257) == token


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "expected `ID LITERAL LENGTH`"),
        ("257", "expected `ID LITERAL LENGTH`"),
        ("257 'ab'", "expected `ID LITERAL LENGTH`"),
        ("0 'ab' 2", "expected a positive id"),
        ("-5 'ab' 2", "expected a positive id"),
        ("x 'ab' 2", "expected a positive id"),
        ("1_0 'ab' 2", "expected a positive id"),
        ("97 'ab' 2", "id 97 is already that of b'`'"),
        ("257 'a' 1", "b'a' already has the id 98"),
        ("257 'ab' 3", "has 2 bytes, but"),
        ("257 'é!' 2", "has 3 bytes"),
        ("257 'ab' two", "does not end with"),
        ("257 '' 0", "empty"),
        ("257 ab 2", "not a Python literal"),
        ("257 'ab 2", "not a Python literal"),
        ("257 ' 1", "not a Python literal"),
        (r"257 '\ud800x' 4", "not a Python literal"),
        ("257 [1] 3", "expected a string or bytes literal, found list"),
        ("257 ab() 2", "not a Python literal"),
    ],
)
def test_corrupt_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    path = write_vocabulary(tmp_path, [*BYTE_LINES, line, "300 'zz' 2"])
    with pytest.raises(TokenizerError, match=f"line 257: .*{message}") as raised:
        Tokenizer.load(path)
    assert str(path) in str(raised.value)


def test_line_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    path = tmp_path / "vocab.txt"
    path.write_bytes("\n".join(BYTE_LINES).encode() + b"\n257 '\xff\xfe' 2\n")
    with pytest.raises(TokenizerError, match=r"line 257: .*utf-8"):
        Tokenizer.load(path)


def test_vocabulary_that_cannot_encode_every_byte_is_refused(tmp_path: Path) -> None:
    lines = [line for line in BYTE_LINES if not line.startswith(("1 ", "256 "))]
    path = write_vocabulary(tmp_path, lines)
    with pytest.raises(TokenizerError, match=r"2 of the 256 single bytes .* 0x00 0xff$"):
        Tokenizer.load(path)


@pytest.mark.parametrize("name", ["absent.txt", "."])
def test_unreadable_vocabulary_names_the_key_to_set(tmp_path: Path, name: str) -> None:
    with pytest.raises(TokenizerError, match=r"cannot read the vocabulary .*tokenizer_vocab_path"):
        Tokenizer.load(tmp_path / name)


def test_absent_wheel_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer_module, "find_spec", lambda name: None)
    with pytest.raises(TokenizerError, match="pip install pyrwkv-tokenizer"):
        Tokenizer.load(WORLD_VOCAB)


def test_bulk_without_native_code_encodes_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyrwkv_tokenizer", None)  # importing it fails
    ids = Tokenizer.load(reference_world_path(), is_bulk=True).encode("Hello world")
    assert ids == [33155, 40213]


def test_bulk_takes_the_wheel_for_its_own_table_only(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    class Wheel:
        def encode(self, text: str) -> list[int]:
            return [-1]

    monkeypatch.setattr("pyrwkv_tokenizer.RWKVTokenizer", Wheel)
    assert Tokenizer.load(WORLD_VOCAB, is_bulk=True).encode("Hello") == [-1]
    assert Tokenizer.load(reference_world_path(), is_bulk=True).encode("Hello") == [-1]  # CRLF
    assert Tokenizer.load(WORLD_VOCAB).encode("Hello") == [33155]

    lines = reference_world_path().read_text(encoding="utf-8").splitlines()
    path = write_vocabulary(tmp_path, [line for line in lines if not line.startswith("33155 ")])
    edited = Tokenizer.load(path, is_bulk=True)
    ids = edited.encode("Hello")
    assert 33155 not in ids
    assert edited.decode(ids) == "Hello"


def test_loading_imports_neither_torch_nor_native_code() -> None:
    code = (
        "import sys, engine.output, engine.tokenizer as t;"
        "t.Tokenizer.load(t.WORLD_VOCAB);"
        "print({'torch', 'numpy', 'pyrwkv_tokenizer'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "set()\n", "")
