"""What every part of the GPU benchmark shares: the device, its clock, and its own limits.

On a CPU everything runs on tiny shapes, so that the benchmark is tried where no GPU is.
"""

from __future__ import annotations

import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from engine.cuda_graph import CudaRecorder, Recorder
from engine.kernels.backend import Backend

Row = dict[str, object]


class CallingRecorder:
    """A Recorder where there are no graphs: a replay calls the function again."""

    def record(self, function: Callable[[], None]) -> Callable[[], None]:
        function()
        return function


@dataclass(slots=True)
class Bench:
    """One run. Bandwidth and peak are measured by the section `device`, and zero before it."""

    device: torch.device
    dtype: torch.dtype  # of weights and activations
    kernels: Backend
    bytes_per_s: float = 0.0
    flop_per_s: float = 0.0

    @property
    def is_tiny(self) -> bool:
        return self.device.type == "cpu"

    @property
    def name(self) -> str:
        return "cpu" if self.is_tiny else torch.cuda.get_device_name(self.device)

    def recorder(self) -> Recorder:
        return CallingRecorder() if self.is_tiny else CudaRecorder(self.device)

    def seconds(self, action: Callable[[], object], repeats: int = 20) -> float:
        """The median of single runs, after one to warm up, each waited for."""
        repeats = 2 if self.is_tiny else repeats
        action()
        found = []
        for _ in range(repeats):
            self.wait()
            started = time.perf_counter()
            action()
            self.wait()
            found.append(time.perf_counter() - started)
        return statistics.median(found)

    def replayed_seconds(self, actions: Sequence[Callable[[], object]]) -> float:
        """Of one action, when all of them are one graph: launches cost what they cost there.

        Actions that touch other memory than each other keep it from staying in the cache.
        """

        def run_all() -> None:
            for action in actions:
                action()

        return self.seconds(self.recorder().record(run_all)) / len(actions)

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def randn(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, device=self.device, dtype=self.dtype)

    def tokens(self, vocab_size: int, *shape: int) -> torch.Tensor:
        """Random ones; never 0, the end of a text."""
        return torch.randint(1, vocab_size, shape, device=self.device)

    def share_of_roofline(self, num_bytes: float, flop: float, seconds: float) -> float | None:
        """The least time that these bytes and products take on this device, over `seconds`."""
        if not self.bytes_per_s or not self.flop_per_s:
            return None
        return max(num_bytes / self.bytes_per_s, flop / self.flop_per_s) / seconds

    def share_of_copy(self, num_bytes: float, seconds: float) -> float | None:
        """The time that a copy takes to move as many bytes, over `seconds`."""
        return num_bytes / self.bytes_per_s / seconds if self.bytes_per_s else None


def device_rows(bench: Bench) -> Iterator[Row]:
    """Facts, copy bandwidth (bytes read and written), and the rate of a large matrix product."""
    yield {"name": "device", "is": bench.name, "torch": torch.__version__,
           "triton": _triton_version(), "clocks": _clocks(bench)}  # fmt: skip
    size = 2**20 if bench.is_tiny else 2**32
    source = torch.ones(size // 4, device=bench.device)
    target = torch.empty_like(source)
    bench.bytes_per_s = 2 * size / bench.seconds(lambda: target.copy_(source))
    yield {"name": "copy", "gb_per_s": bench.bytes_per_s / 1e9}
    n = 128 if bench.is_tiny else 8192
    a, b = bench.randn(n, n), bench.randn(n, n)
    bench.flop_per_s = 2 * n**3 / bench.seconds(lambda: a @ b)
    yield {"name": "matrix product", "tflop_per_s": bench.flop_per_s / 1e12,
           "clocks": _clocks(bench)}  # fmt: skip


def _triton_version() -> str:
    try:
        import triton
    except ImportError:
        return "none"
    return str(triton.__version__)


def _clocks(bench: Bench) -> str:
    """Of multiprocessors and memory now, as the driver's tool tells, or why it does not."""
    if bench.is_tiny or shutil.which("nvidia-smi") is None:
        return "unknown"
    command = ["nvidia-smi", "--query-gpu=clocks.sm,clocks.mem", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    return done.stdout.strip() or done.stderr.strip()
