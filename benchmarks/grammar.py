"""What following a grammar costs the device thread, beside drawing without one.

    python -m benchmarks.grammar [--vocab rwkv_vocab_v20230424] [--save]

Random logits, so the texts are nonsense of the right form: every state of the grammar comes up.
A step of a batch draws one token per row; with a grammar it also takes masks, applies them and
moves the matchers on. Compiling is in a thread of its own and not part of a step.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import time
from collections.abc import Sequence

import torch

from benchmarks.record import finish
from engine.grammar import GrammarCompiler, Matcher
from engine.grammar_text import json_schema, regex
from engine.masks import Masks
from engine.sampler import Sampler
from engine.tokenizer import Tokenizer
from engine.types import SamplingParams

CPU = torch.device("cpu")
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 60},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["cat", "dog", "bird"]}, "maxItems": 8},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
WIDE = {
    "type": "object",
    "properties": {f"field_{i}": {"type": ["string", "number", "null"]} for i in range(40)},
    "required": [f"field_{i}" for i in range(40)],
    "additionalProperties": False,
}
GRAMMARS = {
    "person": json_schema(PERSON),
    "40 fields": json_schema(WIDE),
    "any object": json_schema({"type": "object"}),
    "any text": regex(r"(.|\n)*"),
}


def compile_ms(grammars: GrammarCompiler, grammar: str) -> float:
    started = time.perf_counter()
    grammars._compile(grammar)
    return 1e3 * (time.perf_counter() - started)


def mask_us(matcher: Matcher, vocab_size: int, num_tokens: int) -> list[float]:
    """Microseconds of each mask of one answer that wanders through the grammar."""
    generator = torch.Generator().manual_seed(1)
    masks, times = Masks(CPU), []
    for _ in range(num_tokens):
        started = time.perf_counter()
        mask = matcher.allowed()
        times.append(1e6 * (time.perf_counter() - started))
        logits = torch.rand(1, vocab_size, generator=generator)
        logits[0, 0] = 0.0  # the end comes last
        masks.apply(logits, [mask])
        token = int(logits.argmax())
        if token == 0:
            break
        matcher.update([token])
    return times


def step_us(grammars: GrammarCompiler, batch: int, vocab_size: int) -> tuple[float, float]:
    """Microseconds of drawing one token for each row, without a grammar and with one, in turn:
    medians of many steps."""
    samplers = []
    for grammar in (None, GRAMMARS["person"]):
        sampler = Sampler(batch, (), CPU, grammars=grammars)
        for seat in range(batch):
            sampler.start(seat, SamplingParams(seed=seat, grammar=grammar))
        samplers.append(sampler)
    times: tuple[list[float], list[float]] = ([], [])
    for position in range(60):
        logits = torch.rand(batch, vocab_size)
        logits[:, 0] = -50.0  # so that answers do not end
        for sampler, spent in zip(samplers, times, strict=True):
            copy = logits.clone()
            started = time.perf_counter()
            sampler.sample(copy, range(batch), [position] * batch)
            spent.append(1e6 * (time.perf_counter() - started))
    free, bound = map(statistics.median, times)
    return free, bound


def quantile(values: Sequence[float], share: float) -> float:
    return sorted(values)[min(int(share * len(values)), len(values) - 1)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--vocab", default="rwkv_vocab_v20230424")
    parser.add_argument("--vocab-size", type=int, default=65536, help="of the model")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--save", action="store_true", help="append to benchmarks/results/")
    args = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer, vocab_size = Tokenizer.load(args.vocab), args.vocab_size
    rss_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.perf_counter()
    grammars = GrammarCompiler(tokenizer, vocab_size)
    figures: dict[str, object] = {
        "vocab": args.vocab,
        "vocabulary_s": time.perf_counter() - started,
        "vocabulary_mib": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - rss_kib) / 1024,
    }
    print(
        f"the vocabulary takes {figures['vocabulary_s']:.2f} s, {figures['vocabulary_mib']:.0f} MiB"
    )
    print(f"\n{'':12}{'compile ms':>12}{'mask us p50':>14}{'p99':>8}{'max':>8}")
    for name, grammar in GRAMMARS.items():
        spent_ms = compile_ms(grammars, grammar)
        times = mask_us(grammars.matcher(grammar), vocab_size, 400)
        row = [quantile(times, share) for share in (0.5, 0.99, 1.0)]
        print(f"{name:12}{spent_ms:>12.1f}{row[0]:>14.0f}{row[1]:>8.0f}{row[2]:>8.0f}")
        mask_figures = dict(zip(("p50", "p99", "max"), row, strict=True))
        figures[name] = {"compile_ms": spent_ms, "mask_us": mask_figures}
    print(f"\n{'batch':12}{'free us':>12}{'person us':>14}{'per row':>12}")
    for batch in args.batches:
        free, bound = step_us(grammars, batch, vocab_size)
        print(f"{batch:<12}{free:>12.0f}{bound:>14.0f}{(bound - free) / batch:>12.0f}")
        figures[f"batch_{batch}"] = {"free_us": free, "grammar_us": bound}
    finish("grammar", figures, save=args.save)


if __name__ == "__main__":
    main()
