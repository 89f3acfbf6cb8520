"""How one page lies in memory: shapes, types and bytes. Knows no device.

A page is the whole recurrent state of one sequence, every layer, and never grows:
    wkv    [L, H, N, N]  state matrices, row = key
    shift  [L, 2, C]     the last token's activations before time mix and channel mix
    logits [V]           what the last token gave, as the model gave it; not every page has them
Pages are slot-major, `[slot, layer, ...]`, so one page is one contiguous piece per tensor.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import NamedTuple

_ITEM_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


class TensorLayout(NamedTuple):
    shape: tuple[int, ...]
    dtype: str  # as torch spells it

    @property
    def num_bytes(self) -> int:
        return prod(self.shape) * _ITEM_BYTES[self.dtype]


@dataclass(frozen=True, slots=True, kw_only=True)
class PageLayout:
    num_cells: int
    num_heads: int
    head_size: int
    vocab_size: int
    wkv_dtype: str  # what states are stored in, see `state_dtype` of the config
    shift_dtype: str  # that of the model

    @property
    def wkv_shape(self) -> tuple[int, ...]:
        return (self.num_cells, self.num_heads, self.head_size, self.head_size)

    @property
    def shift_shape(self) -> tuple[int, ...]:
        return (self.num_cells, 2, self.num_heads * self.head_size)

    @property
    def logits_shape(self) -> tuple[int, ...]:
        return (self.vocab_size,)

    @property
    def logits_dtype(self) -> str:
        """float32 unless the whole model is float64."""
        return "float64" if self.shift_dtype == "float64" else "float32"

    @property
    def tensors(self) -> dict[str, TensorLayout]:
        """What one page consists of, by name."""
        return {
            "wkv": TensorLayout(self.wkv_shape, self.wkv_dtype),
            "shift": TensorLayout(self.shift_shape, self.shift_dtype),
            "logits": TensorLayout(self.logits_shape, self.logits_dtype),
        }

    @property
    def page_bytes(self) -> int:
        """Of a place for a page; a page without logits leaves theirs unused."""
        return sum(tensor.num_bytes for tensor in self.tensors.values())
