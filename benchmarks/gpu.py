"""All that is measured on a GPU, in one run; each row is printed as it is made.

    python -m benchmarks.gpu [--device cuda] [--only SECTION ...] [--out DIR]

A section that fails, or takes more than its seconds, is a row that says so, and the rest goes on.
Seconds are looked at between rows. `--out` keeps gpu.json and gpu.md. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from benchmarks.gpu_device import Bench, Row, device_rows
from benchmarks.gpu_kernels import correctness_rows, decode_rows, wkv_rows
from benchmarks.gpu_model import serving_rows, training_rows
from benchmarks.record import finish
from engine.kernels.choice import choose_backend

SECTIONS: dict[str, tuple[Callable[[Bench], Iterator[Row]], float]] = {
    "device": (device_rows, 30),
    "correctness": (correctness_rows, 120),
    "decode": (decode_rows, 60),
    "wkv": (wkv_rows, 60),
    "serving": (serving_rows, 180),
    "training": (training_rows, 90),
}


def run(bench: Bench, names: Sequence[str]) -> list[Row]:
    rows: list[Row] = []
    for name in names:
        section, limit_s = SECTIONS[name]
        started = time.perf_counter()
        try:
            for row in section(bench):
                rows.append(_shown({"section": name, **row}))
                if time.perf_counter() - started > limit_s:
                    rows.append(_shown({"section": name, "failed": f"over {limit_s} s, cut off"}))
                    break
        except Exception as error:
            traceback.print_exc()
            rows.append(_shown({"section": name, "failed": f"{type(error).__name__}: {error}"}))
    return rows


def _shown(row: Row) -> Row:
    print(_line(row), flush=True)
    return row


def _line(row: Row) -> str:
    cells = (f"{x:.4g}" if isinstance(x, float) else str(x) for x in row.values())
    return "  ".join(f"{name} {cell}" for name, cell in zip(row, cells, strict=True))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--device", default="cuda", help="cuda, or cpu for tiny shapes")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--out", type=Path, help="folder for gpu.json and gpu.md")
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    rows = run(Bench(device, dtype, choose_backend(device, 64)), args.only)
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "gpu.json").write_text(json.dumps(rows, indent=1))
        (args.out / "gpu.md").write_text("".join(f"* {_line(row)}\n" for row in rows))
    finish("gpu", {"device": args.device, "rows": rows}, save=False)
    return int(any("failed" in row or row.get("is_right") is False for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
