"""Text to token ids and back, by one vocabulary. Knows neither models nor requests.

A vocabulary of the World format (BlinkDL, RWKV-LM) is a UTF-8 file of lines `ID LITERAL LENGTH`:
a positive id, a Python string or bytes literal, and how many bytes that is. The bytes of a
string literal are its UTF-8 form. Id 0 is not in the file: it means end of text, has no bytes
and is never the encoding of anything. Encoding takes the longest token at each place, from left
to right; there are no merges and no special tokens in text.
"""

from __future__ import annotations

import ast
import hashlib
import re
from collections.abc import Callable, Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path

from engine.errors import EngineError

WORLD_VOCAB = "rwkv_vocab_v20230424"  # the name users write for the file in the wheel
END_OF_TEXT = 0

_WHITESPACE = b" \t\r\n"
_SLICE_BYTES = 1024  # well under a millisecond of encoding
_CUT_SEARCH_BYTES = 256
_MEMO_CHUNK_BYTES = 32  # longer chunks rarely come again
_MEMO_NUM_CHUNKS = 32_768  # about 6 MB


class TokenizerError(EngineError, ValueError):
    """A vocabulary file is missing or corrupt; the message says which, where and what to do."""


class Tokenizer:
    """Exact greedy longest-match encoder and its inverse. Safe to share between threads.

    vocab_size: highest id + 1. A model needs at least as many rows in its embedding.
    fingerprint: 16 hex digits that depend on the id-to-bytes table only, not on the file.
    """

    def __init__(
        self, table: dict[int, bytes], encode_world: Callable[[str], list[int]] | None = None
    ) -> None:
        """`table` maps id to bytes and holds all 256 single bytes; see `load` for files.

        `encode_world`, where given, is a faster way to the same ids for every valid text.
        """
        self.vocab_size = max(table) + 1
        self.fingerprint = _fingerprint(table)
        self._bytes = {**table, END_OF_TEXT: b""}
        self._ids = {token: token_id for token_id, token in table.items()}
        self._lengths = _lengths_by_pair(table.values())
        self._cut = _safe_cut(table.values())
        self._memo: dict[bytes, list[int]] = {}
        self._encode_world = encode_world

    @classmethod
    def load(cls, source: str | Path, *, is_bulk: bool = False) -> Tokenizer:
        """From the path of a World-format file, or from the name `WORLD_VOCAB`.

        With `is_bulk`, `encode` of the World vocabulary is done by the Rust code of the wheel:
        several times faster on new text, but it builds for 0.7 s without ever releasing the
        interpreter, so it is for preparing data and not for a process that serves.
        Raises TokenizerError for a missing, unreadable or corrupt file.
        """
        path = _world_vocabulary_path() if str(source) == WORLD_VOCAB else Path(source)
        data = _read(path)
        return cls(_parse(data, path), _world_encoder(data) if is_bulk else None)

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, none added. Raises ValueError for a lone surrogate."""
        data = _utf8(text)
        if self._encode_world is not None:
            return self._encode_world(text)
        return self.encode_bytes(data)

    def encode_bytes(self, data: bytes) -> list[int]:
        """Token ids of any bytes, valid UTF-8 or not."""
        memo = self._memo
        ids: list[int] = []
        for chunk in self._cut.split(data):
            known = memo.get(chunk)
            if known is None:
                known, _ = self._match(chunk, 0, len(chunk))
                if len(chunk) <= _MEMO_CHUNK_BYTES:
                    if len(memo) >= _MEMO_NUM_CHUNKS:
                        memo.clear()
                    memo[chunk] = known
            ids += known
        return ids

    def encode_slices(self, text: str) -> Iterator[list[int]]:
        """`encode(text)` in pieces of about 1 kB of text, so a caller can let others run between.

        The pieces joined are exactly the ids of `encode`. The first step raises ValueError for a
        lone surrogate.
        """
        data = _utf8(text)
        start = 0
        while start < len(data):
            stop = start + _SLICE_BYTES
            cut = self._cut.search(data, stop, stop + _CUT_SEARCH_BYTES)
            if cut is not None or stop >= len(data):
                stop = len(data) if cut is None else cut.start()
                yield self.encode_bytes(data[start:stop])
            else:  # one long chunk: stop at the first token border behind the slice
                ids, stop = self._match(data, start, stop)
                yield ids
            start = stop

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; bytes that are not UTF-8 become U+FFFD, id 0 gives nothing.

        Raises ValueError for an id that is not in the vocabulary.
        """
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", "replace")

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of one token, b"" for id 0. Raises ValueError for an unknown id."""
        try:
            return self._bytes[token_id]
        except KeyError:
            raise ValueError(
                f"token id {token_id} is not in the vocabulary: ids go from 0 to "
                f"{self.vocab_size - 1}, and some of them may be unused"
            ) from None

    def token_id(self, token: bytes) -> int | None:
        """The id of the token with exactly these bytes, None where there is none."""
        return self._ids.get(token)

    def has_text(self, token_id: int) -> bool:
        """False for id 0 and for ids that the vocabulary does not use."""
        return bool(self._bytes.get(token_id))

    def ids_without_text(self, model_vocab_size: int) -> tuple[int, ...]:
        """Ids below `model_vocab_size` that mean nothing, so must never be sampled; 0 does."""
        return tuple(i for i in range(model_vocab_size) if i not in self._bytes)

    def _match(self, data: bytes, start: int, stop: int) -> tuple[list[int], int]:
        """Ids of the longest tokens from `start` until one ends at or behind `stop`, and where."""
        get_lengths, get_id = self._lengths.get, self._ids.get
        ids: list[int] = []
        while start < stop:
            for length in get_lengths(data[start : start + 2], (1,)):
                token = data[start : start + length]
                token_id = get_id(token)
                if token_id is not None:
                    ids.append(token_id)
                    start += len(token)  # less than `length` at the end of the data
                    break
        return ids, start


def _lengths_by_pair(tokens: Iterable[bytes]) -> dict[bytes, tuple[int, ...]]:
    """First two bytes -> lengths of the tokens that begin so, longest first, always ending in 1."""
    lengths: dict[bytes, set[int]] = {}
    for token in tokens:
        if len(token) > 1:
            lengths.setdefault(token[:2], {1}).add(len(token))
    return {pair: tuple(sorted(found, reverse=True)) for pair, found in lengths.items()}


def _safe_cut(tokens: Iterable[bytes]) -> re.Pattern[bytes]:
    """Matches, with zero width, where a text may be cut so that both sides encode independently.

    Where two neighbouring bytes stand side by side in no token, no token can span them. That is
    so for nearly any byte in front of whitespace. The exceptions are read off the vocabulary:
    `glue` is every byte that some token has there (three bytes inside characters, for the World
    vocabulary).
    """
    inner = re.compile(b"[^%b](?=[%b])" % (_WHITESPACE, _WHITESPACE))
    glue = {byte for token in tokens for byte in inner.findall(token)}
    glue_class = b"".join(b"\\x%02x" % ord(byte) for byte in sorted(glue))
    return re.compile(b"(?<=[^%b%b])(?=[%b])" % (_WHITESPACE, glue_class, _WHITESPACE))


def _fingerprint(table: dict[int, bytes]) -> str:
    lines = (b"%d %d %b\n" % (i, len(token), token) for i, token in sorted(table.items()))
    return hashlib.sha256(b"".join(lines)).hexdigest()[:16]


def _utf8(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"text has a lone surrogate, U+{ord(text[error.start]):04X}, at character "
            f"{error.start}: it is half of a character and has no UTF-8 form; remove it"
        ) from None


def _world_vocabulary_path() -> Path:
    """The World vocabulary inside the installed wheel; its native code need not load for that."""
    spec = find_spec("pyrwkv_tokenizer")
    for folder in (spec and spec.submodule_search_locations) or ():
        return Path(folder) / f"{WORLD_VOCAB}.txt"
    raise TokenizerError(
        f"the vocabulary {WORLD_VOCAB!r} comes with the package pyrwkv-tokenizer, which is not "
        "installed: run `pip install pyrwkv-tokenizer`, or set tokenizer_vocab_path to the path "
        "of a vocabulary file"
    )


def _world_encoder(data: bytes) -> Callable[[str], list[int]] | None:
    """The wheel's encoder if it is there and has exactly the vocabulary `data`, else None.

    Only its encoder is of use: its decoder panics on partial characters and unused ids.
    """
    try:
        from pyrwkv_tokenizer import RWKVTokenizer
    except ImportError:  # no native code for this interpreter; the encoder here is exact too
        return None
    if _lines(data) != _lines(_read(_world_vocabulary_path())):
        return None
    encode: Callable[[str], list[int]] = RWKVTokenizer().encode
    return encode


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise TokenizerError(
            f"cannot read the vocabulary {str(path)!r} ({error.strerror}): set "
            f"tokenizer_vocab_path to a World-format file, or to {WORLD_VOCAB!r}"
        ) from error


def _lines(data: bytes) -> list[bytes]:
    """The same for copies with LF, with CRLF and without a final line end."""
    return data.replace(b"\r\n", b"\n").removesuffix(b"\n").split(b"\n")


def _parse(data: bytes, path: Path) -> dict[int, bytes]:
    """id -> bytes. Raises TokenizerError with file and line for whatever could encode wrongly.

    It does not quote the line: somebody who may name a file must not get to see it that way.
    """
    table: dict[int, bytes] = {}
    ids: dict[bytes, int] = {}
    for number, line in enumerate(_lines(data), 1):
        try:
            token_id, token = _parse_line(line.decode())
            if token_id in table:
                raise ValueError(f"id {token_id} is already that of {table[token_id]!r}")
            if token in ids:
                raise ValueError(f"{token!r} already has the id {ids[token]}")
        except ValueError as error:
            raise TokenizerError(f"vocabulary {path}, line {number}: {error}") from error
        table[token_id] = token
        ids[token] = token_id
    missing = [byte for byte in range(256) if bytes([byte]) not in ids]
    if missing:
        names = " ".join(f"0x{byte:02x}" for byte in missing)
        raise TokenizerError(
            f"vocabulary {path}: {len(missing)} of the 256 single bytes have no token, so some "
            f"text could not be encoded; add a line for each of {names}"
        )
    return table


def _parse_line(line: str) -> tuple[int, bytes]:
    id_field, _, rest = line.partition(" ")
    literal, _, length_field = rest.rpartition(" ")
    if not literal:
        raise ValueError("expected `ID LITERAL LENGTH`")
    if not (id_field.isascii() and id_field.isdigit() and int(id_field) > 0):
        raise ValueError("expected a positive id in front (0 is end of text)")
    token = _parse_literal(literal)
    if not token:
        raise ValueError("the literal is empty: a token has at least one byte")
    if length_field != str(len(token)):
        raise ValueError(
            f"the literal has {len(token)} bytes, but the line does not end with that number"
        )
    return int(id_field), token


def _parse_literal(literal: str) -> bytes:
    quote, inner = literal[0], literal[1:-1]
    is_plain = len(literal) > 1 and quote in "'\"" and literal[-1] == quote
    if is_plain and quote not in inner and "\\" not in inner:
        return inner.encode()  # nothing to unescape: most lines, at a twentieth of the time
    try:
        value = ast.literal_eval(literal)
        if isinstance(value, str):
            return value.encode()
        if isinstance(value, bytes):
            return value
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError) as error:
        raise ValueError("what is behind the id is not a Python literal") from error
    raise ValueError(f"expected a string or bytes literal, found {type(value).__name__}")
