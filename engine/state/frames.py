"""HostFrames: the tensors behind the frames, host memory for pages. Knows no device and no file."""

from __future__ import annotations

import torch
from torch import Tensor

from engine.state.layout import PageLayout


def allocate(
    layout: PageLayout, num_pages: int, device: torch.device, *, is_pinned: bool = False
) -> dict[str, Tensor]:
    """Room for pages: each tensor of a page by name, [num_pages, ...].

    Filled with nothing: host memory that was never touched costs nothing.
    """
    return {
        name: torch.empty(
            num_pages,
            *tensor.shape,
            dtype=getattr(torch, tensor.dtype),
            device=device,
            pin_memory=is_pinned,
        )
        for name, tensor in layout.tensors.items()
    }


class HostFrames:
    """Memory for `num_frames` pages, allocated once; frame 0 is never used, as slots count.

    Two threads come here, the device's and the disk's. They do not lock: a frame belongs to one of
    them at a time, and whoever plans moves and jobs sees to that.
    """

    def __init__(self, layout: PageLayout, num_frames: int, *, is_pinned: bool) -> None:
        """`is_pinned`: a GPU copies at full speed, and without the CPU, from pinned memory only."""
        self.num_frames = num_frames
        cpu = torch.device("cpu")
        self._tensors = allocate(layout, num_frames + 1, cpu, is_pinned=is_pinned)

    def frame_tensors(self, frame: int) -> dict[str, Tensor]:
        """The page in a frame, as views: wkv [L, H, N, N], shift [L, 2, C], logits [V].

        Logits are garbage where the page has none.
        """
        assert 1 <= frame <= self.num_frames, f"frame {frame} of {self.num_frames}"
        return {name: tensor[frame] for name, tensor in self._tensors.items()}

    def poison_frame(self, frame: int) -> None:
        """Fill a free frame with NaN, so that reading a stale page cannot go unnoticed (tests)."""
        for tensor in self.frame_tensors(frame).values():
            tensor.fill_(torch.nan)
