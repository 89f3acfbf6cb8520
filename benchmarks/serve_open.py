"""An open loop against our server: requests start on a clock, not when earlier ones end.

So a slow server cannot hide behind its own slowness. The reference of the same run is one client
alone (rate zero): its inter-token latency is what the model costs, the rest is what sharing and
HTTP add.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import re
import subprocess
import sys
import time
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import orjson

QUESTIONS = (
    "Hello! How are you?",
    "Tell me a short story about a cat.",
    "What do you like to do on the weekend?",
    "Do you have any pets? I have two dogs and a very old fish.",
)


@dataclass(slots=True)
class Outcome:
    """Times of one request in seconds, as its client saw them."""

    status: int = 0
    first_token_s: float = float("nan")
    total_s: float = float("nan")
    inter_token_s: list[float] = field(default_factory=list)
    num_tokens: int = 0


async def chat(url: str, model: str, question: str, max_tokens: int, seed: int) -> Outcome:
    """One streamed chat over a plain socket: no client library between the clock and the wire."""
    address = urlsplit(url)
    body = orjson.dumps(
        {
            "model": model,
            "messages": [{"role": "user", "content": question}],
            "max_tokens": max_tokens,
            "temperature": 1.0,
            "top_p": 0.5,
            "seed": seed,
            "stream": True,
            "stop": [],
            "stream_options": {"include_usage": True},
        }
    )
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: {address.netloc}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        "Connection: close\r\n\r\n"
    )
    outcome = Outcome()
    started = last = time.perf_counter()
    reader, writer = await asyncio.open_connection(address.hostname, address.port)
    try:
        writer.write(head.encode() + body)
        outcome.status = int((await reader.readline()).split()[1])
        async for line in reader:
            if not line.startswith(b"data: {"):
                continue
            event = orjson.loads(line[6:])
            if event.get("usage"):
                outcome.num_tokens = event["usage"]["completion_tokens"]
            if not event["choices"] or not event["choices"][0]["delta"].get("content"):
                continue
            now = time.perf_counter()
            if outcome.first_token_s != outcome.first_token_s:
                outcome.first_token_s = now - started
            else:
                outcome.inter_token_s.append(now - last)
            last = now
    finally:
        writer.close()
    outcome.total_s = time.perf_counter() - started
    return outcome


def percentiles(values: list[float]) -> dict[str, float]:
    """Milliseconds at 50, 90 and 99 percent."""
    ordered = sorted(values)
    return {
        f"p{p}": round(1e3 * ordered[min(len(ordered) - 1, len(ordered) * p // 100)], 2)
        for p in (50, 90, 99)
        if ordered
    }


async def arrivals(args: argparse.Namespace, url: str) -> list[Outcome]:
    """Start a request at each tick of a Poisson clock, and wait for all of them."""
    clock = random.Random(args.seed)
    tasks: list[asyncio.Task[Outcome]] = []
    begin = due = time.perf_counter()
    while due < begin + args.seconds:
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        question = QUESTIONS[len(tasks) % len(QUESTIONS)]
        request = chat(url, args.model, question, args.max_tokens, seed=len(tasks))
        tasks.append(asyncio.create_task(request))
        due += clock.expovariate(args.rate)
    return await asyncio.gather(*tasks)


def start_server(args: argparse.Namespace) -> tuple[subprocess.Popen[str], str]:
    command = [sys.executable, "-m", "api", "--infer-cfg", args.model]
    command += ["--http-bind-addr", "127.0.0.1:0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if found := re.search(r"http://[\d.]+:\d+", line):
            return process, found.group()
    raise SystemExit(f"the server ended with code {process.wait()}")


async def figures_of(args: argparse.Namespace, url: str) -> dict[str, object]:
    alone = [await chat(url, args.model, q, args.max_tokens, seed=1) for q in QUESTIONS]
    started = time.perf_counter()
    outcomes = await arrivals(args, url)
    elapsed = time.perf_counter() - started
    good = [o for o in outcomes if o.status == 200]
    alone_itl = percentiles([t for o in alone for t in o.inter_token_s])
    itl = percentiles([t for o in good for t in o.inter_token_s])
    return {
        "model": args.model,
        "arrivals_per_s": args.rate,
        "requests": len(outcomes),
        "failed": len(outcomes) - len(good),
        "output_tokens_per_s": round(sum(o.num_tokens for o in good) / elapsed, 1),
        "time_to_first_token_ms": percentiles([o.first_token_s for o in good]),
        "inter_token_ms": itl,
        "latency_ms": percentiles([o.total_s for o in good]),
        "alone_time_to_first_token_ms": percentiles([o.first_token_s for o in alone]),
        "alone_inter_token_ms": alone_itl,
        "inter_token_p50_ratio_to_alone": round(itl["p50"] / alone_itl["p50"], 2),
    }


def measure(args: argparse.Namespace) -> dict[str, object]:
    """Of the server at --url, or of one that is started here as a process of its own."""
    process, url = (None, args.url) if args.url else start_server(args)
    try:
        return asyncio.run(figures_of(args, url))
    finally:
        if process is not None:
            process.terminate()
            process.wait(timeout=60)
