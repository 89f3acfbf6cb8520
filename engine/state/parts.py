"""StateParts: what a replica's states are made with, besides the numbers of its ModelInfo."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from engine.state.cache import StateCache
from engine.state.page import Disk, FrameCodec, PageFile
from engine.state.store import StateStore
from engine.state.tiers import PageTiers
from engine.types import ModelInfo


@dataclass(frozen=True, slots=True, kw_only=True)
class StateParts:
    """`seed` names what states depend on besides tokens; None: nothing is reused.

    `disk` and `codec` bring pages in host memory to files and back. `tuned` are initial states by
    name, which lie in the frames 1, 2, ... in that order.
    """

    seed: bytes | None = None
    disk: Disk | None = None
    codec: FrameCodec | None = None
    tuned: Mapping[str, PageFile] = field(default_factory=dict)

    def open_cache(self, info: ModelInfo) -> StateCache:
        tiers = PageTiers(
            info.num_slots,
            info.num_frames,
            info.num_files,
            min_file_tokens=info.paragraph_len,  # less is computed as fast as it is read
        )
        return StateCache(tiers, info.paragraph_len, self.seed)

    def open_store(self, info: ModelInfo, cache: StateCache) -> StateStore:
        """Without a disk, half of the host's memory is for states that users keep."""
        return StateStore(
            cache,
            page_bytes=info.page_bytes,
            capacity=info.num_frames // 2 if self.disk is None else info.num_files,
            has_disk=self.disk is not None,
            tuned={name: cache.take_tuned(file) for name, file in self.tuned.items()},
        )
