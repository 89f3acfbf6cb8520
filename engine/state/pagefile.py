"""One page as the bytes of a safetensors file. Knows streams and tensors, no folders or frames.

    8 bytes   length of the header, little endian
    header    JSON: `__metadata__` (str to str); then dtype, shape and place of each tensor
    wkv       [L, H, N, N]  state matrices, row = key
    shift     [L, 2, C]     the last token's activations before time mix and channel mix
    logits    [V]           what the last token gave; not every page has them

Any reader of safetensors opens it. Written here rather than by the safetensors package, whose
metadata come in no fixed order: equal pages must give equal bytes. And read here, because that
package believes a header of 100 MB, and maps the file, which kills the process if it shrinks.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from hashlib import blake2b
from io import BytesIO, FileIO

import msgspec
import torch
from torch import Tensor

from engine.errors import StateMismatch
from engine.state.layout import PageLayout, TensorLayout
from engine.state.page import PageFile

FORMAT, VERSION = "rwkv-state", "1"
MAX_HEADER_BYTES = 1 << 16  # ours have less than 2 KiB
CHECKSUM_BYTES = 16
READ_BYTES = 1 << 20  # at a time, so that a chunk is hashed while it is in the CPU's cache
# So many elements torch computes without further threads, which would wait by spinning and slow
# down the model on a CPU.
SERIAL_ELEMENTS = 1 << 14
_CODES = {"float64": "F64", "float32": "F32", "bfloat16": "BF16", "float16": "F16"}
_PATTERNS = {
    "digest": re.compile("([0-9a-f]{2}){8,64}"),
    "num_tokens": re.compile("[0-9]{1,15}"),
    "checksum": re.compile("[0-9a-f]{32}"),
}
Stream = FileIO | BytesIO
_COPY_AGAIN = "copy or export it again"


class DamagedPage(StateMismatch):
    """Not whole, or not what was written. A StateMismatch that is not this one is foreign."""


class _Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the header says of one tensor."""

    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]  # first byte and the one after the last, behind the header


@dataclass(frozen=True, slots=True)
class PageHeader:
    """A checked header: it fits the format, and the stream is as long as it says."""

    file: PageFile
    metadata: dict[str, str]  # without the checksum
    checksum: str  # of metadata and tensors
    begins: dict[str, int]  # of each tensor the first byte, in the stream


@dataclass(frozen=True, slots=True)
class PageFormat:
    """Pages of one model, tokenizer and layout, to bytes and back.

    Reading raises StateMismatch, which says what was expected, what was found and what to do;
    DamagedPage where the bytes are broken.
    """

    layout: PageLayout
    model_fingerprint: str
    tokenizer_fingerprint: str

    def pieces(self, file: PageFile, tensors: Mapping[str, Tensor]) -> list[bytes | memoryview]:
        """The bytes in order: a header, then views of the tensors, which are not copied.

        `tensors` has wkv, shift and, if `file.has_logits`, logits: contiguous, on the CPU.
        """
        assert 8 <= len(file.digest) <= 64, f"a digest of {len(file.digest)} bytes"
        entries: dict[str, _Entry] = {}
        end = 0
        for name, layout in self._layouts(file.has_logits).items():
            found = tensors[name]
            assert tuple(found.shape) == layout.shape, f"{name} is {tuple(found.shape)}"
            assert found.dtype == getattr(torch, layout.dtype), f"{name} is {found.dtype}"
            begin, end = end, end + layout.num_bytes
            entries[name] = _Entry(_CODES[layout.dtype], layout.shape, (begin, end))
        views = [as_bytes(tensors[name]) for name in entries]
        metadata = self._metadata(file)
        checksum = _begin_checksum(metadata)
        for view in views:
            checksum.update(view)
        metadata["checksum"] = checksum.hexdigest()
        header = msgspec.json.encode({"__metadata__": metadata, **entries})
        header += b" " * (-len(header) % 8)  # tensors begin at whole elements
        return [len(header).to_bytes(8, "little"), header, *views]

    def encode(self, file: PageFile, tensors: Mapping[str, Tensor]) -> bytes:
        return b"".join(self.pieces(file, tensors))

    def decode(self, data: bytes) -> tuple[PageFile, dict[str, Tensor]]:
        return self.load(BytesIO(data))

    def load(self, stream: Stream) -> tuple[PageFile, dict[str, Tensor]]:
        """The page in new tensors: wkv, shift and, if it has them, logits."""
        tensors = {
            name: torch.empty(layout.shape, dtype=getattr(torch, layout.dtype))
            for name, layout in self.layout.tensors.items()
        }
        file = self.read(stream, tensors)
        return file, {name: tensors[name] for name in self._layouts(file.has_logits)}

    def read(self, stream: Stream, tensors: Mapping[str, Tensor]) -> PageFile:
        """Fill `tensors`, which are as for `pieces`, and check everything.

        They hold garbage if it raises.
        """
        header = self.read_header(stream)
        checksum = _begin_checksum(header.metadata)
        names = self._layouts(header.file.has_logits)
        for name in names:
            stream.seek(header.begins[name])
            for part in _fill(stream, as_bytes(tensors[name])):
                checksum.update(part)
        if checksum.hexdigest() != header.checksum:
            raise DamagedPage(
                f"its checksum is {checksum.hexdigest()}, its header says "
                f"{header.checksum}: it was changed; {_COPY_AGAIN}"
            )
        for name in names:
            if not is_finite(tensors[name]):
                raise DamagedPage(f"{name} has values that are not finite; compute it anew")
        return header.file

    def read_header(self, stream: Stream) -> PageHeader:
        """Check all but the content. Reads no more than MAX_HEADER_BYTES."""
        num_bytes = stream.seek(0, 2)
        raw = _read_raw_header(stream, num_bytes)
        metadata, entries = _parse_header(raw)
        self._check_metadata(metadata)
        end = self._check_entries(entries)
        if num_bytes != 8 + len(raw) + end:
            raise DamagedPage(
                f"it has {num_bytes} bytes, its header says {8 + len(raw) + end}: it is truncated "
                f"or something was added; {_COPY_AGAIN}"
            )
        begins = {name: 8 + len(raw) + entry.data_offsets[0] for name, entry in entries.items()}
        digest, num_tokens = bytes.fromhex(metadata["digest"]), int(metadata["num_tokens"])
        file = PageFile(digest, num_tokens, has_logits="logits" in entries)
        return PageHeader(file, metadata, metadata.pop("checksum"), begins)

    def _layouts(self, has_logits: bool) -> dict[str, TensorLayout]:
        layouts = self.layout.tensors
        return {name: layouts[name] for name in layouts if has_logits or name != "logits"}

    def _claims(self) -> dict[str, str]:
        """The metadata that all pages have in common."""
        layout = self.layout
        return {
            "model_fingerprint": self.model_fingerprint,
            "tokenizer_fingerprint": self.tokenizer_fingerprint,
            "num_cells": str(layout.num_cells),
            "num_heads": str(layout.num_heads),
            "head_size": str(layout.head_size),
            "vocab_size": str(layout.vocab_size),
            "wkv_dtype": layout.wkv_dtype,
            "shift_dtype": layout.shift_dtype,
        }

    def _metadata(self, file: PageFile) -> dict[str, str]:
        kind = {"format": FORMAT, "version": VERSION}
        page = {"num_tokens": str(file.num_tokens), "digest": file.digest.hex()}
        return kind | self._claims() | page

    def _check_metadata(self, metadata: dict[str, str]) -> None:
        kind = metadata.get("format", ""), metadata.get("version", "")
        if kind != (FORMAT, VERSION):
            raise StateMismatch(
                f"expected format {FORMAT!r}, version {VERSION!r}, found {kind[0][:40]!r}, version "
                f"{kind[1][:40]!r}; use a state that a server of this version exported"
            )
        wrong = [
            f"{key}: expected {expected!r}, found {metadata.get(key, '')[:40]!r}"
            for key, expected in self._claims().items()
            if metadata.get(key) != expected
        ]
        if wrong:
            raise StateMismatch(
                f"it is a state of another model ({'; '.join(wrong)}); serve the model and "
                "tokenizer, in the dtype and state_dtype, that it was made with, or compute it anew"
            )
        if metadata.keys() != {"format", "version", *self._claims(), *_PATTERNS}:
            keys = sorted(metadata)
            raise DamagedPage(f"its metadata have the keys {str(keys)[:400]}; {_COPY_AGAIN}")
        for key, pattern in _PATTERNS.items():
            if not pattern.fullmatch(metadata[key]):
                raise DamagedPage(
                    f"expected {key} as {pattern.pattern}, found {metadata[key][:140]!r}; "
                    f"{_COPY_AGAIN}"
                )

    def _check_entries(self, entries: dict[str, _Entry]) -> int:
        """Where the last tensor ends. Tensors lie without gaps, in any order."""
        expected = self._layouts("logits" in entries)
        if entries.keys() != expected.keys():
            raise DamagedPage(
                f"expected the tensors {sorted(expected)}, found {str(sorted(entries))[:200]}; "
                f"{_COPY_AGAIN}"
            )
        end = 0
        for name, entry in sorted(entries.items(), key=lambda item: item[1].data_offsets):
            layout = expected[name]
            if (entry.dtype, entry.shape) != (_CODES[layout.dtype], layout.shape):
                raise DamagedPage(
                    f"expected {name} as {_CODES[layout.dtype]} {list(layout.shape)}, found "
                    f"{entry.dtype[:40]!r} {list(entry.shape[:8])}; {_COPY_AGAIN}"
                )
            if entry.data_offsets != (end, end + layout.num_bytes):
                raise DamagedPage(
                    f"expected {name} at bytes {[end, end + layout.num_bytes]}, found "
                    f"{list(entry.data_offsets)}; {_COPY_AGAIN}"
                )
            end += layout.num_bytes
        return end


def as_bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU, not a copy."""
    return tensor.view(-1).view(torch.uint8).numpy().data


def is_finite(tensor: Tensor) -> bool:
    """No NaN and no infinity in it."""
    for part in tensor.view(-1).split(SERIAL_ELEMENTS):
        low, high = part.aminmax()
        if not (math.isfinite(low.item()) and math.isfinite(high.item())):
            return False
    return True


def digest_of(tensors: Mapping[str, Tensor]) -> bytes:
    """16 bytes that name the content: names, types, shapes and values."""
    digest = blake2b(digest_size=16)
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(as_bytes(tensor))
    return digest.digest()


def _begin_checksum(metadata: Mapping[str, str]) -> blake2b:
    """It covers the metadata but itself, and then the tensors in the order wkv, shift, logits."""
    lines = [f"{key}={value}\n" for key, value in sorted(metadata.items())]
    return blake2b("".join(lines).encode(), digest_size=CHECKSUM_BYTES)


def _read_raw_header(stream: Stream, num_bytes: int) -> bytes:
    stream.seek(0)
    size = int.from_bytes(_read_exactly(stream, min(8, num_bytes)), "little")
    if num_bytes < 8 or not 2 <= size <= min(MAX_HEADER_BYTES, num_bytes - 8):
        raise DamagedPage(
            f"it has {num_bytes} bytes and says that its header has {size}, at most "
            f"{MAX_HEADER_BYTES} being expected: it is truncated or no safetensors file; "
            f"{_COPY_AGAIN}"
        )
    return _read_exactly(stream, size)


def _parse_header(raw: bytes) -> tuple[dict[str, str], dict[str, _Entry]]:
    """Metadata, and what it says of each tensor."""
    try:
        parts = msgspec.json.decode(raw, type=dict[str, msgspec.Raw])
        metadata = msgspec.json.decode(parts.pop("__metadata__", b"{}"), type=dict[str, str])
        entries = {name: msgspec.json.decode(part, type=_Entry) for name, part in parts.items()}
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        reason = str(error)[:200]
        raise DamagedPage(f"its header cannot be read ({reason}); {_COPY_AGAIN}") from error
    return metadata, entries


def _read_exactly(stream: Stream, num_bytes: int) -> bytes:
    data = bytearray(num_bytes)
    for _ in _fill(stream, memoryview(data)):
        pass
    return bytes(data)


def _fill(stream: Stream, into: memoryview) -> Iterator[memoryview]:
    """Read until `into` is full, handing out each part of it as it arrives."""
    begin = 0
    while begin < len(into):
        part = into[begin : begin + READ_BYTES]
        num_read = stream.readinto(part)
        if not num_read:
            raise DamagedPage(f"it ended while it was read; {_COPY_AGAIN}")
        yield part[:num_read]
        begin += num_read
