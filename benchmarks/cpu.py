"""The model on a CPU beside llama.cpp, the `rwkv` package, and what the machine can do at best.

    python -m benchmarks.cpu [--quick] [--models 0.1b 0.4b] [--no-peers] [--save]

Every engine has a process of its own and the same random weights, in an official shape; they take
turns at each case, some rounds of it, so that a machine whose speed drifts drifts for all. Rates
are those of each engine's best round. Decode is greedy steps of N sequences; prefill one prompt of
512 tokens without its head's logits but the last. The floor is computed from what was measured in
the same run (`cpu_limits`). Targets are those of 2 cores with AVX-512 VNNI at 0.1b.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from benchmarks.cpu_limits import Limits, floor
from benchmarks.cpu_model import SHAPES, write_checkpoint
from benchmarks.gguf import write_gguf
from benchmarks.record import finish
from engine.kernels.cpu.cores import physical_cores

CASES = ("b1", "b8", "b32", "b64", "prefill512")
VOCABULARY = "rwkv_vocab_v20230424"
DTYPES = {"bf16": "bfloat16", "int8": "int8", "fp32": "float32"}
PEERS = {"f16": "float16", "q8_0": "q8_0"}  # of llama.cpp
# Ours, the peer's or "floor", and what the ratio is to be at least: b1, b8, b32, b64, prefill.
TARGETS = (
    ("bf16", "f16", (1.6, 1.4, 1.75, 2.0, 2.1)),
    ("int8", "q8_0", (1.85, 2.9, 4.1, 4.5, 4.1)),
    ("int8", "floor", (0.80, 0.55, 0.50, 0.55, 0.45)),
)


@dataclass(frozen=True, slots=True)
class Contender:
    engine: str
    dtype: str
    argument: str  # how its worker spells the dtype
    weights: Path

    @property
    def name(self) -> str:
        return f"{self.engine} {self.dtype}"


class Worker:
    """A process that answers one line with one line."""

    def __init__(self, contender: Contender, num_threads: int, log: Path) -> None:
        self.contender = contender
        command = [sys.executable, "-m", "benchmarks.cpu_worker", contender.engine]
        command += [str(contender.weights), contender.argument, "--threads", str(num_threads)]
        with log.open("a") as errors:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True
            )
        self._log = log

    def ask(self, line: str) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(line, file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        if not answer:
            tail = self._log.read_text(errors="replace")[-2000:]
            raise SystemExit(f"{self.contender.name} ended at {line}:\n{tail}")
        return json.loads(answer)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


def contenders(folder: Path, model: str, *, has_peers: bool) -> list[Contender]:
    """Their files are written here."""
    weights = folder / f"{model}.pth"
    write_checkpoint(SHAPES[model], weights)
    found = [Contender("ours", dtype, long, weights) for dtype, long in DTYPES.items()]
    if has_peers:
        for dtype, long in PEERS.items():
            gguf = folder / f"{model}-{dtype}.gguf"
            write_gguf(weights, VOCABULARY, gguf, long)
            found.append(Contender("llama.cpp", dtype, dtype, gguf))
        found.append(Contender("rwkv", "fp32", "fp32", weights))
    return found


def compare(
    folder: Path,
    model: str,
    cases: list[str],
    num_rounds: int,
    num_threads: int,
    *,
    has_peers: bool,
) -> tuple[list[dict[str, object]], dict[str, float]]:
    """Rows of one model, and what the machine could do meanwhile."""
    rates: dict[tuple[str, str, str], float] = {}
    limits: list[Limits] = []
    log = folder / "log"
    found = contenders(folder, model, has_peers=has_peers)
    for number in range(num_rounds):
        # One process at a time: an idle llama.cpp spins for a while.
        with Worker(Contender("limits", "-", "-", folder), num_threads, log) as worker:
            limits.append(Limits(*worker.ask("now")))
        for contender in found:
            with Worker(contender, num_threads, log) as worker:
                for case in cases:
                    if contender.engine == "rwkv" and case not in ("b1", "prefill512"):
                        continue
                    key = (contender.engine, contender.dtype, case)
                    rates[key] = max(rates.get(key, 0.0), worker.ask(case))
        print(f"{model}: round {number + 1} of {num_rounds} done", file=sys.stderr, flush=True)
    best = Limits(*(max(values) for values in zip(*limits, strict=True)))
    for dtype in DTYPES:
        for case in cases:
            rates["floor", dtype, case] = round(floor(SHAPES[model], dtype, case, best), 1)
    rows = [
        {"engine": engine, "dtype": dtype, "model": model, "case": case, "tokens_per_s": value}
        for (engine, dtype, case), value in rates.items()
    ]
    return rows, best._asdict()


def judge(rows: list[dict[str, object]], model: str, cases: list[str]) -> list[dict[str, object]]:
    """The ratios that have a target, printed as a table."""
    rates = {
        (row["engine"], row["dtype"], row["case"]): float(str(row["tokens_per_s"]))
        for row in rows
        if row["model"] == model
    }
    print(f"\n{model}, tokens per second")
    print(f"{'':16}" + "".join(f"{case:>12}" for case in cases))
    for engine, dtype in dict.fromkeys((key[0], key[1]) for key in rates):
        values = (rates.get((engine, dtype, case)) for case in cases)
        texts = (f"{'' if value is None else format(value, '.1f'):>12}" for value in values)
        print(f"{engine + ' ' + str(dtype):16}" + "".join(texts))
    found: list[dict[str, object]] = []
    for dtype, peer, targets in TARGETS:
        for case, target in zip(CASES, targets, strict=True):
            other = ("floor", dtype, case) if peer == "floor" else ("llama.cpp", peer, case)
            if case in cases and other in rates:
                ratio = round(rates["ours", dtype, case] / rates[other], 2)
                entry = {"dtype": dtype, "against": peer, "model": model, "case": case}
                found.append({**entry, "ratio": ratio, "target": target})
    for entry in found:
        met = "met" if float(str(entry["ratio"])) >= float(str(entry["target"])) else "missed"
        what = f"{entry['dtype']} against {entry['against']}, {entry['case']}"
        print(f"  {what:36} {entry['ratio']:6} (target {entry['target']}, {met})")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="0.1b only, two rounds")
    parser.add_argument("--models", nargs="+", choices=list(SHAPES), default=["0.1b", "0.4b"])
    parser.add_argument("--cases", nargs="+", default=list(CASES))
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--threads", type=int, default=physical_cores())
    parser.add_argument("--no-peers", action="store_true", help="ours and the floor only")
    parser.add_argument("--save", action="store_true", help="keep the result in benchmarks/results")
    args = parser.parse_args()
    models = ["0.1b"] if args.quick else args.models
    num_rounds = min(args.rounds, 2) if args.quick else args.rounds
    rows: list[dict[str, object]] = []
    limits: dict[str, dict[str, float]] = {}
    ratios: list[dict[str, object]] = []
    for model in models:
        with tempfile.TemporaryDirectory() as folder:
            found, limits[model] = compare(
                Path(folder),
                model,
                args.cases,
                num_rounds,
                args.threads,
                has_peers=not args.no_peers,
            )
        rows += found
        ratios += judge(found, model, args.cases)
    figures: dict[str, object] = {"threads": args.threads, "limits": limits, "ratios": ratios}
    finish("cpu", {"rows": rows, **figures}, save=args.save)
    print(json.dumps({"rows": rows}))


if __name__ == "__main__":
    main()
