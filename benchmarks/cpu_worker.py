"""One engine in a process of its own, which computes the cases that it is told, line by line.

    python -m benchmarks.cpu_worker ours|llama.cpp|rwkv|floor WEIGHTS DTYPE --threads 2

Reads "b8" (a step of 8 sequences) or "prefill512" and writes one JSON line, tokens per second:
of the fastest of some steps, since on a shared machine the others tell of the neighbours.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np

PROMPT_LEN = 16
CHUNK_LEN = 256  # as the engine cuts prompts
MAX_BATCH = 64
NUM_STEPS = {1: 24, 8: 12, 32: 8, 64: 6}

Case = Callable[[], int]  # does the work of one step or prompt; how many tokens that was


def ours(weights: Path, dtype: str, num_threads: int) -> Callable[[str], Case]:
    """The model as StepExecutor calls it: hidden rows, logits of those that draw, the draws."""
    import torch

    from engine.host_sampler import HostSampler
    from engine.kernels.backend import Batch
    from engine.model.fused import FusedRWKV7
    from engine.model.pack import pack
    from engine.model.weights import dims_of, load_checkpoint
    from engine.types import SamplingParams

    torch.set_num_threads(1)
    tensors = load_checkpoint(weights)
    dims = dims_of(tensors, weights)
    model = FusedRWKV7(dims, pack(tensors, dims, dtype, num_threads), num_threads)
    state = model.new_state(MAX_BATCH + 1)
    sampler = HostSampler(MAX_BATCH, (), num_threads)
    for seat in range(MAX_BATCH):
        sampler.start(seat, SamplingParams(temperature=0.0))

    def feed(ids: Any, lengths: tuple[int, ...], src: Any, dst: Any) -> Any:
        hidden, size = model(ids, Batch(lengths, src, dst), state), len(lengths)
        if len(ids) > size:
            hidden = hidden[torch.tensor(lengths).cumsum(0) - 1]
        none = [None] * size
        logits, seats = model.head(hidden), range(size)
        tokens = sampler.draw(logits, seats, seats, masks=none, penalties=none, is_sound=none)
        return torch.tensor(tokens)

    def case(name: str) -> Case:
        if name.startswith("prefill"):
            ids, slot = torch.arange(1, 1 + int(name[7:])), torch.tensor([1])

            def prompt() -> int:
                source = slot * 0
                for part in ids.split(CHUNK_LEN):
                    model(part, Batch((len(part),), source, slot), state)
                    source = slot
                return len(ids)

            return prompt
        size = int(name[1:])
        slots = torch.arange(1, size + 1)
        ids = torch.arange(size).repeat_interleave(PROMPT_LEN) + 1
        found = [feed(ids, (PROMPT_LEN,) * size, slots * 0, slots)]

        def step() -> int:
            found[0] = feed(found[0], (1,) * size, slots, slots)
            return size

        return step

    return case


def llama(gguf: Path, num_threads: int) -> Callable[[str], Case]:
    from benchmarks.cpu_llama import LlamaModel

    model = LlamaModel(gguf, MAX_BATCH, num_threads)

    def case(name: str) -> Case:
        model.forget()
        if name.startswith("prefill"):
            ids = list(range(1, 1 + int(name[7:])))

            def prompt() -> int:
                model.forget()
                model.feed([ids])
                return len(ids)

            return prompt
        size = int(name[1:])
        for first in range(PROMPT_LEN):
            model.feed([[1 + first + seq] for seq in range(size)])
        found = [[5]] * size

        def step() -> int:
            nonlocal found
            found = [[int(row.argmax())] for row in model.feed(found)]
            return size

        return step

    return case


def rwkv(weights: Path, num_threads: int) -> Callable[[str], Case]:
    """The `rwkv` package in float32: it has no batches, so a step of 8 is 8 steps."""
    os.environ.update(RWKV_V7_ON="1", RWKV_JIT_ON="1", RWKV_CUDA_ON="0")
    import torch

    with warnings.catch_warnings(), redirect_stdout(sys.stderr):
        warnings.simplefilter("ignore")
        from rwkv.model import RWKV

        torch.set_num_threads(num_threads)
        model: Any = RWKV(model=str(weights.with_suffix("")), strategy="cpu fp32")

    def case(name: str) -> Case:
        if name.startswith("prefill"):
            ids = list(range(1, 1 + int(name[7:])))

            def prompt() -> int:
                model.forward(ids, None)
                return len(ids)

            return prompt
        size = int(name[1:])
        states = [model.forward(list(range(1, PROMPT_LEN + 1)), None)[1] for _ in range(size)]

        def step() -> int:
            for i, state in enumerate(states):
                logits, states[i] = model.forward([5], state)
                int(logits.argmax())
            return size

        return step

    return case


def rate(case: Case, name: str) -> float:
    """Tokens per second of the fastest step."""
    case()
    num_steps = 3 if name.startswith("prefill") else NUM_STEPS.get(int(name[1:]), 6)
    best = 0.0
    for _ in range(num_steps):
        started = time.perf_counter()
        num_tokens = case()
        best = max(best, num_tokens / (time.perf_counter() - started))
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("engine", choices=["ours", "llama.cpp", "rwkv", "limits"])
    parser.add_argument("weights", type=Path)
    parser.add_argument("dtype")
    parser.add_argument("--threads", type=int, required=True)
    args = parser.parse_args()
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # llama.cpp talks
    if args.engine == "limits":
        from benchmarks.cpu_limits import limits

        for _ in sys.stdin:
            print(json.dumps(limits(args.threads)), file=answers, flush=True)
        return
    if args.engine == "ours":
        cases = ours(args.weights, args.dtype, args.threads)
    elif args.engine == "llama.cpp":
        cases = llama(args.weights, args.threads)
    else:
        cases = rwkv(args.weights, args.threads)
    for line in sys.stdin:
        name = line.strip()
        print(json.dumps(float(np.round(rate(cases(name), name), 2))), file=answers, flush=True)


if __name__ == "__main__":
    main()
