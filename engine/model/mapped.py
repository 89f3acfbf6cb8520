"""Pages of mapped files: what has been read of them can be let go of, and is read again if needed.

Only pages that hold what the file holds: one that was written to is no longer the file's.
"""

from __future__ import annotations

import ctypes
import mmap
import re
from bisect import bisect_right
from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

WINDOW = 1 << 16  # bytes that Linux maps at once, at multiples of it, when one of them is read
SMAPS = Path("/proc/self/smaps")
HEADER = re.compile(r"([0-9a-f]+)-([0-9a-f]+) (\S+) \S+ \S+ (\d+)\s*(.*)")


class FilePages:
    """Of the files that are mapped now; none where the system does not tell."""

    def __init__(self) -> None:
        regions = _unwritten_regions(SMAPS.read_text()) if SMAPS.exists() else ()
        self._regions = sorted(regions)

    def are_under(self, tensor: Tensor) -> bool:
        return self._region_of(tensor) is not None

    def release(self, tensor: Tensor) -> None:
        """Let go of the pages that reading a contiguous tensor has mapped; not of memory.

        Must not be called for a tensor that has been written to since the beginning.
        """
        region = self._region_of(tensor)
        if region is None or tensor.numel() == 0:
            return
        # What came with its first and last page too: who still needs that just reads it again.
        begin = tensor.data_ptr() // WINDOW * WINDOW
        end = -(-(tensor.data_ptr() + tensor.nbytes) // WINDOW) * WINDOW
        begin, end = max(begin, region[0]), min(end, region[1])
        _madvise(begin, end - begin)

    def _region_of(self, tensor: Tensor) -> tuple[int, int] | None:
        """Begin and end of the mapping in which all of it lies."""
        address = tensor.data_ptr()
        index = bisect_right(self._regions, (address, 1 << 64)) - 1
        if index < 0:
            return None
        begin, end = self._regions[index]
        return (begin, end) if begin <= address and address + tensor.nbytes <= end else None


def _unwritten_regions(smaps: str) -> Iterator[tuple[int, int]]:
    """Mappings of files without a page of their own, in memory or swapped out."""
    for region in re.split(r"\n(?=[0-9a-f]+-[0-9a-f]+ )", smaps):
        header = HEADER.match(region)
        if header is None or header[4] == "0" or not header[5].startswith("/"):
            continue
        own = re.findall(r"^(?:Anonymous|Swap): +(\d+) kB$", region, re.MULTILINE)
        if len(own) == 2 and set(own) == {"0"}:
            yield int(header[1], 16), int(header[2], 16)


def _madvise(address: int, num_bytes: int) -> None:
    """A hint: that it is refused is no failure."""
    ctypes.CDLL(None).madvise(
        ctypes.c_void_p(address), ctypes.c_size_t(num_bytes), mmap.MADV_DONTNEED
    )
