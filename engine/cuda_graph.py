"""Records work on a GPU once and replays it as one launch. Knows functions, not what they do."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Protocol

import torch


class Recorder(Protocol):
    """Turns functions without arguments into replays of them.

    A replay reads and writes the memory that the function did, so all that goes in and out must
    lie in tensors that live as long. It is used on the thread that recorded it.
    """

    def record(self, function: Callable[[], None]) -> Callable[[], None]:
        """The replay. The function runs once or more, and must change nothing that matters."""
        ...


class CudaRecorder:
    """CUDA graphs, which share the memory of what they compute on the way: record the largest
    first, and never replay two at once."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)

    def record(self, function: Callable[[], None]) -> Callable[[], None]:
        graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            function()  # kernels are compiled and chosen, work spaces allocated
            # Another replica may serve from another thread meanwhile: it is none of ours.
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                function()
            except BaseException:
                with suppress(RuntimeError):  # the first error is the one to tell
                    graph.capture_end()
                raise
            graph.capture_end()
        current.wait_stream(self._stream)
        replay: Callable[[], None] = graph.replay
        return replay


def used_mib(device: torch.device) -> int:
    """Device memory that torch holds, in MiB; 0 on a CPU."""
    return torch.cuda.memory_reserved(device) >> 20 if device.type == "cuda" else 0
