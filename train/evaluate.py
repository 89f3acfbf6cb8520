"""Bits per byte of a model on held-out documents: `python -m train.evaluate`.

Bits per byte compares models of different vocabularies. Each document is read from the zero
state after token 0, at its full length; predicting its end counts as bits, not as bytes.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import config
from config import ConfigError, load_train
from engine.errors import EngineError
from engine.kernels.backend import Batch
from engine.model.rwkv7 import RWKV7
from engine.model.weights import load_model
from engine.tokenizer import WORLD_VOCAB, Tokenizer
from train.binidx import END_OF_TEXT, Dataset, DatasetError, open_dataset

TOKENS_PER_BATCH = 4096
CONFIG_DIR = Path(config.__file__).parent


@dataclass(frozen=True, slots=True)
class Evaluation:
    """`loss` in nats per token."""

    loss: float
    bits_per_byte: float
    num_tokens: int
    num_bytes: int


def num_bytes_of(dataset: Dataset, tokenizer: Tokenizer) -> int:
    """Bytes of text in a dataset. Raises DatasetError when the vocabulary is another one."""
    counts = np.bincount(dataset.tokens)
    try:
        return sum(n * len(tokenizer.token_bytes(i)) for i, n in enumerate(counts.tolist()) if n)
    except ValueError as error:
        raise DatasetError(f"{dataset.prefix}: not made with this vocabulary: {error}") from None


@torch.no_grad()
def evaluate(model: RWKV7, dataset: Dataset, num_bytes: int) -> Evaluation:
    """Over all documents. The model is left as it was."""
    device = model.emb.weight.device
    total = torch.zeros((), dtype=torch.float64)
    for tokens_T, targets_T, lengths in _batches(dataset):
        slots = torch.arange(len(lengths), device=device)
        batch = Batch(lengths=lengths, src_slot=slots, dst_slot=slots)
        state = model.new_state(len(lengths), device)
        hidden = model(tokens_T.to(device), batch, state)
        loss = model.kernels.cross_entropy_l2wrap(
            hidden, model.head.weight, targets_T.to(device), False
        )
        total += loss.double().cpu() * len(targets_T)
    nats = total.item()
    return Evaluation(
        loss=nats / dataset.num_tokens,
        bits_per_byte=nats / math.log(2) / max(1, num_bytes),
        num_tokens=dataset.num_tokens,
        num_bytes=num_bytes,
    )


def _batches(dataset: Dataset) -> Iterator[tuple[Tensor, Tensor, tuple[int, ...]]]:
    """Inputs, targets and lengths of a few documents of similar length at a time."""
    documents = sorted(dataset.documents(), key=len)
    while documents:
        chosen = [documents.pop()]
        while documents and len(chosen[0]) * (len(chosen) + 1) <= TOKENS_PER_BATCH:
            chosen.append(documents.pop())
        targets = np.concatenate(chosen).astype(np.int64)
        inputs = np.concatenate([[END_OF_TEXT, *document[:-1]] for document in chosen])
        lengths = tuple(len(document) for document in chosen)
        yield torch.from_numpy(inputs.astype(np.int64)), torch.from_numpy(targets), lengths


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m train.evaluate", description=__doc__)
    parser.add_argument("weights", type=Path, help=".safetensors or .pth")
    parser.add_argument("datasets", type=Path, nargs="+", help="PREFIX of PREFIX.bin, PREFIX.idx")
    parser.add_argument("--train-cfg", required=True, help="whose model shape and vocabulary")
    parser.add_argument("--config-dir", type=Path, default=CONFIG_DIR)
    args = parser.parse_args(argv)
    try:
        cfg = load_train(args.config_dir, args.train_cfg)
        model = load_model(args.weights, cfg.model, "cpu", torch.float32)
        tokenizer = Tokenizer.load(cfg.tokenizer_vocab_path or WORLD_VOCAB)
        for prefix in args.datasets:
            dataset = open_dataset(prefix)
            result = evaluate(model, dataset, num_bytes_of(dataset, tokenizer))
            print(  # noqa: T201
                f"{prefix.name}: {result.bits_per_byte:.4f} bits per byte, {result.loss:.4f} nats "
                f"per token, {result.num_tokens} tokens, {result.num_bytes} bytes"
            )
    except (ConfigError, DatasetError, EngineError) as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
