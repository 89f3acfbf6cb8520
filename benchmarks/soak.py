"""The server under mixed load for a long time: what grows, what slows down, what goes wrong.

    python -m benchmarks.soak [--minutes 30] [--num-clients 12] [--save]

Clients of twelve kinds (soak_clients.py) ask, leave, are refused and come back, while the
configuration is reloaded once a minute. Memory, descriptors and threads of the server are read
from the system; times are compared between the first and the second half of the run, which is the
reference of this benchmark: a server that leaks or wears out is worse in the second one. Every
request is repeated many times, and an answer that is not the one given first is counted.
Exit code 1 if any request failed, or something was left behind when all clients had gone.
"""

from __future__ import annotations

import argparse
import random
import shutil
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from benchmarks.record import RESULTS, finish
from benchmarks.served import our_server
from benchmarks.soak_clients import KINDS, Client, Failed, chat_stream

PROJECT = Path(__file__).parents[1]
MODEL = "rwkv-lm-tiny"
NUM_VARIANTS = 12  # of what each kind asks
SAMPLE_S = 5.0
RELOAD_S = 60.0
NUM_WINDOWS = 10
SETTLE_S = 30.0
MAX_SHOWN = 5  # failures


@dataclass(frozen=True, slots=True)
class Sample:
    """The server as the system sees it."""

    at_s: float
    rss_mib: float
    num_descriptors: int
    num_threads: int


@dataclass(slots=True)
class Log:
    """What happened, from all threads."""

    began_s: float = field(default_factory=time.monotonic)
    first_s: list[tuple[float, float]] = field(default_factory=list)  # when, how long
    gaps_s: list[tuple[float, float]] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    done: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)
    known: dict[tuple[str, int], str] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def now_s(self) -> float:
        return time.monotonic() - self.began_s


def run_client(address: str, log: Log, stop: threading.Event, number: int) -> None:
    """One client until it is told to stop; it thinks a moment between its requests."""
    chance = random.Random(number)
    kinds = list(KINDS)
    while not stop.wait(chance.uniform(0.0, 0.6)):
        (kind,) = chance.choices(kinds, [KINDS[kind] for kind in kinds])
        variant = chance.randrange(NUM_VARIANTS)
        name = kind.__name__
        try:
            answer = kind(Client(address, MODEL, random.Random(variant)))
        except (Failed, OSError, ValueError, LookupError) as error:
            with log.lock:
                log.failures.append(f"{log.now_s():.0f} s {name}: {error!r}")
            continue
        with log.lock:
            log.done[name] += 1
            if log.known.setdefault((name, variant), answer.text) != answer.text:
                log.changed.append(f"{name} {variant}")
            if kind is chat_stream and answer.first_s is not None:
                log.first_s.append((log.now_s(), answer.first_s))
                log.gaps_s += [(log.now_s(), gap) for gap in answer.gaps_s]


def run_reloads(address: str, log: Log, stop: threading.Event) -> None:
    """A limit goes up and down; no request may notice."""
    client = Client(address, MODEL, random.Random(0))
    num_waiting = 512
    while not stop.wait(RELOAD_S):
        num_waiting = 1024 if num_waiting == 512 else 512
        table = {"model_name": MODEL, "max_waiting": num_waiting}
        try:
            client.ask("POST", "/admin/models/reload", {"upsert": [table]})
            log.done["reload"] += 1
        except (Failed, OSError) as error:
            log.failures.append(f"{log.now_s():.0f} s reload: {error!r}")


def sample(pid: int, at_s: float) -> Sample:
    status = Path(f"/proc/{pid}/status").read_text()
    fields = dict(line.split(":", 1) for line in status.splitlines())
    return Sample(
        at_s=round(at_s, 1),
        rss_mib=round(int(fields["VmRSS"].split()[0]) / 1024, 1),
        num_descriptors=len(list(Path(f"/proc/{pid}/fd").iterdir())),
        num_threads=int(fields["Threads"]),
    )


def at_rest(address: str) -> dict[str, object]:
    """What is still under way some time after the last client has gone."""
    client = Client(address, MODEL, random.Random(0))
    deadline_s = time.monotonic() + SETTLE_S
    while True:
        (model,) = client.ask("GET", "/health")["models"]
        num_busy = model["running"] + model["waiting"]
        if num_busy == 0 or time.monotonic() > deadline_s:
            kept = client.ask("GET", "/v1/states")["data"]
            return {"running_or_waiting": num_busy, "states_kept": len(kept)}
        time.sleep(0.5)


def soak(address: str, pid: int, minutes: float, num_clients: int) -> Log:
    log, stop = Log(), threading.Event()
    threads = [
        threading.Thread(target=run_client, args=(address, log, stop, number))
        for number in range(num_clients)
    ]
    threads.append(threading.Thread(target=run_reloads, args=(address, log, stop)))
    for thread in threads:
        thread.start()
    try:
        while log.now_s() < minutes * 60:
            time.sleep(SAMPLE_S)
            log.samples.append(sample(pid, log.now_s()))
            last = log.samples[-1]
            print(
                f"\r{last.at_s / 60:5.1f} of {minutes:g} min  {sum(log.done.values())} done,"
                f" {len(log.failures)} failed  {last.rss_mib:.0f} MiB,"
                f" {last.num_descriptors} descriptors",
                end="",
                flush=True,
            )
    finally:
        print()
        stop.set()
        for thread in threads:
            thread.join()
    return log


def percentile(values: Sequence[float], percent: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))]


def windows(timed: Sequence[tuple[float, float]], length_s: float) -> list[dict[str, float]]:
    """Median and 99th percentile in milliseconds, of each tenth of the run."""
    found = []
    for number in range(NUM_WINDOWS):
        begin, end = (length_s * n / NUM_WINDOWS for n in (number, number + 1))
        values = [value for at_s, value in timed if begin <= at_s < end]
        if values:
            found.append(
                {f"p{p}": round(1e3 * percentile(values, p), 2) for p in (50, 99)}
                | {"count": len(values)}
            )
    return found


def halves(timed: Sequence[tuple[float, float]], length_s: float) -> float:
    """The 99th percentile of the second half by that of the first."""
    first = [value for at_s, value in timed if at_s < length_s / 2]
    second = [value for at_s, value in timed if at_s >= length_s / 2]
    return round(percentile(second, 99) / percentile(first, 99), 3)


def growth(samples: Sequence[Sample]) -> dict[str, float]:
    """Medians of the last tenth less those of the tenth that begins the second half."""
    half, tenth = len(samples) // 2, max(1, len(samples) // 10)
    early, late = samples[half : half + tenth], samples[-tenth:]
    return {
        name: round(
            percentile([getattr(one, name) for one in late], 50)
            - percentile([getattr(one, name) for one in early], 50),
            1,
        )
        for name in ("rss_mib", "num_descriptors", "num_threads")
    }


def plot(log: Log, length_s: float, path: Path) -> None:
    """Needs matplotlib; raises SystemExit with the command that installs it."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise SystemExit("no plot: run `pip install matplotlib`") from None
    figure = Figure(figsize=(7, 7), layout="constrained")
    memory, descriptors, times = figure.subplots(3, sharex=True)
    minutes = [one.at_s / 60 for one in log.samples]
    memory.plot(minutes, [one.rss_mib for one in log.samples])
    memory.set_ylabel("resident memory, MiB")
    descriptors.plot(minutes, [one.num_descriptors for one in log.samples], label="descriptors")
    descriptors.plot(minutes, [one.num_threads for one in log.samples], label="threads")
    descriptors.legend()
    for name, timed in (("first token", log.first_s), ("between tokens", log.gaps_s)):
        found = windows(timed, length_s)
        middles = [(n + 0.5) * length_s / NUM_WINDOWS / 60 for n in range(len(found))]
        for key, style in (("p50", "o-"), ("p99", "s--")):
            times.plot(middles, [one[key] for one in found], style, label=f"{name}, {key}")
    times.set_ylabel("milliseconds")
    times.set_yscale("log")
    times.set_xlabel("minutes")
    times.legend(fontsize=8)
    for axes in (memory, descriptors):
        axes.set_ylim(bottom=0)
    for axes in (memory, descriptors, times):
        axes.grid(visible=True, alpha=0.3)
    figure.savefig(path, dpi=120, metadata={"Software": None})


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--num-clients", type=int, default=12)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="sets")
    parser.add_argument("--save", action="store_true", help="append to benchmarks/results/, plot")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shutil.copytree(PROJECT / "config", folder / "config")  # reloads write to it
        sets = ["device_type=cpu", f"state_dir={folder / 'states'}", "disk_state_mib=64"]
        server = our_server("ours", MODEL, MODEL, folder / "config", sets + args.sets, folder / "l")
        with server:
            before = sample(server.pid, 0.0)
            log = soak(server.address, server.pid, args.minutes, args.num_clients)
            rest = at_rest(server.address)
            after = sample(server.pid, log.now_s())
        num_tracebacks = (folder / "l").read_text().count("Traceback")
    length_s = log.samples[-1].at_s
    figures: dict[str, object] = {
        "minutes": round(length_s / 60, 1),
        "clients": args.num_clients,
        "done": dict(log.done),
        "failed": len(log.failures),
        "answers_changed": len(log.changed),
        "answers_compared": sum(log.done.values()) - len(log.known),
        "tracebacks": num_tracebacks,
        "before": asdict(before),
        "after": asdict(after),
        "at_rest": rest,
        "growth_in_second_half": growth(log.samples),
        "first_token_ms": windows(log.first_s, length_s),
        "between_tokens_ms": windows(log.gaps_s, length_s),
        "first_token_p99_ratio_of_halves": halves(log.first_s, length_s),
        "between_tokens_p99_ratio_of_halves": halves(log.gaps_s, length_s),
    }
    for label, value in figures.items():
        print(f"{label:36}{value}")
    for line in (log.failures + log.changed)[:MAX_SHOWN]:
        print(line)
    if args.save:
        plot(log, length_s, RESULTS / "soak.png")
    finish("soak", figures, save=args.save)
    has_failed = log.failures or num_tracebacks or any(rest.values())
    return 1 if has_failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
