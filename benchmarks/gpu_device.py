"""What every part of the GPU benchmark shares: the device, its clock, and its own limits.

On a CPU everything runs on tiny shapes, so that the benchmark is tried where no GPU is.
"""

from __future__ import annotations

import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from engine.kernels.backend import Backend

Row = dict[str, object]


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

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def randn(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, device=self.device, dtype=self.dtype)


def device_rows(bench: Bench) -> Iterator[Row]:
    """Facts, copy bandwidth (bytes read and written), and the rate of a large matrix product."""
    is_gpu = bench.device.type == "cuda"
    name = torch.cuda.get_device_name(bench.device) if is_gpu else "cpu"
    yield {"name": "device", "is": name, "torch": torch.__version__, "clocks": _clocks(is_gpu)}
    size = 2**20 if bench.is_tiny else 2**31
    source = torch.ones(size // 4, device=bench.device)
    target = torch.empty_like(source)
    bench.bytes_per_s = 2 * size / bench.seconds(lambda: target.copy_(source))
    yield {"name": "copy", "gb_per_s": bench.bytes_per_s / 1e9}
    n = 128 if bench.is_tiny else 8192
    a, b = bench.randn(n, n), bench.randn(n, n)
    bench.flop_per_s = 2 * n**3 / bench.seconds(lambda: a @ b)
    yield {"name": "matrix product", "tflop_per_s": bench.flop_per_s / 1e12}


def _clocks(is_gpu: bool) -> str:
    """Of multiprocessors and memory now, as the driver's tool tells, or why it does not."""
    if not is_gpu or shutil.which("nvidia-smi") is None:
        return "unknown"
    command = ["nvidia-smi", "--query-gpu=clocks.sm,clocks.mem", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    return done.stdout.strip() or done.stderr.strip()
