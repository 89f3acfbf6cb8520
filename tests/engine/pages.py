"""Small pages for tests of what stores them: random content, frames in plain memory, a disk."""

from __future__ import annotations

import queue
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from engine.plan import SlotRef
from engine.state.disk import PageDisk
from engine.state.layout import PageLayout
from engine.state.page import DiskJob, DiskResult, PageFile, ReadFile, WriteFile
from engine.state.pagefile import PageFormat

LAYOUT = PageLayout(
    num_cells=2, num_heads=3, head_size=4, vocab_size=7, wkv_dtype="float32", shift_dtype="bfloat16"
)
MODEL, TOKENIZER = "0123456789abcdef", "fedcba9876543210"
FORMAT = PageFormat(LAYOUT, MODEL, TOKENIZER)


def page_file(seed: int, num_tokens: int = 32, has_logits: bool = True) -> PageFile:
    return PageFile(seed.to_bytes(16, "big"), num_tokens, has_logits)


def random_tensors(seed: int, layout: PageLayout = LAYOUT) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(tensor.shape, generator=generator).to(getattr(torch, tensor.dtype))
        for name, tensor in layout.tensors.items()
    }


def are_equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Bit by bit, over the names they have in common; at least wkv and shift."""
    assert {"wkv", "shift"} <= a.keys() & b.keys()
    return all(torch.equal(a[name], b[name]) for name in a.keys() & b.keys())


class FakeFrames:
    """Frames of host memory, all NaN before anything is put there."""

    def __init__(self, num_frames: int, layout: PageLayout = LAYOUT) -> None:
        self._frames = [
            {name: torch.full_like(t, torch.nan) for name, t in random_tensors(0, layout).items()}
            for _ in range(num_frames + 1)
        ]

    def frame_tensors(self, frame: int) -> dict[str, Tensor]:
        return self._frames[frame]

    def put(self, frame: int, tensors: dict[str, Tensor]) -> SlotRef:
        for name, tensor in tensors.items():
            self._frames[frame][name].copy_(tensor)
        return SlotRef(frame, 0)


class Desk:
    """A started disk over frames, that does one job at a time."""

    def __init__(self, folder: Path, model: str = MODEL, layout: PageLayout = LAYOUT) -> None:
        self.frames = FakeFrames(num_frames=4, layout=layout)
        self.folder = folder
        self.disk = PageDisk(folder, self.frames, layout, model, TOKENIZER)
        self.results: queue.SimpleQueue[DiskResult] = queue.SimpleQueue()
        self.disk.start(self.results.put)

    def do(self, job: DiskJob) -> str | None:
        self.disk.submit(job)
        result = self.results.get(timeout=30)
        assert result.job is job
        return result.error

    def write(self, seed: int, has_logits: bool = True) -> str | None:
        frame = self.frames.put(1, random_tensors(seed))
        return self.do(WriteFile(page_file(seed, has_logits=has_logits), frame))

    def reads(self, seed: int, has_logits: bool = True) -> bool:
        """The page comes back as it was written; raises with the reason if there is none."""
        error = self.do(ReadFile(page_file(seed, has_logits=has_logits), SlotRef(2, 0)))
        if error is not None:
            raise AssertionError(error)
        written = random_tensors(seed)
        if not has_logits:
            del written["logits"]
        return are_equal(self.frames.frame_tensors(2), written)

    def read_error(self, seed: int) -> str:
        error = self.do(ReadFile(page_file(seed), SlotRef(2, 0)))
        assert error is not None
        assert "\n" not in error
        return error

    def path(self, seed: int) -> Path:
        return self.folder / "pages" / f"{page_file(seed).digest.hex()}.safetensors"

    def names(self) -> list[str]:
        return sorted(path.name for path in (self.folder / "pages").iterdir())


@contextmanager
def opened(folder: Path, model: str = MODEL, layout: PageLayout = LAYOUT) -> Iterator[Desk]:
    desk = Desk(folder, model, layout)
    try:
        yield desk
    finally:
        desk.disk.close()
