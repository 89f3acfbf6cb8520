"""Matrix products of the CPU's kernels, for every way of storing weights and every path.

Other paths than this machine's are compiled in processes of their own, which print what they got.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("numba", reason="the fused kernels are numba's")

from numba import njit

from engine.kernels.cpu import features, records
from engine.kernels.cpu.linear import multiply, put, tile_rows
from engine.kernels.cpu.vector import load
from engine.kernels.reference import dequantize
from engine.model.pack import KINDS, MATRIX_NAMES, pack, padded
from engine.model.quantize import quantize
from tests.engine.kernels.fused_cases import SHAPES, weights
from tests.engine.kernels.processors import PATHS, digest_on

KEY_OF_FFN = MATRIX_NAMES.index("ffn.key.weight")
DIMS = SHAPES["32"]  # 96 inputs, 416 outputs: neither a multiple of 64


@njit
def put_rows(kind: Any, rows: Any, x: Any, num_rows: Any, width: Any) -> None:
    for row in range(num_rows):
        for group in range(width // 64):
            i = row * width + 64 * group
            put(
                kind,
                rows[0],
                row,
                group,
                load(x, i),
                load(x, i + 16),
                load(x, i + 32),
                load(x, i + 48),
            )


@njit
def product(kind: Any, matrices: Any, index: Any, rows: Any, num_rows: Any, out: Any) -> None:
    """All blocks; `out` [blocks, rows, 64]."""
    matrix = matrices[index]
    for block in range(matrix.num_blocks):
        row = 0
        while row < num_rows:
            n = tile_rows(kind, num_rows - row)
            at = out + 4 * 64 * (block * num_rows + row)
            multiply(kind, matrix, block, rows[0], row, n, at)
            row += n


class Rows:
    """Rows as the kernels hold them, of float32 [rows, width] with zeros up to a multiple of 64."""

    def __init__(self, kind: int, x: Tensor) -> None:
        count, self.width = x.shape[0], padded(x.shape[1])
        self.x = torch.zeros(count, self.width)
        self.x[:, : x.shape[1]] = x
        dtype = torch.int8 if kind == records.INT8 else torch.float32
        self.values = torch.zeros(count, self.width, dtype=dtype)
        self.scales = torch.zeros(count, self.width // 64)
        self.corrections = torch.zeros(count, self.width // 64, dtype=torch.int32)
        self.record = np.zeros(1, records.ROWS)
        self.record[0] = (
            self.values.data_ptr(),
            self.scales.data_ptr(),
            self.corrections.data_ptr(),
            self.width,
        )
        put_rows(kind, self.record, self.x.data_ptr(), count, self.width)


def multiplied(dtype: str, x: Tensor) -> Tensor:
    """x [rows, 96] times the first matrix into the channel mix: [rows, 416]."""
    packed, rows = pack(weights(DIMS), DIMS, dtype), Rows(KINDS[dtype], x)
    num_blocks = int(packed.matrices[KEY_OF_FFN]["num_blocks"])
    out = torch.full((num_blocks, x.shape[0], 64), torch.nan)
    arguments = (packed.matrices, KEY_OF_FFN, rows.record, x.shape[0], out.data_ptr())
    product(KINDS[dtype], *arguments)
    return out.transpose(0, 1).flatten(1)[:, : DIMS.ffn_dim].clone()


def inputs(num_rows: int) -> Tensor:
    return torch.randn(num_rows, 96, generator=torch.Generator().manual_seed(3))


def wanted(dtype: str, x: Tensor) -> Tensor:
    """In float64; int8 with weights and rows rounded as they are specified to be."""
    weight = weights(DIMS)["blocks.0.ffn.key.weight"]
    if dtype != "int8":
        return x.double() @ weight.double().T
    rows, matrix = (torch.zeros(n, 128) for n in (x.shape[0], weight.shape[0]))
    rows[:, :96], matrix[:, :96] = x, weight
    groups = rows.unflatten(1, (2, 64))
    most = groups.abs().amax(-1, keepdim=True)
    inverse = torch.where(most > 0, 127.0 / most, 0.0)
    rounded = (groups * inverse).round().double() * (most * np.float32(1 / 127)).double()
    return rounded.flatten(1) @ dequantize(*quantize(matrix, "cpu"), torch.float64).T


@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize("num_rows", [1, 2, 3, 4, 5, 6, 7, 8, 13, 50])
def test_products_are_right(dtype: str, num_rows: int) -> None:
    x = inputs(num_rows)
    got, exact = multiplied(dtype, x), wanted(dtype, x)
    assert (got - exact).abs().max() < 3e-6 * exact.abs().max()


@pytest.mark.parametrize("dtype", KINDS)
def test_a_row_is_the_same_wherever_it_lies(dtype: str) -> None:
    x = inputs(13)
    together = multiplied(dtype, x)
    for row in range(13):
        assert torch.equal(multiplied(dtype, x[row : row + 1])[0], together[row]), row


def test_rows_of_int8_keep_what_is_not_finite_and_zeros() -> None:
    x = inputs(4)
    x[0, 3], x[1, 70], x[2] = torch.nan, torch.inf, 0.0
    got = multiplied("int8", x)
    assert not torch.isfinite(got[0]).any()
    assert not torch.isfinite(got[1]).any()
    assert (got[2] == 0).all()
    assert torch.isfinite(got[3]).all()


def digest() -> str:
    """What a process tells of the path it took: the products' bits."""
    parts = [multiplied(dtype, inputs(9)).numpy().tobytes().hex() for dtype in KINDS]
    return "\n".join([features.int8_dot(), *parts])


@pytest.mark.kernels  # it compiles for another processor
@pytest.mark.parametrize("path", PATHS)
def test_every_path_gives_the_same_bits(path: str) -> None:
    found = digest_on(path, __name__)
    assert found[0] == path
    assert found[1:] == digest().splitlines()[1:]
