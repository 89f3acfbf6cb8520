"""The binidx format, against literal bytes and damaged files."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.train.runs import write_dataset
from train.binidx import DatasetError, open_dataset


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    write_dataset(tmp_path / "toy", [[5, 6, 7], [300, 65_535]])
    return tmp_path / "toy"


def test_files_hold_the_documented_bytes(toy: Path) -> None:
    assert toy.with_name("toy.bin").read_bytes() == struct.pack("<7H", 5, 6, 7, 0, 300, 65_535, 0)
    assert toy.with_name("toy.idx").read_bytes() == (
        b"MMIDIDX\x00\x00"
        + (1).to_bytes(8, "little")
        + b"\x08"
        + (2).to_bytes(8, "little")
        + (3).to_bytes(8, "little")
        + struct.pack("<2i", 4, 3)
        + struct.pack("<2q", 0, 8)
        + struct.pack("<3q", 0, 1, 2)
    )


def test_index_size_follows_the_published_formula(toy: Path) -> None:
    assert toy.with_name("toy.idx").stat().st_size == 34 + 12 * 2 + 8 * 3


@given(st.lists(st.lists(st.integers(1, 65_535), max_size=9), min_size=1, max_size=9))
def test_what_is_written_is_read(
    tmp_path_factory: pytest.TempPathFactory, texts: list[list[int]]
) -> None:
    prefix = tmp_path_factory.mktemp("round") / "a.b"
    write_dataset(prefix, texts)
    dataset = open_dataset(prefix)
    assert [x.tolist() for x in dataset.documents()] == [[*x, 0] for x in texts]
    assert dataset.num_tokens == sum(len(x) + 1 for x in texts)
    assert dataset.num_documents == len(texts)


def test_a_final_zero_is_not_doubled(tmp_path: Path) -> None:
    write_dataset(tmp_path / "a", [[1, 0]])
    assert open_dataset(tmp_path / "a").tokens.tolist() == [1, 0]


@pytest.mark.parametrize("ids", [[65_536], [-1]])
def test_ids_beyond_uint16_are_refused_and_leave_no_files(tmp_path: Path, ids: list[int]) -> None:
    with pytest.raises(DatasetError, match="uint16"):
        write_dataset(tmp_path / "a", [[1], ids])
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_writer_leaves_the_older_dataset(toy: Path) -> None:
    before = open_dataset(toy).fingerprint
    with pytest.raises(ZeroDivisionError):
        write_dataset(toy, ([1 // n] for n in (1, 0)))
    assert open_dataset(toy).fingerprint == before
    assert sorted(x.name for x in toy.parent.iterdir()) == ["toy.bin", "toy.idx"]


def _poke(path: Path, offset: int, data: bytes) -> None:
    content = bytearray(path.read_bytes())
    content[offset : offset + len(data)] = data
    path.write_bytes(bytes(content))


@pytest.mark.parametrize(
    ("offset", "data", "message"),
    [
        (0, b"XX", "begins with"),
        (9, b"\x02", "version 2"),
        (17, b"\x04", "int32"),
        (17, b"\x63", "unknown type"),
        (18, b"\x09", "9 items"),
        (26, b"\x07", "7 borders"),
        (34, b"\x05", "offsets"),
        (42, b"\x02", "offsets"),
        (58, b"\x01", "borders"),
        (74, b"\x09", "borders"),
    ],
)
def test_a_damaged_index_is_refused_by_name(
    toy: Path, offset: int, data: bytes, message: str
) -> None:
    index = toy.with_name("toy.idx")
    _poke(index, offset, data)
    with pytest.raises(DatasetError, match=message) as caught:
        open_dataset(toy)
    assert str(index) in str(caught.value)


@pytest.mark.parametrize("size", [0, 5, 33, 34, 81])
def test_a_truncated_index_is_refused(toy: Path, size: int) -> None:
    index = toy.with_name("toy.idx")
    index.write_bytes(index.read_bytes()[:size])
    with pytest.raises(DatasetError, match=f"{size} bytes"):
        open_dataset(toy)


@pytest.mark.parametrize("size", [0, 12, 13, 16])
def test_tokens_of_another_size_are_refused_with_both_sizes(toy: Path, size: int) -> None:
    toy.with_name("toy.bin").write_bytes(bytes(size))
    with pytest.raises(DatasetError, match=f"{size} bytes.*14 bytes"):
        open_dataset(toy)


@pytest.mark.parametrize("name", ["toy.bin", "toy.idx"])
def test_a_missing_file_is_named_with_the_command_that_makes_it(toy: Path, name: str) -> None:
    toy.with_name(name).unlink()
    with pytest.raises(DatasetError, match=rf"{name}: no such file.*python -m train\.data"):
        open_dataset(toy)


def test_an_empty_dataset_is_refused(tmp_path: Path) -> None:
    write_dataset(tmp_path / "none", [])
    with pytest.raises(DatasetError, match="no tokens"):
        open_dataset(tmp_path / "none")


def test_fingerprint_changes_with_the_lengths(tmp_path: Path) -> None:
    write_dataset(tmp_path / "a", [[1, 2], [3]])
    write_dataset(tmp_path / "b", [[1], [2, 3]])
    a, b = open_dataset(tmp_path / "a"), open_dataset(tmp_path / "b")
    assert a.num_tokens == b.num_tokens
    assert a.fingerprint != b.fingerprint
    assert a.tokens.dtype == np.uint16
