"""How one state lies in memory: shapes, types and bytes of a page. Knows no device.

A page is the whole recurrent state of one sequence, every layer, and never grows:
    wkv    [L, H, N, N]  state matrices, row = key
    shift  [L, 2, C]     the last token's activations before time mix and channel mix
Pages are slot-major, `[slot, layer, ...]`, so one page is one contiguous piece per tensor.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

_ITEM_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, slots=True, kw_only=True)
class PageLayout:
    num_cells: int
    num_heads: int
    head_size: int
    wkv_dtype: str  # float32 unless the whole model is float64
    shift_dtype: str

    @property
    def wkv_shape(self) -> tuple[int, ...]:
        return (self.num_cells, self.num_heads, self.head_size, self.head_size)

    @property
    def shift_shape(self) -> tuple[int, ...]:
        return (self.num_cells, 2, self.num_heads * self.head_size)

    @property
    def page_bytes(self) -> int:
        return (
            prod(self.wkv_shape) * _ITEM_BYTES[self.wkv_dtype]
            + prod(self.shift_shape) * _ITEM_BYTES[self.shift_dtype]
        )
