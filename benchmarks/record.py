"""What every result carries, so that a figure can be checked later: when, what, where, how."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

RESULTS = Path(__file__).parent / "results"


def machine() -> str:
    """Processor, cores and load, as far as the system tells."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                name = line.split(":", 1)[1].strip()
                break
    return f"{name}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.2f}"


def commit() -> str:
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or "unknown"


def finish(name: str, figures: dict[str, object], *, save: bool) -> None:
    """Print the one JSON line; with `save`, also keep it under benchmarks/results/."""
    now = datetime.now(UTC)
    record = {
        "benchmark": name,
        "date": now.strftime("%Y-%m-%dT%H:%M:%SZ"),
        "commit": commit(),
        "machine": machine(),
        "python": platform.python_version(),
        "command": " ".join(["python -m", f"benchmarks.{name}", *sys.argv[1:]]),
        "figures": figures,
    }
    line = json.dumps(record)
    print(line)
    if save:
        RESULTS.mkdir(exist_ok=True)
        path = RESULTS / f"{now:%Y-%m-%d}-{name}.jsonl"
        with path.open("a") as file:
            file.write(line + "\n")
        print(f"saved to {path}", file=sys.stderr)
