"""The tensors behind the slots of one device. Knows slots and pages, not who holds them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from engine.model.rwkv7 import State
from engine.plan import ZERO_SLOT
from engine.state.layout import PageLayout


class StateStorage:
    """Device memory for `num_slots` pages beside the zero page, allocated once.

    Slot indices are int64 wherever they become offsets: at 7.2B, slot 256 begins at element 2**31.
    """

    def __init__(self, layout: PageLayout, num_slots: int, device: torch.device) -> None:
        self.layout = layout
        self.device = device
        rows = num_slots + 1
        self.state = State(
            wkv=torch.zeros(
                rows, *layout.wkv_shape, dtype=getattr(torch, layout.wkv_dtype), device=device
            ),
            shift=torch.zeros(
                rows, *layout.shift_shape, dtype=getattr(torch, layout.shift_dtype), device=device
            ),
        )

    def indices(self, slots: Sequence[int]) -> torch.Tensor:
        return torch.tensor(slots, dtype=torch.int64, device=self.device)

    def poison(self, slot: int) -> None:
        """Fill a free slot with NaN, so that a read of a stale page cannot go unnoticed (tests)."""
        assert slot != ZERO_SLOT, "the zero page must stay zero"
        self.state.wkv[slot].fill_(torch.nan)
        self.state.shift[slot].fill_(torch.nan)

    def check(self) -> None:
        """The zero page is zero. Raises AssertionError."""
        assert not self.state.wkv[ZERO_SLOT].any(), "the zero page holds a state"
        assert not self.state.shift[ZERO_SLOT].any(), "the zero page holds a shift"
