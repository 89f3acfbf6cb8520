"""What a state costs: memory by model size, and the time of fork, swap and disk round trip.

Times are of the device's side alone, beside a decode step and a prefill of the same run. They go
through the runner, the storage and the disk of the engine.
"""

from __future__ import annotations

import queue
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from config import ModelTable, load_model
from engine.loading import load, pick_device, pick_dtype
from engine.model.rwkv7 import RWKV7
from engine.plan import ZERO_SLOT, MoveKind, PageMove, Row, SeatStart, SlotRef, StepPlan
from engine.runner import ModelRunner
from engine.sampler import Sampler
from engine.state.disk import PageDisk
from engine.state.frames import HostFrames
from engine.state.layout import PageLayout
from engine.state.page import DiskJob, DiskResult, PageFile, ReadFile, WriteFile
from engine.state.storage import StateStorage
from engine.transfers import mark
from engine.types import SamplingParams

GIB = 2**30
PREFILL_LEN = 256
ZERO, FIRST, SECOND = (SlotRef(slot, 0) for slot in (ZERO_SLOT, 1, 2))
FRAME = SlotRef(1, 0)


def states_per_gib(config_dir: Path) -> dict[str, object]:
    """Of every shipped shape, as a GPU holds it: float32 matrices, bfloat16 shifts."""
    print(f"\n{'':16}{'bytes a state':>16}{'states a GiB':>16}")
    figures: dict[str, object] = {}
    for path in sorted((config_dir / "model").glob("*.toml")):
        cfg = load_model(config_dir, path.stem)
        layout = PageLayout(
            num_cells=cfg.num_cells,
            num_heads=cfg.num_heads,
            head_size=cfg.head_size,
            vocab_size=cfg.vocab_size,
            wkv_dtype="float32",
            shift_dtype="bfloat16",
        )
        num_bytes, num_states = layout.page_bytes, GIB // layout.page_bytes
        print(f"{path.stem:16}{num_bytes:>16,}{num_states:>16,}")
        figures[path.stem] = {"page_bytes": num_bytes, "states_per_gib": num_states}
    return figures


@dataclass(frozen=True, slots=True)
class Bench:
    """The device's side of an engine with one seat, two slots and a frame."""

    model: RWKV7
    storage: StateStorage
    frames: HostFrames
    runner: ModelRunner

    @staticmethod
    def of(table: ModelTable) -> Bench:
        device = pick_device(table)
        model = load(table, device, pick_dtype(table, device))
        frames = HostFrames(model.layout, 1, is_pinned=device.type == "cuda")
        storage = StateStorage(model.layout, 2, device, frames)
        sampler = Sampler(num_seats=1, banned_ids=(), device=device)
        return Bench(model, storage, frames, ModelRunner(model, storage, sampler, 1))

    def prefill(self) -> None:
        start = SeatStart(0, SamplingParams(temperature=0.0))
        tokens = (1,) * PREFILL_LEN
        row = Row(0, 0, tokens, PREFILL_LEN, 0, ZERO, FIRST, sample=True, keep_logits=True)
        self.runner.execute(StepPlan(0, (row,), (start,)))

    def decode(self, dst: SlotRef) -> None:
        """One token from the first slot, which a fork leaves as it is."""
        row = Row(0, 0, None, 1, PREFILL_LEN, FIRST, dst, sample=True)
        self.runner.execute(StepPlan(0, (row,)))
        mark(self.storage.device)()

    def copy(self) -> None:
        """What a fork would cost if it copied."""
        source, target = (self.storage.slot_tensors(ref.slot) for ref in (FIRST, SECOND))
        for name in ("wkv", "shift"):
            target[name].copy_(source[name])
        mark(self.storage.device)()

    def move(self, kind: MoveKind) -> None:
        self.storage.move(PageMove(kind, FIRST, FRAME, has_logits=True))
        mark(self.storage.device)()


def measure(table: ModelTable, num_repeats: int) -> dict[str, object]:
    """Medians in seconds."""
    torch.set_num_threads(max(1, table.num_threads))
    bench = Bench.of(table)
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        disk = Disk(Path(folder), bench)
        timed: dict[str, Callable[[], None]] = {
            f"prefill of {PREFILL_LEN} tokens": bench.prefill,
            "decode step, in place": lambda: bench.decode(FIRST),
            "decode step, forked": lambda: bench.decode(SECOND),
            "copy within the device": bench.copy,
            "device to host": lambda: bench.move(MoveKind.STORE),
            "host to device": lambda: bench.move(MoveKind.LOAD),
            "host to disk, fsync": disk.write,
            "disk to host, checked": disk.read,
        }
        times_s: dict[str, list[float]] = {name: [] for name in timed}
        for repeat in range(num_repeats + 1):
            for name, do in timed.items():
                started = time.perf_counter()
                do()
                if repeat > 0:  # the first of each allocates
                    times_s[name].append(time.perf_counter() - started)
        disk.close()
    medians = {name: round(statistics.median(values), 7) for name, values in times_s.items()}
    print(f"\none state of {bench.model.layout.page_bytes:,} bytes, ms")
    for name, seconds in medians.items():
        print(f"{name:28}{seconds * 1e3:12.3f}")
    return {"page_bytes": bench.model.layout.page_bytes, "median_s": medians}


class Disk:
    """Jobs of one page, one at a time, each with another file."""

    def __init__(self, folder: Path, bench: Bench) -> None:
        self._disk = PageDisk(folder / "states", bench.frames, bench.model.layout, "model", "words")
        self._results: queue.SimpleQueue[DiskResult] = queue.SimpleQueue()
        self._disk.start(self._results.put)
        self._num_files = 0

    def write(self) -> None:
        self._num_files += 1
        self._do(WriteFile(self._file(), FRAME))

    def read(self) -> None:
        """The file just written: out of the system's cache, as after a restart of the server but
        not of the machine."""
        self._do(ReadFile(self._file(), FRAME))

    def close(self) -> None:
        self._disk.close()

    def _file(self) -> PageFile:
        return PageFile(self._num_files.to_bytes(16, "little"), PREFILL_LEN, has_logits=True)

    def _do(self, job: DiskJob) -> None:
        self._disk.submit(job)
        result = self._results.get()
        if result.error is not None:
            raise SystemExit(result.error)
