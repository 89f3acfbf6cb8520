"""StateStorage: the tensors behind the slots of one device, and moves between slots and frames.

Knows slots, frames and pages, not who holds them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from engine.model.rwkv7 import State
from engine.plan import ZERO_SLOT, MoveKind, PageMove
from engine.state.frames import HostFrames, allocate
from engine.state.layout import PageLayout
from engine.transfers import to_device


class StateStorage:
    """Device memory for `num_slots` pages beside the zero page, allocated once.

    Slot indices are int64 wherever they become offsets: at 7.2B, slot 256 begins at element 2**31.
    """

    def __init__(
        self, layout: PageLayout, num_slots: int, device: torch.device, frames: HostFrames
    ) -> None:
        """`frames`, of the same layout, are the other end of every move."""
        self.layout = layout
        self.num_slots = num_slots
        self.device = device
        tensors = allocate(layout, num_slots + 1, device)
        self.state = State(wkv=tensors["wkv"], shift=tensors["shift"])
        self.logits = tensors["logits"]
        self._frames = frames
        for tensor in self.slot_tensors(ZERO_SLOT).values():
            tensor.zero_()

    def indices(self, slots: Sequence[int]) -> Tensor:
        return to_device(slots, self.device)

    def slot_tensors(self, slot: int) -> dict[str, Tensor]:
        """The page in a slot, as views named like those of `HostFrames.frame_tensors`."""
        assert 0 <= slot <= self.num_slots, f"slot {slot} of {self.num_slots}"
        return {
            "wkv": self.state.wkv[slot],
            "shift": self.state.shift[slot],
            "logits": self.logits[slot],
        }

    def move(self, move: PageMove) -> None:
        """Copy a page between its slot and its frame, behind what the device was asked before.

        On a GPU the copy may still be under way on return; `engine.transfers.mark` tells.
        """
        source = self.slot_tensors(move.slot.slot)
        target = self._frames.frame_tensors(move.frame.slot)
        if move.kind is MoveKind.LOAD:
            assert move.slot.slot != ZERO_SLOT, f"{move} writes the zero page"
            source, target = target, source
        for name in source:
            if name != "logits" or move.has_logits:
                target[name].copy_(source[name], non_blocking=True)

    def poison(self, slot: int) -> None:
        """Fill a free slot with NaN, so that a read of a stale page cannot go unnoticed (tests)."""
        assert slot != ZERO_SLOT, "the zero page must stay zero"
        for tensor in self.slot_tensors(slot).values():
            tensor.fill_(torch.nan)

    def check(self) -> None:
        """The zero page is zero. Raises AssertionError."""
        for name, tensor in self.slot_tensors(ZERO_SLOT).items():
            assert not tensor.any(), f"the {name} of the zero page are not zero"
