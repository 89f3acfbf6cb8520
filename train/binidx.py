"""Token files in the binidx format (NAME.bin, NAME.idx): reading and writing.

The format is Megatron's MMapIndexedDataset, version 1, as RWKV-LM reads it. Knows bytes and
token ids, not text.

NAME.bin: the tokens of all documents, little-endian uint16, each document ended by token 0.
NAME.idx: magic, version u64 = 1, dtype code u8, item count n u64, document count + 1 = m u64,
then item lengths i32[n], byte offsets i64[n] and document borders i64[m].
"""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
VERSION = 1
UINT16_CODE = 8
DTYPE_NAMES = {
    1: "uint8",
    2: "int8",
    3: "int16",
    4: "int32",
    5: "int64",
    6: "float64",
    7: "float64",
}
TOKEN_DTYPE = np.dtype("<u2")
MAX_TOKEN_ID = 65_535
END_OF_TEXT = 0

Tokens = NDArray[np.uint16]


class DatasetError(ValueError):
    """A dataset is missing, truncated, or of a kind that is not supported."""


@dataclass(frozen=True, slots=True)
class Dataset:
    """An open dataset. `tokens` [num_tokens] uint16 is memory-mapped, documents in order."""

    prefix: Path
    tokens: Tokens
    lengths: NDArray[np.int32]  # tokens of each document, its final 0 included
    fingerprint: str  # of the index and of the number of tokens

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    @property
    def num_documents(self) -> int:
        return len(self.lengths)

    def documents(self) -> Iterable[Tokens]:
        start = 0
        for length in self.lengths.tolist():
            yield self.tokens[start : start + length]
            start += length


def paths(prefix: Path) -> tuple[Path, Path]:
    """The two files of a dataset; `prefix` may hold dots."""
    return prefix.with_name(prefix.name + ".bin"), prefix.with_name(prefix.name + ".idx")


def open_dataset(prefix: Path) -> Dataset:
    """Check both files against each other and map the tokens.

    Raises DatasetError naming the file, what was found and what was expected.
    """
    bin_path, idx_path = paths(prefix)
    for path in (bin_path, idx_path):
        if not path.is_file():
            raise DatasetError(
                f"{path}: no such file; make a dataset with "
                f"`python -m train.data from-text {prefix} TEXT...` (or from-jsonl)"
            )
    index = idx_path.read_bytes()
    lengths = _parse_index(index, idx_path)
    num_tokens = int(lengths.sum(dtype=np.int64))
    found = bin_path.stat().st_size
    if found != num_tokens * TOKEN_DTYPE.itemsize:
        raise DatasetError(
            f"{bin_path}: {found} bytes, but {idx_path.name} describes {num_tokens} tokens = "
            f"{num_tokens * TOKEN_DTYPE.itemsize} bytes; one of the two is truncated or of "
            "another dataset"
        )
    if num_tokens == 0:
        raise DatasetError(f"{bin_path}: holds no tokens")
    digest = hashlib.sha256(index)
    digest.update(num_tokens.to_bytes(8, "little"))
    tokens = np.memmap(bin_path, dtype=TOKEN_DTYPE, mode="r")
    return Dataset(prefix, tokens, lengths, digest.hexdigest())


def _parse_index(index: bytes, path: Path) -> NDArray[np.int32]:
    if len(index) < HEADER.size or not index.startswith(MAGIC):
        raise DatasetError(
            f"{path}: {len(index)} bytes beginning with {index[:9]!r}; a binidx index begins with "
            f"{MAGIC!r} and has at least {HEADER.size} bytes"
        )
    _, version, dtype_code, num_items, num_borders = HEADER.unpack_from(index)
    if version != VERSION:
        raise DatasetError(f"{path}: version {version}; only version {VERSION} is known")
    if dtype_code != UINT16_CODE:
        raise DatasetError(
            f"{path}: tokens of {DTYPE_NAMES.get(dtype_code, 'an unknown type')} (dtype code "
            f"{dtype_code}); only uint16 (code {UINT16_CODE}) is supported: make the dataset again"
        )
    expected = HEADER.size + 12 * num_items + 8 * num_borders
    if len(index) != expected:
        raise DatasetError(
            f"{path}: {len(index)} bytes, but its header describes {num_items} items and "
            f"{num_borders} borders = {expected} bytes; the file is truncated or damaged"
        )
    lengths = np.frombuffer(index, "<i4", num_items, HEADER.size)
    offsets = np.frombuffer(index, "<i8", num_items, HEADER.size + 4 * num_items)
    borders = np.frombuffer(index, "<i8", num_borders, HEADER.size + 12 * num_items)
    ends = lengths.cumsum(dtype=np.int64) * TOKEN_DTYPE.itemsize
    if (lengths < 0).any() or not np.array_equal(offsets, ends - lengths.astype(np.int64) * 2):
        raise DatasetError(f"{path}: offsets do not follow from the lengths; the file is damaged")
    if num_borders == 0 or borders[0] != 0 or borders[-1] != num_items:
        raise DatasetError(f"{path}: document borders do not span {num_items} items")
    return lengths


class DatasetWriter:
    """Writes a dataset document by document; nothing appears under its name until it is whole.

    A context manager: leaving it normally publishes both files, an exception removes them.
    """

    def __init__(self, prefix: Path) -> None:
        self._bin_path, self._idx_path = paths(prefix)
        self._tmp_bin = self._bin_path.with_name(self._bin_path.name + ".tmp")
        self._tmp_idx = self._idx_path.with_name(self._idx_path.name + ".tmp")
        self._lengths: list[int] = []

    def __enter__(self) -> Self:
        self._bin_path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._tmp_bin.open("wb")
        return self

    def add(self, token_ids: Iterable[int]) -> None:
        """One document; token 0 is put at its end if it is not there."""
        ids = np.asarray([*token_ids], dtype=np.int64)
        if len(ids) == 0 or ids[-1] != END_OF_TEXT:
            ids = np.append(ids, END_OF_TEXT)
        if ids.min() < 0 or ids.max() > MAX_TOKEN_ID:
            raise DatasetError(f"token ids {ids.min()}..{ids.max()} do not fit uint16")
        self._file.write(ids.astype(TOKEN_DTYPE).tobytes())
        self._lengths.append(len(ids))

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is None:
            self._publish()
        self._file.close()
        for path in (self._tmp_bin, self._tmp_idx):
            path.unlink(missing_ok=True)

    def _publish(self) -> None:
        n = len(self._lengths)
        lengths = np.array(self._lengths, dtype="<i4")
        ends = lengths.cumsum(dtype=np.int64) * TOKEN_DTYPE.itemsize
        with self._tmp_idx.open("wb") as file:
            file.write(HEADER.pack(MAGIC, VERSION, UINT16_CODE, n, n + 1))
            file.write(lengths.tobytes())
            file.write(
                (ends - lengths.astype(np.int64) * TOKEN_DTYPE.itemsize).astype("<i8").tobytes()
            )
            file.write(np.arange(n + 1, dtype="<i8").tobytes())
            file.flush()
            os.fsync(file.fileno())
        self._file.flush()
        os.fsync(self._file.fileno())
        self._tmp_bin.replace(self._bin_path)
        self._tmp_idx.replace(self._idx_path)
