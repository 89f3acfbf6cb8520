"""What the kernels are to reach on one H100, and whether a row does. Knows rows, not how measured.

Random weights in half precision, states in float32 where nothing else is said.
"""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.gpu_device import Row

CARD = "H100"


@dataclass(frozen=True, slots=True)
class Target:
    """A row that has all of `where` is to have at least, or at most, `value` in its `column`."""

    where: Row
    column: str
    value: float
    is_least: bool = True

    def missed_by(self, row: Row) -> float:
        """The share that is missing to the target; negative where it is surpassed."""
        measured = row[self.column]
        assert isinstance(measured, float), measured
        return 1 - measured / self.value if self.is_least else measured / self.value - 1


def _decoding(model: str, batch: int, rate: float, state: str = "float32") -> Target:
    where: Row = {"name": "decode", "model": model, "batch": batch, "state": state}
    return Target(where, "tokens_per_s", rate)


TARGETS = (
    *(_decoding("7.2b", b, x) for b, x in ((1, 165), (32, 4_300), (128, 11_500), (256, 18_000))),
    _decoding("7.2b", 256, 23_000, "float16"),
    *(_decoding("1.5b", b, x) for b, x in ((1, 600), (32, 15_000), (128, 36_000), (256, 48_000))),
    Target({"name": "prefill", "model": "1.5b", "sequences": 1}, "tokens_per_s", 130_000),
    Target({"name": "prefill", "model": "7.2b", "sequences": 1}, "tokens_per_s", 35_000),
    Target({"name": "wkv, forward + backward", "shape": [8, 4096, 64]}, "ms", 12, is_least=False),
    Target({"name": "training step", "model": "0.1b"}, "tokens_per_s", 300_000),
)


def judged(row: Row, device_name: str) -> Row:
    """The row, with its target and how it stands to it, where it has one on this device."""
    if CARD not in device_name:
        return row
    for target in TARGETS:
        if all(row.get(name) == value for name, value in target.where.items()):
            missed = target.missed_by(row)
            verdict = "met" if missed <= 0 else f"missed by {100 * missed:.1f} %"
            return {**row, "target": target.value, "verdict": verdict}
    return row
