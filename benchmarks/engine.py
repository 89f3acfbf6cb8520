"""Offline throughput of the engine, without HTTP, beside the `rwkv` package on the same weights.

    python -m benchmarks.engine [--infer-cfg rwkv-lm-tiny] [--set key=value] [--save]

Decode: N requests of 16 prompt tokens, all running together. Prefill: one prompt of 1,024
tokens. The peer runs in the same process, before and after ours, so that the ratio holds on a
machine whose speed drifts; it has no batching, so its rate at N is its rate at 1.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.record import finish
from config import load_infer
from engine.engine import Engine, build
from engine.loading import load
from engine.model.rwkv7 import RWKV7
from engine.types import SamplingParams

PROMPT_LEN, LONG_PROMPT_LEN = 16, 1024


def peer(model: RWKV7) -> Any:
    """The `rwkv` package in float32 with the weights of `model`."""
    os.environ.update(RWKV_V7_ON="1", RWKV_JIT_ON="1", RWKV_CUDA_ON="0")
    quiet = contextlib.redirect_stdout(None)  # it prints every tensor it loads
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(), quiet:
        warnings.simplefilter("ignore")
        from rwkv.model import RWKV

        torch.save(model.state_dict(), Path(folder) / "weights.pth")
        return RWKV(model=str(Path(folder) / "weights"), strategy="cpu fp32")


def seconds(action: Callable[[], object]) -> float:
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def peer_rates(oracle: Any, num_tokens: int) -> tuple[float, float]:
    """Decode and prefill tokens per second of the peer."""
    state = oracle.forward(list(range(1, PROMPT_LEN + 1)), None)[1]

    def decode() -> None:
        nonlocal state
        for _ in range(num_tokens):
            logits, state = oracle.forward([5], state)
            int(logits.argmax())

    decode_s = seconds(decode)
    prompt = [1 + i % 200 for i in range(LONG_PROMPT_LEN)]
    prefill_s = seconds(lambda: oracle.forward(prompt, None))
    return num_tokens / decode_s, LONG_PROMPT_LEN / prefill_s


async def decode_rate(engine: Engine, num_requests: int, num_tokens: int) -> float:
    """Output tokens per second of N requests that start together."""
    params = SamplingParams(temperature=0.0, max_tokens=num_tokens, stop_token_ids=())

    async def one(index: int) -> int:
        prompt = [1 + (index + i) % 200 for i in range(PROMPT_LEN)]
        return sum([len(d.token_ids) async for d in engine.generate(prompt, params)])

    started = time.perf_counter()
    counts = await asyncio.gather(*(one(i) for i in range(num_requests)))
    elapsed = time.perf_counter() - started
    assert counts == [num_tokens] * num_requests, counts
    return sum(counts) / elapsed


async def prefill_rate(engine: Engine) -> float:
    """Prompt tokens per second of one long prompt, its first token included."""
    params = SamplingParams(temperature=0.0, max_tokens=1, stop_token_ids=())
    prompt = [1 + i % 200 for i in range(LONG_PROMPT_LEN)]
    started = time.perf_counter()
    async for _ in engine.generate(prompt, params):
        pass
    return LONG_PROMPT_LEN / (time.perf_counter() - started)


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--config-dir", type=Path, default=Path("config"))
    parser.add_argument("--infer-cfg", default="rwkv-lm-tiny")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="sets")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--tokens", type=int, default=64, help="tokens per request")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--save", action="store_true", help="append to benchmarks/results/")
    args = parser.parse_args()

    table = load_infer(args.config_dir, args.infer_cfg, args.sets).models[0]
    core = build(table)
    oracle = peer(load(table, torch.device("cpu"), torch.float32))
    peers, decode, prefill = [], dict[int, list[float]](), list[float]()
    async with Engine(core) as engine:
        for _ in range(args.rounds):
            peers.append(peer_rates(oracle, args.tokens))
            for batch in args.batches:
                rate = await decode_rate(engine, batch, args.tokens)
                decode.setdefault(batch, []).append(rate)
            prefill.append(await prefill_rate(engine))
        peers.append(peer_rates(oracle, args.tokens))
    peer_decode, peer_prefill = (statistics.median(x) for x in zip(*peers, strict=True))

    rows: dict[str, object] = {"model": table.model_name, "torch_threads": torch.get_num_threads()}
    print(f"{'':24}{'ours tok/s':>12}{'rwkv pkg':>12}{'ratio':>8}")
    for name, rates, other in [
        *((f"decode, batch {batch}", decode[batch], peer_decode) for batch in args.batches),
        (f"prefill, {LONG_PROMPT_LEN} tokens", prefill, peer_prefill),
    ]:
        rate = statistics.median(rates)
        print(f"{name:24}{rate:12.0f}{other:12.0f}{rate / other:8.2f}")
        rows[name] = {"tokens_per_s": round(rate, 1), "ratio_to_rwkv_package": rate / other}
    finish("engine", rows, save=args.save)


if __name__ == "__main__":
    asyncio.run(main())
