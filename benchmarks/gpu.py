"""All that is measured on a GPU, in one run of at most ten minutes.

    python -m benchmarks.gpu [--device cuda] [--only SECTION ...] [--out DIR]

Each row is printed as it is made, and what there is by then kept in DIR as JSON and Markdown, so
that nothing is lost when the run is cut off. A section that fails, or takes more than its seconds,
is a row that says so, and the rest goes on; seconds are looked at between rows. The last line is
JSON.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path

import torch

from benchmarks.gpu_correctness import correctness_rows
from benchmarks.gpu_device import Bench, Row, device_rows
from benchmarks.gpu_kernels import decode_rows, prefill_rows, wkv_rows
from benchmarks.gpu_lora import lora_rows
from benchmarks.gpu_model import serving_rows
from benchmarks.gpu_sampler import sampler_rows
from benchmarks.gpu_server import server_rows
from benchmarks.gpu_targets import judged
from benchmarks.gpu_training import training_rows
from benchmarks.record import RESULTS, commit, finish
from engine.kernels import reference
from engine.kernels.choice import choose_backend

SECTIONS: dict[str, tuple[Callable[[Bench], Iterator[Row]], float]] = {
    "device": (device_rows, 20),
    "correctness": (correctness_rows, 90),
    "decode": (decode_rows, 40),
    "prefill": (prefill_rows, 50),
    "lora": (lora_rows, 10),
    "wkv": (wkv_rows, 60),
    "sampler": (sampler_rows, 20),
    "serving": (serving_rows, 180),
    "training": (training_rows, 50),
    "server": (server_rows, 80),
}
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def run(bench: Bench, names: Sequence[str], keep: Callable[[list[Row]], None]) -> list[Row]:
    rows: list[Row] = []

    def add(name: str, row: Row) -> None:
        rows.append({"section": name, **judged(row, bench.name)})
        print(_line(rows[-1]), flush=True)
        keep(rows)

    for name in names:
        section, limit_s = SECTIONS[name]
        started = time.perf_counter()
        try:
            for row in section(bench):
                add(name, row)
                if time.perf_counter() - started > limit_s:
                    add(name, {"failed": f"over {limit_s} s, cut off"})
                    break
        except Exception as error:
            traceback.print_exc()
            add(name, {"failed": f"{type(error).__name__}: {error}"})
        gc.collect()  # graphs and models of one section are not in the way of the next
        torch.cuda.empty_cache()
    return rows


def _line(row: Row) -> str:
    return "  ".join(f"{name} {_cell(value)}" for name, value in row.items())


def _cell(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def markdown(rows: Sequence[Row]) -> str:
    """A table for each section."""
    parts = []
    for section in dict.fromkeys(row["section"] for row in rows):
        own = [row for row in rows if row["section"] == section]
        columns = [
            name for name in dict.fromkeys(x for row in own for x in row) if name != "section"
        ]
        lines = [columns, ["---"] * len(columns)]
        lines += [[_cell(row.get(name, "")).replace("|", "/") for name in columns] for row in own]
        table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        parts.append(f"## {section}\n\n{table}\n")
    return "\n".join(parts)


def keeper(folder: Path | None, bench: Bench) -> Callable[[list[Row]], None]:
    """What writes the rows so far, under the date and the device's name."""
    if folder is None:
        return lambda rows: None
    folder.mkdir(parents=True, exist_ok=True)
    name = "".join(c if c.isalnum() else "-" for c in bench.name.lower())
    path = folder / f"{datetime.now(UTC):%Y-%m-%d}-gpu-{name}"
    head = f"# {bench.name}, weights in {str(bench.dtype).removeprefix('torch.')}, {commit()}\n\n"

    def keep(rows: list[Row]) -> None:
        path.with_suffix(".json").write_text(json.dumps(rows, indent=1))
        path.with_suffix(".md").write_text(head + markdown(rows))

    return keep


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--device", default="cuda", help="cuda, or cpu for tiny shapes")
    parser.add_argument("--dtype", choices=DTYPES, help="of weights; bfloat16, on a CPU float32")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument(
        "--out", type=Path, help="folder for JSON and Markdown; results/, on a CPU none"
    )
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    is_cpu = device.type == "cpu"
    dtype = DTYPES[args.dtype or ("float32" if is_cpu else "bfloat16")]
    bench = Bench(device, dtype, reference if is_cpu else choose_backend(device, 64))
    folder = args.out or (None if is_cpu else RESULTS)  # tiny shapes are no result
    rows = run(bench, args.only, keeper(folder, bench))
    finish("gpu", {"device": bench.name, "rows": rows}, save=False)
    return int(any("failed" in row or row.get("is_right") is False for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
