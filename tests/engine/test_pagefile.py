"""Page files: read by others, equal for equal pages, refused with a reason when they are off."""

from __future__ import annotations

import json
from dataclasses import replace
from io import BytesIO
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load, save

from engine.errors import StateMismatch
from engine.state.layout import PageLayout
from engine.state.page import PageFile
from engine.state.pagefile import (
    MAX_HEADER_BYTES,
    DamagedPage,
    PageFormat,
    digest_of,
    is_finite,
)
from tests.engine.pages import (
    FORMAT,
    LAYOUT,
    MODEL,
    TOKENIZER,
    are_equal,
    page_file,
    random_tensors,
)

FILE, TENSORS = page_file(1), random_tensors(1)
DATA = FORMAT.encode(FILE, TENSORS)
HEADER_END = 8 + int.from_bytes(DATA[:8], "little")


def with_header(change: dict[str, object], data: bytes = DATA) -> bytes:
    """The same tensors behind a header with other entries; None takes one out."""
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end]) | change
    raw = json.dumps({key: value for key, value in header.items() if value is not None}).encode()
    return len(raw).to_bytes(8, "little") + raw + data[end:]


def metadata_of(data: bytes = DATA) -> dict[str, str]:
    found: dict[str, str] = json.loads(data[8:HEADER_END])["__metadata__"]
    return found


def with_metadata(**change: str) -> bytes:
    return with_header({"__metadata__": metadata_of() | change})


@pytest.mark.parametrize("has_logits", [True, False])
@pytest.mark.parametrize(
    ("wkv", "shift"),
    [
        ("float32", "bfloat16"),
        ("float64", "float64"),
        ("float32", "float16"),
        ("float32", "float32"),
    ],
)
def test_what_is_encoded_is_decoded_bit_by_bit(wkv: str, shift: str, has_logits: bool) -> None:
    layout = replace(LAYOUT, wkv_dtype=wkv, shift_dtype=shift)
    page_format = PageFormat(layout, MODEL, TOKENIZER)
    file, tensors = page_file(5, has_logits=has_logits), random_tensors(5, layout)
    found, decoded = page_format.decode(page_format.encode(file, tensors))
    assert found == file
    assert decoded.keys() == {"wkv", "shift", "logits"} - (set() if has_logits else {"logits"})
    assert are_equal(decoded, tensors)


def test_a_page_of_no_tokens_is_a_page() -> None:
    file = page_file(3, num_tokens=0, has_logits=False)
    assert FORMAT.decode(FORMAT.encode(file, TENSORS))[0] == file


def test_the_safetensors_package_reads_what_we_write(tmp_path: Path) -> None:
    assert are_equal(load(DATA), TENSORS)
    (tmp_path / "page.safetensors").write_bytes(DATA)
    with safe_open(tmp_path / "page.safetensors", "pt") as file:
        assert file.metadata() == {
            "format": "rwkv-state",
            "version": "1",
            "model_fingerprint": MODEL,
            "tokenizer_fingerprint": TOKENIZER,
            "num_cells": "2",
            "num_heads": "3",
            "head_size": "4",
            "vocab_size": "7",
            "wkv_dtype": "float32",
            "shift_dtype": "bfloat16",
            "num_tokens": "32",
            "digest": FILE.digest.hex(),
            "checksum": metadata_of()["checksum"],
        }


def test_what_the_safetensors_package_saves_again_is_read() -> None:
    resaved = save(load(DATA), metadata_of())
    file, tensors = FORMAT.decode(resaved)
    assert file == FILE
    assert are_equal(tensors, TENSORS)


def test_equal_pages_give_equal_bytes() -> None:
    copies = {name: tensor.clone() for name, tensor in TENSORS.items()}
    assert FORMAT.encode(page_file(1), copies) == DATA
    assert FORMAT.encode(page_file(1, num_tokens=33), copies) != DATA


def test_tensors_begin_at_whole_elements() -> None:
    assert HEADER_END % 8 == 0


def test_writing_copies_no_tensor() -> None:
    views = FORMAT.pieces(FILE, TENSORS)[2:]
    pointers = [torch.frombuffer(view, dtype=torch.uint8).data_ptr() for view in views]
    assert pointers == [TENSORS[name].data_ptr() for name in ("wkv", "shift", "logits")]


def test_the_checksum_covers_the_metadata_and_every_tensor() -> None:
    begins = FORMAT.read_header(BytesIO(DATA)).begins
    for name, begin in begins.items():
        damaged = bytearray(DATA)
        damaged[begin + 1] ^= 1
        with pytest.raises(DamagedPage, match="checksum is"):
            FORMAT.decode(bytes(damaged))
        assert name in TENSORS
    with pytest.raises(DamagedPage, match="checksum is"):
        FORMAT.decode(with_metadata(num_tokens="31"))


@given(st.integers(0, len(DATA) - 1), st.integers(0, 7))
def test_no_flipped_bit_goes_unnoticed(index: int, bit: int) -> None:
    damaged = bytearray(DATA)
    damaged[index] ^= 1 << bit
    try:
        file, tensors = FORMAT.decode(bytes(damaged))
    except StateMismatch:
        return
    assert file == FILE  # a header may say the same in other words: "\t" for " "
    assert are_equal(tensors, TENSORS)
    assert index < HEADER_END


@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, HEADER_END - 1, HEADER_END, len(DATA) - 1])
def test_a_truncated_file_is_damaged(size: int) -> None:
    with pytest.raises(DamagedPage, match=rf"it has {size} bytes.*truncated"):
        FORMAT.decode(DATA[:size])


def test_bytes_after_the_last_tensor_are_damage() -> None:
    with pytest.raises(
        DamagedPage, match=f"has {len(DATA) + 1} bytes, its header says {len(DATA)}"
    ):
        FORMAT.decode(DATA + b"\0")


class CountingStream(BytesIO):
    """How many bytes it was asked for."""

    num_asked = 0

    def readinto(self, buffer: bytearray | memoryview, /) -> int:  # type: ignore[override]
        self.num_asked += len(buffer)
        return super().readinto(buffer)


@pytest.mark.parametrize("claim", [MAX_HEADER_BYTES + 1, 100_000_000, 2**63, 2**64 - 1])
def test_a_header_that_claims_to_be_huge_is_not_read(claim: int) -> None:
    stream = CountingStream(claim.to_bytes(8, "little") + bytes(MAX_HEADER_BYTES * 2))
    with pytest.raises(DamagedPage, match=f"says that its header has {claim}"):
        FORMAT.read_header(stream)
    assert stream.num_asked == 8


def test_a_file_that_shrinks_while_it_is_read_is_damaged() -> None:
    class Shrinking(BytesIO):
        def readinto(self, buffer: bytearray | memoryview, /) -> int:  # type: ignore[override]
            return 0 if self.tell() >= HEADER_END else super().readinto(buffer)

    with pytest.raises(DamagedPage, match="ended while it was read"):
        FORMAT.load(Shrinking(DATA))


@pytest.mark.parametrize(
    "raw",
    [
        b"{ ",
        b"[]",
        b"{}}",
        b'{"a":1}',
        b'{"__metadata__":{"a":1}}',
        b"[" * 60_000,
        b'{"a":' * 10_000,
        b"\xff\xfe{}",
        b'{"wkv":{}}',
    ],
)
def test_a_header_that_is_no_header_is_damage(raw: bytes) -> None:
    with pytest.raises(DamagedPage, match="header cannot be read"):
        FORMAT.decode(len(raw).to_bytes(8, "little") + raw + bytes(100))


def test_other_safetensors_are_foreign() -> None:
    for metadata in (None, {"format": "pt"}):
        with pytest.raises(StateMismatch, match="expected format 'rwkv-state'") as info:
            FORMAT.decode(save({"wkv": TENSORS["wkv"]}, metadata))
        assert not isinstance(info.value, DamagedPage)


def test_another_version_is_foreign() -> None:
    with pytest.raises(StateMismatch, match="version '1', found 'rwkv-state', version '2'") as info:
        FORMAT.decode(with_metadata(version="2"))
    assert not isinstance(info.value, DamagedPage)


OTHERS = [
    (replace(LAYOUT, num_cells=3), MODEL, TOKENIZER, "num_cells: expected '3', found '2'"),
    (replace(LAYOUT, num_heads=2), MODEL, TOKENIZER, "num_heads: expected '2', found '3'"),
    (replace(LAYOUT, head_size=8), MODEL, TOKENIZER, "head_size: expected '8', found '4'"),
    (replace(LAYOUT, vocab_size=9), MODEL, TOKENIZER, "vocab_size: expected '9', found '7'"),
    (replace(LAYOUT, wkv_dtype="float64"), MODEL, TOKENIZER, "wkv_dtype: expected 'float64'"),
    (replace(LAYOUT, shift_dtype="float16"), MODEL, TOKENIZER, "found 'bfloat16'"),
    (LAYOUT, "other", TOKENIZER, f"model_fingerprint: expected 'other', found '{MODEL}'"),
    (LAYOUT, MODEL, "other", f"tokenizer_fingerprint: expected 'other', found '{TOKENIZER}'"),
]


@pytest.mark.parametrize(("layout", "model", "tokenizer", "reason"), OTHERS)
def test_a_state_of_another_model_is_refused_with_what_differs(
    layout: PageLayout, model: str, tokenizer: str, reason: str
) -> None:
    with pytest.raises(StateMismatch, match="serve the model") as info:
        PageFormat(layout, model, tokenizer).decode(DATA)
    assert reason in str(info.value)
    assert not isinstance(info.value, DamagedPage)


WKV = json.loads(DATA[8:HEADER_END])["wkv"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"shift": None}, "expected the tensors"),
        ({"more": WKV}, r"found \['logits', 'more', 'shift', 'wkv'\]"),
        ({"wkv": WKV | {"shape": [2, 4, 3, 4]}}, r"wkv as F32 \[2, 3, 4, 4\], found 'F32' \[2, 4"),
        ({"wkv": WKV | {"dtype": "I32"}}, "found 'I32'"),
        ({"wkv": WKV | {"data_offsets": [8, 392]}}, r"wkv at bytes \[0, 384\], found \[8,"),
        ({"wkv": WKV | {"data_offsets": [0, 2**60]}}, "expected wkv at"),
        ({"wkv": WKV | {"data_offsets": [-384, 0]}}, "expected wkv at"),
    ],
)  # fmt: skip
def test_a_header_that_contradicts_itself_is_damage(change: dict[str, object], reason: str) -> None:
    with pytest.raises(DamagedPage, match=reason):
        FORMAT.decode(with_header(change))


@pytest.mark.parametrize(
    "change", [{"digest": "xy"}, {"digest": "AB" * 16}, {"num_tokens": "-1"}, {"num_tokens": "1e3"},
               {"num_tokens": "9" * 5000}, {"checksum": ""}]
)  # fmt: skip
def test_metadata_that_mean_nothing_are_damage(change: dict[str, str]) -> None:
    with pytest.raises(DamagedPage, match=f"expected {next(iter(change))} as"):
        FORMAT.decode(with_metadata(**change))


def test_metadata_that_are_more_or_less_are_damage() -> None:
    for change in ({"label": "mine"}, {"\ud800": "\ud800"}):
        with pytest.raises(DamagedPage, match=r"its metadata have the keys|cannot be read"):
            FORMAT.decode(with_metadata(**change))
    for key in ("digest", "num_tokens", "checksum"):
        fewer = {name: value for name, value in metadata_of().items() if name != key}
        with pytest.raises(DamagedPage, match="its metadata have the keys"):
            FORMAT.decode(with_header({"__metadata__": fewer}))


@pytest.mark.parametrize("name", ["wkv", "shift", "logits"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_values_that_are_not_finite_are_refused(name: str, value: float) -> None:
    tensors = random_tensors(1)
    tensors[name].view(-1)[-1] = value
    with pytest.raises(DamagedPage, match=f"{name} has values that are not finite"):
        FORMAT.decode(FORMAT.encode(FILE, tensors))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_finiteness_is_seen_in_tensors_of_many_parts(dtype: torch.dtype) -> None:
    tensor = torch.ones(100_001, dtype=dtype)
    tensor[::2] = torch.finfo(dtype).max
    assert is_finite(tensor)
    for index in (0, 50_000, 100_000):
        broken = tensor.clone()
        broken[index] = torch.nan
        assert not is_finite(broken)


def test_a_message_holds_little_of_what_it_was_given() -> None:
    for data in (
        with_metadata(format="x" * 10_000),
        with_metadata(model_fingerprint="x" * 10_000),
        with_metadata(digest="x" * 10_000),
        with_metadata(**{"x\n" * 10_000: ""}),
        with_header({"x\n" * 10_000: WKV}),
        with_header({"wkv": WKV | {"dtype": "x\n" * 10_000}}),
        with_header({"wkv": WKV | {"shape": [1] * 10_000}}),
        with_header({"wkv": WKV | {"x" * 10_000: 1}}),
    ):
        with pytest.raises(StateMismatch) as info:
            FORMAT.decode(data)
        assert len(str(info.value)) < 800
        assert "\n" not in str(info.value)


def test_reading_does_not_need_to_know_what_logits_hold() -> None:
    file = PageFile(FILE.digest, 32, has_logits=False)
    into = random_tensors(9)
    logits = into["logits"].clone()
    assert FORMAT.read(BytesIO(FORMAT.encode(file, TENSORS)), into) == file
    assert torch.equal(into["wkv"], TENSORS["wkv"])
    assert torch.equal(into["logits"], logits)


def test_a_content_digest_depends_on_names_types_shapes_and_values() -> None:
    wkv, shift = TENSORS["wkv"], TENSORS["shift"]
    digests = [
        digest_of({"wkv": wkv, "shift": shift}),
        digest_of({"wkv": wkv}),
        digest_of({"x": wkv}),
        digest_of({"wkv": wkv.view(3, 2, 4, 4)}),
        digest_of({"wkv": wkv.view(torch.int32)}),
        digest_of({"wkv": wkv * 2}),
    ]
    assert {len(digest) for digest in digests} == {16}
    assert all(a != b for a, b in pairwise(sorted(digests)))
    assert digest_of({"shift": shift, "wkv": wkv}) == digests[0]
