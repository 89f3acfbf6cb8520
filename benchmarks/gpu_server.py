"""The whole server under load, as a process of its own, with random weights.

Clients ask for the next answer as soon as they have one: a closed loop, which finds the rate that
the server sustains. Rates of arrival are what `benchmarks.serve` is for.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from benchmarks.gpu_device import Bench, Row
from benchmarks.serve_open import QUESTIONS, Outcome, chat, percentiles
from benchmarks.served import our_server

CONFIG_DIR = Path(__file__).parents[1] / "config"
NAMES = {"tiny": "rwkv-lm-tiny", "0.1b": "rwkv7-g1-0.1b", "1.5b": "rwkv7-g1-1.5b"}


def server_rows(bench: Bench) -> Iterator[Row]:
    torch.cuda.empty_cache()  # the device is the server's as well; nothing to do on a CPU
    for name in ("tiny",) if bench.is_tiny else ("0.1b", "1.5b"):
        sets = ["load_format=dummy", f"device_type={bench.device.type}"]
        if not bench.is_tiny:
            sets += ["max_batch_size=256", "max_context_len=0", "host_state_mib=256"]
        with TemporaryDirectory() as folder:
            log = Path(folder) / "log"
            server = our_server("ours", NAMES[name], f"rwkv-lm-{name}", CONFIG_DIR, sets, log)
            with server:
                url = f"http://{server.address}"
                sizes = ((1, 1, 3), (4, 1, 3)) if bench.is_tiny else ((1, 2, 128), (256, 2, 128))
                asyncio.run(_clients(url, NAMES[name], 1, 1, 2))
                for num_clients, num_answers, max_tokens in sizes:
                    started = time.perf_counter()
                    asked = _clients(url, NAMES[name], num_clients, num_answers, max_tokens)
                    outcomes = asyncio.run(asked)
                    elapsed = time.perf_counter() - started
                    yield {"name": "server", "model": name, "clients": num_clients,
                           **figures(outcomes, elapsed)}  # fmt: skip


async def _clients(
    url: str, model: str, num_clients: int, num_answers: int, max_tokens: int
) -> list[Outcome]:
    async def client(number: int) -> list[Outcome]:
        question = QUESTIONS[number % len(QUESTIONS)]
        return [await chat(url, model, question, max_tokens, number) for _ in range(num_answers)]

    found = await asyncio.gather(*(client(number) for number in range(num_clients)))
    return [outcome for outcomes in found for outcome in outcomes]


def figures(outcomes: list[Outcome], elapsed_s: float) -> Row:
    good = [outcome for outcome in outcomes if outcome.status == 200]
    first = [o.first_token_s for o in good if o.first_token_s == o.first_token_s]
    return {
        "tokens_per_s": sum(outcome.num_tokens for outcome in good) / elapsed_s,
        "first_token_ms": percentiles(first),
        "inter_token_ms": percentiles([t for o in good for t in o.inter_token_s]),
        "requests": len(outcomes),
        "is_right": len(good) == len(outcomes),
    }
