"""What /metrics says, against a parser of the format and against what was asked."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from api.stats import Histogram
from tests.api.harness import Running, eventually, model_table, running


async def scrape(server: Running) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """Every sample, by name and sorted labels."""
    reply = await server.get("/metrics")
    assert reply.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(reply.body.decode())
        for sample in family.samples
    }


def own(name: str, **labels: str) -> tuple[str, tuple[tuple[str, str], ...]]:
    return f"rwkv_{name}", tuple(sorted({"model_name": "m", **labels}.items()))


def vllm(name: str, **labels: str) -> tuple[str, tuple[tuple[str, str], ...]]:
    return f"vllm:{name}", tuple(sorted({"model_name": "m", "engine": "0", **labels}.items()))


async def test_counts_are_those_of_the_answers(tmp_path: Path):
    async with running(tmp_path) as server:
        answers = [(await server.chat(max_tokens=number)).json() for number in (1, 5, 9)]
        answers.append((await server.chat(max_tokens=30, stop=["t"])).json())
        found = await scrape(server)
    usage = [answer["usage"] for answer in answers]
    num_generated = sum(item["completion_tokens"] for item in usage)
    assert found[own("generation_tokens_total")] == num_generated
    assert found[own("prompt_tokens_total")] == sum(item["prompt_tokens"] for item in usage)
    assert found[own("requests_total", finish_reason="length")] == 3
    assert found[own("requests_total", finish_reason="stop")] == 1
    assert found[own("time_to_first_token_seconds_count")] == 4
    assert found[own("inter_token_latency_seconds_count")] == num_generated - 4
    assert found[own("request_latency_seconds_count")] == 4
    assert found[own("step_rows_total", kind="prefill")] >= 4
    assert found[own("state_slots", use="free")] == 8
    assert found[own("replica_up")] == 1


async def test_vllm_names_have_the_same_values(tmp_path: Path):
    async with running(tmp_path) as server:
        await server.chat()
        found = await scrape(server)
    pairs = {
        "num_requests_running": "requests_running",
        "num_requests_waiting": "requests_waiting",
        "prompt_tokens_total": "prompt_tokens_total",
        "generation_tokens_total": "generation_tokens_total",
        "time_to_first_token_seconds_sum": "time_to_first_token_seconds_sum",
        "inter_token_latency_seconds_count": "inter_token_latency_seconds_count",
        "e2e_request_latency_seconds_sum": "request_latency_seconds_sum",
        "request_queue_time_seconds_sum": "queue_time_seconds_sum",
        "request_prefill_time_seconds_sum": "prefill_time_seconds_sum",
    }
    for theirs, ours in pairs.items():
        assert found[vllm(theirs)] == found[own(ours)], theirs
    assert found[vllm("request_success_total", finished_reason="length")] == 1
    assert found[vllm("request_generation_tokens_sum")] == 5
    assert vllm("inter_token_latency_seconds_bucket", le="0.025") in found


async def test_vllm_names_can_be_switched_off(tmp_path: Path):
    async with running(tmp_path, enable_vllm_metrics=False) as server:
        await server.chat()
        found = await scrape(server)
    assert not [name for name, _ in found if name.startswith("vllm:")]
    assert found[own("generation_tokens_total")] == 5


async def test_gauges_show_what_runs_and_waits_now(tmp_path: Path):
    async with running(tmp_path, model_table(max_batch_size=2)) as server:
        server.runner.gate.clear()
        connections = [await server.open() for _ in range(3)]
        for _, writer in connections:
            body = b'{"model": "m", "prompt": "x"}'
            writer.write(
                b"POST /v1/completions HTTP/1.1\r\nHost: t\r\nContent-Type: application/json\r\n"
                b"Content-Length: %d\r\n\r\n%b" % (len(body), body)
            )
        await eventually(lambda: server.snapshot().num_waiting == 1)
        found = await scrape(server)
        for _, writer in connections:
            writer.close()
        await eventually(lambda: server.snapshot().num_running == 0)
        after = await scrape(server)
    assert found[own("requests_running")] == 2
    assert found[own("requests_waiting")] == 1
    assert found[own("state_slots", use="used")] == 2
    assert found[vllm("kv_cache_usage_perc")] == 1
    assert found[own("seconds_since_commit")] > 0
    assert after[own("requests_running")] == 0
    assert after[own("requests_total", finish_reason="abort")] == 3


async def test_counters_survive_a_rebuild(tmp_path: Path):
    async with running(tmp_path) as server:
        await server.chat()
        await server.post(
            "/admin/models/reload", {"upsert": [{"model_name": "m", "max_batch_size": 3}]}
        )
        await server.chat()
        await eventually(lambda: len(server.service.registry.snapshots()["m"]) == 1)
        found = await scrape(server)
    assert found[own("generation_tokens_total")] == 10
    assert found[own("state_slots", use="free")] == 3


def test_histogram_counts_a_value_at_its_bound_below_it():
    histogram = Histogram((1.0, 2.0))
    for value in (0.5, 1.0, 1.5, 2.0, 99.0):
        histogram.observe(value)
    assert histogram.buckets() == [("1.0", 2), ("2.0", 4), ("+Inf", 5)]
    assert histogram.total == 104.0


async def test_loop_that_is_held_up_shows_its_lag(tmp_path: Path):
    async with running(tmp_path) as server:
        await eventually(lambda: sum(server.service.metrics.loop_lag.counts) > 0)
        await asyncio.sleep(0)
        time.sleep(0.6)  # noqa: ASYNC251 (the fault)
        await eventually(lambda: server.service.metrics.loop_lag.total > 0.5)
        found = await scrape(server)
    num_all = found["rwkv_event_loop_lag_seconds_count", ()]
    assert num_all > found["rwkv_event_loop_lag_seconds_bucket", (("le", "0.5"),)]
    assert found["rwkv_event_loop_lag_seconds_sum", ()] > 0.5
