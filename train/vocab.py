"""A small vocabulary for a small model: `python -m train.vocab OUT.txt TEXTS.jsonl --size N`.

Keeps the tokens of a larger vocabulary (World by default) that save most when these texts are
encoded by greedy longest match. Knows the World file format, not what the texts are.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from engine.tokenizer import WORLD_VOCAB, Tokenizer

_CHUNK = re.compile(rb"\s*\S+|\s+")
BYTES = tuple(bytes([i]) for i in range(256))
PRUNE_SHARE = 0.85  # of the tokens left, kept by each round


def longest_match(data: bytes, tokens: frozenset[bytes], max_len: int) -> Iterator[bytes]:
    """`data` cut greedily into tokens; every single byte must be a token."""
    start = 0
    while start < len(data):
        end = min(len(data), start + max_len)
        while data[start:end] not in tokens:
            end -= 1
        yield data[start:end]
        start = end


def select_tokens(chunk_counts: Counter[bytes], larger: Iterable[bytes], size: int) -> list[bytes]:
    """`size` - 1 tokens (id 0 has no text): the 256 bytes, then the most useful of `larger`.

    Starts from every token of `larger` that is a substring of the texts, and prunes in rounds.
    A token is worth its uses times the tokens it would fall apart into, less one; uses are
    counted anew each round, since a dropped token gives its uses to shorter ones.
    """
    if size < 257:
        raise ValueError(f"--size {size} has no room for id 0 and the 256 bytes; give at least 257")
    seen = {
        chunk[i:j]
        for chunk in chunk_counts
        for i in range(len(chunk))
        for j in range(i + 2, min(len(chunk), i + 24) + 1)
    }
    kept = seen.intersection(larger)
    while True:
        tokens = frozenset(kept).union(BYTES)
        max_len = max(map(len, tokens))
        uses: Counter[bytes] = Counter()
        for chunk, count in chunk_counts.items():
            for token in longest_match(chunk, tokens, max_len):
                uses[token] += count
        if len(kept) <= size - 257:
            break
        # Allowed one byte less than its length, a token falls apart into the others.
        worth = {
            x: uses[x] * (sum(1 for _ in longest_match(x, tokens, len(x) - 1)) - 1) for x in kept
        }
        room = max(size - 257, int(len(kept) * PRUNE_SHARE))
        kept = set(sorted(kept, key=lambda x: (-worth[x], x))[:room])
    return [*BYTES, *sorted(kept)]


def write_vocabulary(path: Path, tokens: Sequence[bytes]) -> None:
    """The World file format: `ID LITERAL NUM_BYTES` per line, ids from 1."""
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for i, token in enumerate(tokens, start=1):
            try:
                literal = repr(token.decode("utf-8"))
            except UnicodeDecodeError:
                literal = repr(token)
            file.write(f"{i} {literal} {len(token)}\n")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m train.vocab", description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("texts", type=Path, help='jsonl of {"text"}')
    parser.add_argument("--size", type=int, default=2048, help="ids, id 0 included")
    parser.add_argument("--larger", default=WORLD_VOCAB, help="vocabulary to choose from")
    args = parser.parse_args(argv)

    chunk_counts: Counter[bytes] = Counter()
    with args.texts.open(encoding="utf-8") as lines:
        for line in lines:
            chunk_counts.update(_CHUNK.findall(json.loads(line)["text"].encode()))
    try:
        tokenizer = Tokenizer.load(args.larger)
        ids = (i for i in range(1, tokenizer.vocab_size) if tokenizer.has_text(i))
        larger = {tokenizer.token_bytes(i) for i in ids}
        tokens = select_tokens(chunk_counts, larger.difference(BYTES), args.size)
    except ValueError as error:
        parser.error(str(error))
    write_vocabulary(args.out, tokens)

    known = frozenset(tokens)
    max_len = max(map(len, tokens))
    num_bytes = sum(len(x) * n for x, n in chunk_counts.items())
    num_tokens = sum(
        n * sum(1 for _ in longest_match(x, known, max_len)) for x, n in chunk_counts.items()
    )
    print(f"{args.out}: {len(tokens)} tokens, {num_bytes / num_tokens:.3f} bytes per token")  # noqa: T201
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
