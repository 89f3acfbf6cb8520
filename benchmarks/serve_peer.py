"""N streams at once from three processes in turn: our server, its engine without HTTP, a peer.

All have the same weights and threads and are given the same prompts, new ones in each round, so
that nobody finds a state to begin from. Only one computes at a time; who begins changes from round
to round. The rate is of whole answers: prompts, first tokens and the end of every stream included.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from http.client import HTTPConnection
from itertools import pairwise
from pathlib import Path

from benchmarks.gguf import write_gguf
from benchmarks.peer_llama import llama_server, version
from benchmarks.record import RESULTS
from benchmarks.serve_client import Client, Load
from benchmarks.serve_loop import EngineLoop
from benchmarks.serve_plot import plot
from benchmarks.served import Server, our_server
from benchmarks.words import Words
from config import ModelTable, load_infer

# The nearest in size: what a GGUF has, by what our weights are served in.
PEER_DTYPES = {"int8": "q8_0", "bfloat16": "float16", "float32": "float32"}
OURS, LOOP, PEER = "ours", "ours without HTTP", "llama.cpp"
PERCENTILES = (50, 90, 99)
LAG = "rwkv_event_loop_lag_seconds_bucket"


@dataclass(slots=True)
class Found:
    """What one of the three did with so many streams, all rounds together. Times in seconds."""

    rates: list[float] = field(default_factory=list)  # tokens per second, one per round
    first_token_s: list[float] = field(default_factory=list)
    inter_token_s: list[float] = field(default_factory=list)
    loop_us: list[float] = field(default_factory=list)  # CPU of the main thread, per token
    client_us: list[float] = field(default_factory=list)
    lags: Counter[float] = field(default_factory=Counter)  # of the event loop, by upper bound

    @property
    def rate(self) -> float:
        return statistics.median(self.rates)

    def add(self, load: Load) -> None:
        num_tokens = sum(timing.num_tokens for timing in load.timings)
        self.rates.append(num_tokens / load.total_s)
        self.client_us.append(1e6 * load.client_cpu_s / num_tokens)
        for timing in load.timings:
            times = timing.event_s
            self.first_token_s.append(times[0])
            self.inter_token_s += [b - a for a, b in pairwise(times)]

    def figures(self) -> dict[str, object]:
        named = {
            "tokens_per_s": round(self.rate, 1),
            "first_token_ms": milliseconds(self.first_token_s),
            "inter_token_ms": milliseconds(self.inter_token_s),
            "loop_us_per_token": round(statistics.median(self.loop_us or [0]), 1),
            "client_us_per_token": round(statistics.median(self.client_us or [0]), 1),
            "loop_lag_p99_below_ms": self.loop_lag_ms(),
        }
        return {name: value for name, value in named.items() if value}

    def loop_lag_ms(self) -> float:
        """It was late by less in 99 of 100 cases; 0 if unknown."""
        num_all = max(self.lags.values(), default=0)
        return min((1e3 * s for s, num in self.lags.items() if num >= 0.99 * num_all), default=0)


def milliseconds(values_s: Sequence[float]) -> dict[str, float]:
    ordered = sorted(values_s)
    last = len(ordered) - 1
    return {
        f"p{p}": round(1e3 * ordered[min(last, len(ordered) * p // 100)], 2)
        for p in PERCENTILES
        if ordered
    }


class Subjects:
    """The three processes, all running, and who is asked how."""

    def __init__(self, args: argparse.Namespace, folder: Path, stack: ExitStack) -> None:
        table, weights = checkpoint(args, folder)
        self.words = Words(table.tokenizer_vocab_path)
        self.model_name = table.model_name
        self._num_tokens = args.num_tokens
        num_slots = max(args.streams)
        sets = [*args.sets, f"weights_path={weights}", "load_format=auto", f"dtype={args.dtype}"]
        sets += [f"max_batch_size={num_slots}", f"num_threads={args.num_threads}"]
        sets += ["max_context_len=0"]
        self.client = stack.enter_context(Client())
        self.loop = stack.enter_context(EngineLoop(args.model, args.config_dir, sets))
        log = folder / "ours.log"
        ours = our_server(OURS, table.model_name, args.model, args.config_dir, sets, log)
        self.servers: dict[str, Server] = {OURS: stack.enter_context(ours)}
        if args.peer == PEER:
            gguf = folder / "model.gguf"
            write_gguf(weights, table.tokenizer_vocab_path, gguf, peer_dtype(args) or args.dtype)
            peer = llama_server(
                gguf,
                folder / "llama.log",
                num_slots=num_slots,
                num_threads=args.num_threads,
                context_len=args.prompt_len + args.num_tokens + 16,
            )
            self.servers[PEER] = stack.enter_context(peer)

    def prompts(self, name: str, num_streams: int, num_tokens: int) -> list[list[int]]:
        return [self.words.document(f"{name} {i}", num_tokens) for i in range(num_streams)]

    def ask(self, name: str, prompts: Sequence[Sequence[int]], found: Found) -> None:
        if name == LOOP:
            total_s = self.loop.generate(prompts, self._num_tokens)
            found.rates.append(len(prompts) * self._num_tokens / total_s)
            return
        server = self.servers[name]
        lags = self._lags() if name == OURS else Counter()
        before_s = main_thread_s(server.pid)
        load = self.client.send_all(server.address, "/v1/completions", self._bodies(prompts))
        for timing in load.timings:
            if timing.num_tokens != self._num_tokens:
                raise SystemExit(f"{name} gave {timing.num_tokens} tokens, not {self._num_tokens}")
        found.add(load)
        if name == OURS:  # llama.cpp answers on many threads
            num_tokens = len(prompts) * self._num_tokens
            found.loop_us.append(1e6 * (main_thread_s(server.pid) - before_s) / num_tokens)
            found.lags += self._lags() - lags

    def _bodies(self, prompts: Sequence[Sequence[int]]) -> list[str]:
        options = {"max_tokens": self._num_tokens, "temperature": 0, "ignore_eos": True}
        options |= {"stream": True, "stream_options": {"include_usage": True}}
        fields = {"model": self.model_name, **options}
        return [json.dumps({**fields, "prompt": prompt}) for prompt in prompts]

    def _lags(self) -> Counter[float]:
        """How often the event loop of our server was late by at most so many seconds."""
        connection = HTTPConnection(self.servers[OURS].address)
        connection.request("GET", "/metrics")
        lines = connection.getresponse().read().decode().splitlines()
        connection.close()
        found = [line.split('"') for line in lines if line.startswith(LAG)]
        return Counter({float(bound): int(float(count[2:])) for _, bound, count in found})


def checkpoint(args: argparse.Namespace, folder: Path) -> tuple[ModelTable, Path]:
    """The model's own weights where they are, else random ones of its shape, in bfloat16 as
    checkpoints are: then times are those of real ones, and answers mean nothing."""
    table = load_infer(args.config_dir, args.model, args.sets).models[0]
    weights = table.weights_path
    if weights is not None and weights.exists():
        return table, weights.resolve()
    import torch

    from engine.model.weights import dummy_model, save_safetensors

    print(f"{weights} is not there: random weights of its shape")
    weights = folder / "random.safetensors"
    model = dummy_model(table.model, torch.device("cpu"), torch.bfloat16)
    save_safetensors(weights, model.state_dict())
    return table, weights


def peer_dtype(args: argparse.Namespace) -> str | None:
    """Of the GGUF; None where there is no peer."""
    return None if args.peer != PEER else args.peer_dtype or PEER_DTYPES[args.dtype]


def main_thread_s(pid: int) -> float:
    """CPU seconds of a process's first thread, which runs our event loop; 0 if unknown."""
    path = Path(f"/proc/{pid}/task/{pid}/schedstat")
    return int(path.read_text().split()[0]) / 1e9 if path.exists() else 0.0


def measure(args: argparse.Namespace) -> dict[str, object]:
    """One table, and its figures."""
    names = [OURS, LOOP, *([PEER] if args.peer == PEER else [])]
    found = {(name, n): Found() for name in names for n in args.streams}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        peer_version = version() if args.peer == PEER else None
        subjects = Subjects(args, Path(folder), stack)
        for n in args.streams:  # whatever is made at the first request
            for name in names:
                prompts = subjects.prompts("warm up", n, args.prompt_len)
                subjects.ask(name, prompts, Found())
        for number in range(args.num_rounds):
            for n in args.streams:
                prompts = subjects.prompts(f"round {number} of {n}", n, args.prompt_len)
                for name in names if number % 2 == 0 else names[::-1]:
                    subjects.ask(name, prompts, found[name, n])
                rates = ", ".join(f"{name} {found[name, n].rates[-1]:.0f}" for name in names)
                print(f"round {number + 1}, {n} streams, tokens/s: {rates}", flush=True)
        model_name = subjects.model_name
    rows = [{"streams": n, "server": name, **one.figures()} for (name, n), one in found.items()]
    ratios = {
        name: {n: round(found[OURS, n].rate / found[name, n].rate, 3) for n in args.streams}
        for name in names[1:]
    }
    show(rows, ratios)
    figures: dict[str, object] = {
        "model": model_name,
        "dtype": args.dtype,
        "peer": peer_version,
        "peer_dtype": peer_dtype(args),
        "num_threads": args.num_threads,
        "num_tokens": args.num_tokens,
        "prompt_len": args.prompt_len,
        "rows": rows,
        "ratios_to": ratios,
    }
    if args.save:
        dtypes = " and ".join(filter(None, (args.dtype, peer_dtype(args))))
        title = f"{model_name}, {dtypes}, {args.num_threads} threads"
        plot(rows, title, RESULTS / f"serve-{args.model}-{args.dtype}.png")
    return figures


def show(rows: Sequence[dict[str, object]], ratios: Mapping[str, Mapping[int, float]]) -> None:
    columns = [f"{what} p{p}" for what in ("first", "next") for p in PERCENTILES]
    print(f"\n{'streams':8}{'':20}{'tokens/s':>10}" + "".join(f"{name:>12}" for name in columns))
    for row in sorted(rows, key=lambda row: (row["streams"], row["server"] != OURS)):
        times = [row.get(name, {}) for name in ("first_token_ms", "inter_token_ms")]
        cells = [f"{time[f'p{p}']:12.1f}" for time in times if time for p in PERCENTILES]
        print(f"{row['streams']:<8}{row['server']:20}{row['tokens_per_s']:10.1f}" + "".join(cells))
    print()
    for name, by_streams in ratios.items():
        shown = ", ".join(f"{ratio:.2f} at {n} streams" for n, ratio in by_streams.items())
        print(f"{OURS} / {name}: {shown}")
    for row in rows:
        if lag_ms := row.get("loop_lag_p99_below_ms"):
            print(f"event loop late at {row['streams']} streams: p99 below {lag_ms:g} ms")
    print()
