"""GET /metrics: statistics and gauges as Prometheus text. The only importer of its client.

Everything is pulled: families are made when somebody asks. Most have two names with the same
values: ours, and the `vllm:` one that published dashboards and inference gateways read.
"""

from __future__ import annotations

import asyncio
import platform
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from api.about import own_version
from api.loop_lag import lag_histogram
from api.stats import Histogram, ModelStats
from engine.types import CacheStats, EngineSnapshot

Replicas = Sequence[EngineSnapshot]  # of one model: the active one, and those being retired
Snapshots = Callable[[], Mapping[str, Replicas]]

OWN, VLLM = "rwkv_", "vllm:"
# vLLM counts engines; here one model has one.
LABELS_OF_PREFIX = {OWN: {}, VLLM: {"engine": "0"}}


@dataclass(frozen=True, slots=True)
class Series:
    """What a family is called, without prefix; None where a set of names lacks it."""

    own: str | None
    vllm: str | None
    doc: str

    def names(self, prefixes: Sequence[str]) -> Iterator[tuple[str, dict[str, str]]]:
        for prefix, name in ((OWN, self.own), (VLLM, self.vllm)):
            if name is not None and prefix in prefixes:
                yield prefix + name, LABELS_OF_PREFIX[prefix]


GAUGES: tuple[tuple[Series, Callable[[Replicas], float]], ...] = (
    (
        Series("requests_running", "num_requests_running", "Requests being computed."),
        lambda replicas: sum(replica.num_running for replica in replicas),
    ),
    (
        Series("requests_waiting", "num_requests_waiting", "Requests waiting for a slot."),
        lambda replicas: sum(replica.num_waiting for replica in replicas),
    ),
    (
        Series(None, "kv_cache_usage_perc", "Used share of the state slots, 0 to 1."),
        lambda replicas: _num_used(replicas) / max(1, _num_slots(replicas)),
    ),
    (
        Series("snapshots", None, "States kept for prompts that begin alike."),
        lambda replicas: sum(replica.cache.num_snapshots for replica in replicas),
    ),
    (
        Series("replica_up", None, "1 while the replica can compute."),
        lambda replicas: 0 if any(replica.is_dead for replica in replicas) else 1,
    ),
    (
        Series("seconds_since_commit", None, "Age of the step in flight; 0 when idle."),
        lambda replicas: max(replica.seconds_since_commit or 0 for replica in replicas),
    ),
)
# Of the replicas there are: they begin again with a new one, as counters may.
CACHE_COUNTERS: tuple[tuple[Series, Callable[[Replicas], float]], ...] = (
    (
        Series("prefix_cache_queries", "prefix_cache_queries", "Prompt tokens looked up."),
        lambda replicas: sum(replica.cache.num_queried_tokens for replica in replicas),
    ),
    (
        Series("prefix_cache_hits", "prefix_cache_hits", "Prompt tokens taken from a snapshot."),
        lambda replicas: sum(replica.cache.num_hit_tokens for replica in replicas),
    ),
    (
        Series("snapshot_evictions", None, "Snapshots given up for room."),
        lambda replicas: sum(replica.cache.num_evictions for replica in replicas),
    ),
    (
        Series("preemptions", "num_preemptions", "Running sequences that gave way to others."),
        lambda replicas: sum(replica.cache.num_preemptions for replica in replicas),
    ),
)
COUNTERS: tuple[tuple[Series, Callable[[ModelStats], float]], ...] = (
    (
        Series("prompt_tokens", "prompt_tokens", "Prompt tokens computed."),
        lambda stats: stats.num_prompt_tokens,
    ),
    (
        Series("generation_tokens", "generation_tokens", "Tokens generated."),
        lambda stats: stats.num_generation_tokens,
    ),
)
HISTOGRAMS: tuple[tuple[Series, Callable[[ModelStats], Histogram]], ...] = (
    (
        Series(
            "time_to_first_token_seconds", "time_to_first_token_seconds", "Arrival to first token."
        ),
        lambda stats: stats.time_to_first_token,
    ),
    (
        Series(
            "inter_token_latency_seconds",
            "inter_token_latency_seconds",
            "Between two tokens of a request.",
        ),
        lambda stats: stats.inter_token,
    ),
    (
        Series("request_latency_seconds", "e2e_request_latency_seconds", "Arrival to last token."),
        lambda stats: stats.latency,
    ),
    (
        Series("queue_time_seconds", "request_queue_time_seconds", "Arrival to the first step."),
        lambda stats: stats.queue,
    ),
    (
        Series(
            "prefill_time_seconds", "request_prefill_time_seconds", "First step to first token."
        ),
        lambda stats: stats.prefill,
    ),
    (
        Series(None, "request_decode_time_seconds", "First to last token."),
        lambda stats: stats.decode,
    ),
    (
        Series("step_duration_seconds", None, "One forward pass on the device."),
        lambda stats: stats.step,
    ),
    (
        Series(None, "request_prompt_tokens", "Prompt tokens of a request."),
        lambda stats: stats.prompt_tokens,
    ),
    (
        Series(None, "request_generation_tokens", "Tokens generated for a request."),
        lambda stats: stats.generation_tokens,
    ),
    (
        Series(None, "iteration_tokens_total", "Tokens in one step."),
        lambda stats: stats.step_tokens,
    ),
)
TIERS: Mapping[str, Callable[[CacheStats], int]] = {
    "device": lambda cache: cache.num_device_pages,
    "host": lambda cache: cache.num_host_pages,
    "disk": lambda cache: cache.num_disk_pages,
}
MOVES: Mapping[str, Callable[[CacheStats], int]] = {
    "store": lambda cache: cache.num_stores,
    "load": lambda cache: cache.num_loads,
    "write": lambda cache: cache.num_disk_writes,
    "read": lambda cache: cache.num_disk_reads,
}
REQUESTS = Series("requests", "request_success", "Finished requests.")


class Metrics:
    """All models' statistics and the server's own. `snapshots` gives the gauges when asked."""

    def __init__(self, snapshots: Snapshots, *, has_vllm_names: bool) -> None:
        self._stats: dict[str, ModelStats] = {}
        self._reloads: Counter[str] = Counter({"applied": 0, "rejected": 0})
        self.loop_lag = lag_histogram()
        self._snapshots = snapshots
        self._prefixes = (OWN, VLLM) if has_vllm_names else (OWN,)
        self._process = ProcessCollector(registry=None)

    def sink(self, model_name: str) -> ModelStats:
        """Where the replicas of that model report to."""
        return self._stats.setdefault(model_name, ModelStats())

    def count_reload(self, result: str) -> None:
        self._reloads[result] += 1

    async def render(self) -> bytes:
        """Prometheus text format 0.0.4, of this moment. Written in a thread: it takes some ms."""
        scrape = Scrape(
            stats=deepcopy(self._stats),
            reloads=dict(self._reloads),
            loop_lag=deepcopy(self.loop_lag),
            snapshots=self._snapshots(),
            prefixes=self._prefixes,
            num_tasks=len(asyncio.all_tasks()),
        )
        return await asyncio.to_thread(self._text, scrape)

    def _text(self, scrape: Scrape) -> bytes:
        registry = CollectorRegistry()
        for collector in (scrape, self._process):
            registry.register(collector)
        return generate_latest(registry)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)  # a registry keys by identity
class Scrape(Collector):
    """Copies of everything, to be read in a thread while the engines go on."""

    stats: Mapping[str, ModelStats]
    reloads: Mapping[str, int]
    loop_lag: Histogram
    snapshots: Mapping[str, Replicas]
    prefixes: Sequence[str]
    num_tasks: int

    def collect(self) -> Iterator[Metric]:
        yield _build_info()
        tasks = GaugeMetricFamily("rwkv_tasks", "Tasks of the event loop, two for each request.")
        tasks.add_metric([], self.num_tasks)
        yield tasks
        reloads = CounterMetricFamily("rwkv_reloads", "Configuration reloads.", labels=["result"])
        for result, count in self.reloads.items():
            reloads.add_metric([result], count)
        yield reloads
        lag = HistogramMetricFamily(
            "rwkv_event_loop_lag_seconds", "How late the event loop was, 20 times a second."
        )
        lag.add_metric([], self.loop_lag.buckets(), self.loop_lag.total)
        yield lag
        yield from self._gauges()
        yield from self._counters()
        yield from self._histograms()

    def _gauges(self) -> Iterator[Metric]:
        for series, read in GAUGES:
            for name, labels in series.names(self.prefixes):
                gauge = GaugeMetricFamily(name, series.doc, labels=["model_name", *labels])
                for model_name, replicas in self.snapshots.items():
                    gauge.add_metric([model_name, *labels.values()], read(replicas))
                yield gauge
        slots = GaugeMetricFamily(
            "rwkv_state_slots", "State slots on the device.", labels=["model_name", "use"]
        )
        for model_name, replicas in self.snapshots.items():
            num_used = _num_used(replicas)
            slots.add_metric([model_name, "used"], num_used)
            slots.add_metric([model_name, "free"], _num_slots(replicas) - num_used)
        yield slots
        pages = GaugeMetricFamily(
            "rwkv_state_pages", "States that lie in a tier.", labels=["model_name", "tier"]
        )
        for model_name, replicas in self.snapshots.items():
            for tier, num_pages in TIERS.items():
                pages.add_metric([model_name, tier], sum(num_pages(r.cache) for r in replicas))
        yield pages

    def _counters(self) -> Iterator[Metric]:
        for series, read_all in CACHE_COUNTERS:
            for name, labels in series.names(self.prefixes):
                counter = CounterMetricFamily(name, series.doc, labels=["model_name", *labels])
                for model_name, replicas in self.snapshots.items():
                    counter.add_metric([model_name, *labels.values()], read_all(replicas))
                yield counter
        moves = CounterMetricFamily(
            "rwkv_page_moves", "States copied between tiers.", labels=["model_name", "kind"]
        )
        for model_name, replicas in self.snapshots.items():
            for kind, num_moves in MOVES.items():
                moves.add_metric([model_name, kind], sum(num_moves(r.cache) for r in replicas))
        yield moves
        for series, read in COUNTERS:
            for name, labels in series.names(self.prefixes):
                counter = CounterMetricFamily(name, series.doc, labels=["model_name", *labels])
                for model_name, stats in self.stats.items():
                    counter.add_metric([model_name, *labels.values()], read(stats))
                yield counter
        for name, labels in REQUESTS.names(self.prefixes):
            reason_label = "finished_reason" if name.startswith(VLLM) else "finish_reason"
            label_names = ["model_name", *labels, reason_label]
            ends = CounterMetricFamily(name, REQUESTS.doc, labels=label_names)
            for model_name, stats in self.stats.items():
                for reason, count in stats.ends.items():
                    ends.add_metric([model_name, *labels.values(), reason], count)
            yield ends
        rows = CounterMetricFamily(
            "rwkv_step_rows", "Rows of executed steps.", labels=["model_name", "kind"]
        )
        for model_name, stats in self.stats.items():
            for kind, count in stats.rows.items():
                rows.add_metric([model_name, kind], count)
        yield rows

    def _histograms(self) -> Iterator[Metric]:
        for series, read in HISTOGRAMS:
            for name, labels in series.names(self.prefixes):
                family = HistogramMetricFamily(name, series.doc, labels=["model_name", *labels])
                for model_name, stats in self.stats.items():
                    histogram = read(stats)
                    family.add_metric(
                        [model_name, *labels.values()], histogram.buckets(), histogram.total
                    )
                yield family


def _num_slots(replicas: Replicas) -> int:
    return sum(replica.num_slots for replica in replicas)


def _num_used(replicas: Replicas) -> int:
    return _num_slots(replicas) - sum(replica.num_free_slots for replica in replicas)


def _build_info() -> GaugeMetricFamily:
    labels = {"version": own_version(), "python": platform.python_version()}
    family = GaugeMetricFamily("rwkv_build_info", "What runs here.", labels=list(labels))
    family.add_metric(list(labels.values()), 1)
    return family
