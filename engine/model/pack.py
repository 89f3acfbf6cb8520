"""Weights in the order in which the kernels read them: one piece of memory for a whole model.

Matrices go into blocks of 64 outputs (engine/kernels/cpu/tiles.py), a few rows at a time, by
several threads; vectors into float32. Sizes that are no multiple of 64 are padded with zeros.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.kernels.cpu.blocks import largest_of_groups, round_groups, turn, turn_pairs
from engine.kernels.cpu.records import BFLOAT16, FLOAT32, INT8, LAYER, MATRIX, MODEL
from engine.model.mapped import FilePages
from engine.model.quantize import scales_of
from engine.model.rwkv7 import ModelDims

KINDS = {"float32": FLOAT32, "bfloat16": BFLOAT16, "int8": INT8}
MATRIX_NAMES = (  # as `records` numbers them; those of ranks lie the other way round in the file
    *("att.receptance.weight", "att.key.weight", "att.value.weight"),
    *("att.w1", "att.a1", "att.g1", "att.v1", "att.w2", "att.a2", "att.g2", "att.v2"),
    *("att.output.weight", "ffn.key.weight", "ffn.value.weight"),
)
MUS = ("x_r", "x_w", "x_k", "x_v", "x_a", "x_g")
VECTOR_NAMES = {
    **{f"{ln}_{part}": f"{ln}.{part}" for ln in ("ln1", "ln2") for part in ("weight", "bias")},
    "ffn_mu": "ffn.x_k",
    **{name: f"att.{name}" for name in ("w0", "a0", "v0", "k_k", "k_a", "r_k")},
    "ln_x_weight": "att.ln_x.weight",
    "ln_x_bias": "att.ln_x.bias",
}
ALIGNMENT = 64
ROWS_AT_ONCE = 512  # of a matrix: what one thread does before it reports
ELEMENTS_AT_ONCE = 1 << 18  # of int8: in float32 they stay in a usual second-level cache


def padded(size: int) -> int:
    """The next multiple of 64."""
    return -(-size // 64) * 64


@dataclass(frozen=True, slots=True)
class PackedWeights:
    """`memory` holds everything that the records point to."""

    model: np.ndarray[Any, Any]
    layers: np.ndarray[Any, Any]
    matrices: np.ndarray[Any, Any]
    memory: mmap.mmap
    num_bytes: int
    num_parameters: int


class _Arena:
    """Memory handed out in order. The first time round it only counts."""

    def __init__(self) -> None:
        self.size = 0
        self.memory: mmap.mmap | None = None
        self._address = 0

    def allocate(self) -> None:
        # Private: memory that could be shared would not lie in huge pages.
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        self.memory = mmap.mmap(-1, max(self.size, 1), flags=flags)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            self.memory.madvise(mmap.MADV_HUGEPAGE)
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        self.size = 0

    def take(self, num_bytes: int) -> int:
        """Address; nonsense as long as it only counts."""
        address = self._address + self.size
        self.size += -(-num_bytes // ALIGNMENT) * ALIGNMENT
        return address

    def view(self, address: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        assert self.memory is not None, "counting only"
        count = int(np.prod(shape))
        flat = torch.frombuffer(
            self.memory, dtype=dtype, count=count, offset=address - self._address
        )
        return flat.view(shape)


def pack(
    tensors: Mapping[str, Tensor],
    dims: ModelDims,
    dtype: str,
    num_threads: int = 1,
    on_progress: Callable[[int], None] | None = None,
) -> PackedWeights:
    """Of a checkpoint, which may be memory-mapped and is not needed afterwards.

    `dtype` is "float32", "bfloat16" or "int8". `on_progress` hears, in this thread, how many bytes
    of the checkpoint have been packed since it was last called. Raises ValueError, with the name of
    the tensor, for a matrix that int8 cannot express.

    A mapped file may be replaced by renaming meanwhile. One that is cut off under the mapping ends
    the process (SIGBUS): the system has no other way to say that the data are gone.
    """
    packer = _Packer(tensors, dims, KINDS[dtype])
    for _ in packer.tasks():
        pass
    packer.arena.allocate()
    tasks = list(packer.tasks())
    with ThreadPoolExecutor(num_threads) as pool:
        for num_bytes in pool.map(lambda task: task(), tasks):
            if on_progress is not None:
                on_progress(num_bytes)
    return packer.result()


class _Packer:
    def __init__(self, tensors: Mapping[str, Tensor], dims: ModelDims, kind: int) -> None:
        self.arena = _Arena()
        self._tensors, self._dims, self._kind = tensors, dims, kind
        self._pages = FilePages()
        self._model = np.zeros(1, MODEL)
        self._layers = np.zeros(dims.num_cells, LAYER)
        self._matrices = np.zeros(dims.num_cells * len(MATRIX_NAMES) + 1, MATRIX)

    def result(self) -> PackedWeights:
        dims, model = self._dims, self._model[0]
        model["kind"], model["num_layers"] = self._kind, dims.num_cells
        model["channels"], model["padded"] = dims.embedded_dim, padded(dims.embedded_dim)
        model["num_heads"], model["head_size"] = dims.num_heads, dims.head_size
        model["vocab_size"] = dims.vocab_size
        assert self.arena.memory is not None
        return PackedWeights(
            model=self._model,
            layers=self._layers,
            matrices=self._matrices,
            memory=self.arena.memory,
            num_bytes=self.arena.size,
            num_parameters=sum(tensor.numel() for tensor in self._tensors.values()),
        )

    def tasks(self) -> Iterator[Callable[[], int]]:
        """Lay everything out; what fills each place, and returns the bytes it has read."""
        model = self._model[0]
        for name in ("ln0_weight", "ln0_bias"):
            tensor = self._tensors["blocks.0." + name.replace("_", ".")]
            yield from self._vector(model, name, tensor)
        for name in ("ln_out_weight", "ln_out_bias"):
            yield from self._vector(model, name, self._tensors[name.replace("out_", "out.")])
        yield from self._embedding(self._tensors["emb.weight"])
        for index in range(self._dims.num_cells):
            prefix = f"blocks.{index}."
            for name, source in VECTOR_NAMES.items():
                if index > 0 or name != "v0":
                    yield from self._vector(
                        self._layers[index], name, self._tensors[prefix + source]
                    )
            mus = [self._tensors[f"{prefix}att.{name}"] for name in MUS]
            yield from self._vector(self._layers[index], "mus", *mus)
            for place, name in enumerate(MATRIX_NAMES):
                if index > 0 or name not in ("att.v1", "att.v2"):
                    tensor = self._tensors[prefix + name]
                    record = self._matrices[index * len(MATRIX_NAMES) + place]
                    yield from self._matrix(
                        record, prefix + name, tensor if name.endswith("weight") else tensor.T
                    )
        yield from self._matrix(self._matrices[-1], "head.weight", self._tensors["head.weight"])

    def _vector(self, record: Any, name: str, *parts: Tensor) -> Iterator[Callable[[], int]]:
        width = padded(self._dims.embedded_dim)
        address = record[name] = self.arena.take(4 * width * len(parts))

        def fill() -> int:
            rows = self.arena.view(address, (len(parts), width), torch.float32)
            for row, part in zip(rows, parts, strict=True):
                row[: part.numel()] = part.flatten()
            return sum(self._release(part) for part in parts)

        yield fill

    def _embedding(self, tensor: Tensor) -> Iterator[Callable[[], int]]:
        dtype = torch.float32 if self._kind == FLOAT32 else torch.bfloat16
        shape = (tensor.shape[0], padded(tensor.shape[1]))
        address = self._model[0]["emb"] = self.arena.take(dtype.itemsize * shape[0] * shape[1])

        def fill(first: int) -> int:
            part = tensor[first : first + ROWS_AT_ONCE]
            at = address + first * shape[1] * dtype.itemsize
            self.arena.view(at, (part.shape[0], shape[1]), dtype)[:, : part.shape[1]] = part
            return self._release(part)

        yield from (partial(fill, first) for first in range(0, shape[0], ROWS_AT_ONCE))

    def _matrix(self, record: Any, name: str, weight_OI: Tensor) -> Iterator[Callable[[], int]]:
        num_outputs, num_inputs = weight_OI.shape
        width, num_blocks = padded(num_inputs), padded(num_outputs) // 64
        item_bytes = {FLOAT32: 4, BFLOAT16: 2, INT8: 1}[self._kind]
        address = self.arena.take(num_blocks * 64 * width * item_bytes)
        scales_address = self.arena.take(num_blocks * width * 4) if self._kind == INT8 else 0
        record["weights"], record["scales"] = address, scales_address
        record["num_inputs"], record["num_outputs"] = width, num_outputs
        record["num_blocks"] = num_blocks
        pack_blocks = {FLOAT32: _float32, BFLOAT16: _bfloat16, INT8: _int8}[self._kind]

        def fill(first_block: int) -> int:
            first = 64 * first_block
            part = weight_OI[first : first + ROWS_AT_ONCE]
            at = address + first * width * item_bytes
            try:
                pack_blocks(self.arena, at, scales_address + first // 64 * width * 4, part)
            except ValueError as error:
                raise ValueError(f"{name} {error}") from None
            return self._release(part)

        step = ROWS_AT_ONCE // 64
        yield from (partial(fill, first) for first in range(0, num_blocks, step))

    def _release(self, part: Tensor) -> int:
        """Let go of what has been read of a file; the size of the part in bytes."""
        if part.is_contiguous():
            self._pages.release(part)
        elif part.T.is_contiguous():
            self._pages.release(part.T)
        return part.nbytes


def _blocks(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """[blocks, 64, padded width], contiguous and in `dtype`: the rows themselves if they can be."""
    num_rows, num_inputs = rows.shape
    shape = (padded(num_rows), padded(num_inputs))
    if shape == rows.shape:
        found = rows.to(dtype).contiguous()
    else:
        found = torch.zeros(shape, dtype=dtype)
        found[:num_rows, :num_inputs] = rows
    return found.view(-1, 64, shape[1])


def _float32(arena: _Arena, address: int, _: int, rows: Tensor) -> None:
    """[k][64]"""
    blocks = _blocks(rows, torch.float32)
    place = arena.view(address, (len(blocks), blocks.shape[2], 64), torch.float32)
    turn(_words(blocks), _words(place), np.uint32(0))


def _bfloat16(arena: _Arena, address: int, _: int, rows: Tensor) -> None:
    """[k][2][16][2]: output j of 32 beside output j + 16"""
    blocks = _blocks(rows, torch.bfloat16)
    place = arena.view(address, (len(blocks), blocks.shape[2], 32), torch.int32)
    turn_pairs(blocks.view(torch.uint16).numpy(), _words(place))


def _int8(arena: _Arena, address: int, scales_address: int, rows: Tensor) -> None:
    """[k / 4][64][4] as byte + 128, and scales [k / 64][64]"""
    width = padded(rows.shape[1])
    step = max(64, ELEMENTS_AT_ONCE // width // 64 * 64)
    for first in range(0, rows.shape[0], step):
        groups = _blocks(rows[first : first + step], torch.float32).view(-1, 64)
        num_blocks = groups.numel() // width // 64
        largest = torch.empty(len(groups))
        largest_of_groups(groups.data_ptr(), len(groups), largest.data_ptr())
        scale = scales_of(largest).float()
        packed = torch.empty(num_blocks, 64, width, dtype=torch.int8)
        round_groups(groups.data_ptr(), scale.data_ptr(), len(groups), packed.data_ptr())
        place = arena.view(address + first * width, (num_blocks, width // 4, 64), torch.int32)
        # In two's complement, byte + 128 is the byte with its highest bit the other way.
        turn(_words(packed), _words(place), np.uint32(0x80808080))
        at = scales_address + first // 64 * width * 4
        scales = arena.view(at, (num_blocks, width // 64, 64), torch.float32)
        scales.copy_(scale.view(num_blocks, 64, -1).transpose(1, 2))


def _words(tensor: Tensor) -> np.ndarray[Any, np.dtype[np.uint32]]:
    return tensor.view(torch.uint32).numpy()
