"""Datasets from text: `python -m train.data {from-text,from-jsonl,info}`.

Knows texts, a tokenizer and train/binidx.py; knows no model.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from engine.tokenizer import WORLD_VOCAB, Tokenizer, TokenizerError
from train.binidx import MAX_TOKEN_ID, DatasetError, DatasetWriter, open_dataset, paths
from train.sampler import magic_prime

CONTEXT_LENGTHS = (128, 256, 512, 1024, 2048, 4096, 8192)


@dataclass(frozen=True, slots=True)
class Document:
    """One text, where it ends (file:line), and how many bytes were read to get it."""

    text: str
    place: str
    num_bytes_read: int


def read_jsonl(path: Path) -> Iterator[Document]:
    """The "text" of every line. Raises DatasetError naming the file and the line."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            place = f"{path}:{number}"
            try:
                text = json.loads(line)["text"]
            except (ValueError, KeyError, TypeError) as error:
                raise DatasetError(
                    f'{place}: expected {{"text": "..."}}, found {line[:60]!r} ({error!r})'
                ) from None
            if not isinstance(text, str):
                raise DatasetError(f'{place}: "text" is {text!r}, expected a string')
            yield Document(text, place, len(line))


def read_text(path: Path, marker: str) -> Iterator[Document]:
    """The parts between lines that hold nothing but `marker`; without any, the whole file."""
    lines: list[str] = []
    num_bytes = 0
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            try:
                line = raw.decode()
            except UnicodeDecodeError as error:
                raise DatasetError(f"{path}:{number}: not UTF-8: {error}") from None
            num_bytes += len(raw)
            if line.strip() == marker:
                yield Document("".join(lines), f"{path}:{number}", num_bytes)
                lines, num_bytes = [], 0
            else:
                lines.append(line)
    yield Document("".join(lines), f"{path}: at the end", num_bytes)


def build(
    documents: Iterable[Document],
    tokenizer: Tokenizer,
    prefix: Path,
    val_fraction: float = 0.0,
    seed: int = 42,
) -> None:
    """Write `prefix`, and `prefix`_val of the documents held out at random.

    Documents without text are left out. Raises DatasetError when nothing is left, or when the
    vocabulary does not fit uint16.
    """
    if tokenizer.vocab_size - 1 > MAX_TOKEN_ID:
        raise DatasetError(
            f"the vocabulary has ids up to {tokenizer.vocab_size - 1}; binidx holds uint16, so at "
            f"most {MAX_TOKEN_ID}"
        )
    rng = random.Random(seed)
    num_train = num_val = 0
    with ExitStack() as stack:
        train = stack.enter_context(DatasetWriter(prefix))
        val_prefix = prefix.with_name(prefix.name + "_val")
        val = stack.enter_context(DatasetWriter(val_prefix)) if val_fraction else train
        for document in documents:
            text = document.text.strip()
            if not text:
                continue
            is_held_out = rng.random() < val_fraction
            num_val += is_held_out
            num_train += not is_held_out
            try:
                (val if is_held_out else train).add(tokenizer.encode(text))
            except ValueError as error:
                raise DatasetError(f"{document.place}: {error}") from None
        if num_train + num_val == 0:
            raise DatasetError(f"nothing to write to {prefix}: the input holds no text")
        if num_train == 0 or (val_fraction and num_val == 0):
            raise DatasetError(
                f"--val-fraction {val_fraction} holds out {num_val} of {num_train + num_val} "
                "documents; change it, or cut the text into more documents"
            )


def show(prefix: Path, console: Console) -> None:
    """Sizes of a dataset, and what each context length makes of it."""
    dataset = open_dataset(prefix)
    console.print(
        f"{paths(prefix)[0]}: {dataset.num_tokens} tokens, {dataset.num_documents} documents, "
        f"largest id {int(dataset.tokens.max())}"
    )
    for context_length in CONTEXT_LENGTHS:
        try:
            prime = magic_prime(dataset.num_tokens, context_length)
        except DatasetError:
            break
        console.print(f"  context_length {context_length}: magic prime {prime} = samples in a pass")


def _with_progress(
    files: Sequence[Path], marker: str | None, console: Console
) -> Iterator[Document]:
    total = sum(path.stat().st_size for path in files)
    with Progress(console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("encoding", total=total)
        for path in files:
            for document in read_jsonl(path) if marker is None else read_text(path, marker):
                yield document
                progress.advance(task, document.num_bytes_read)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m train.data", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, what in (("from-text", "text files"), ("from-jsonl", 'files of {"text": ...}')):
        command = commands.add_parser(name, help=f"make PREFIX.bin and PREFIX.idx of {what}")
        command.add_argument("prefix", type=Path)
        command.add_argument("files", type=Path, nargs="+")
        command.add_argument("--vocab", default=WORLD_VOCAB, help="name or path of the vocabulary")
        command.add_argument(
            "--val-fraction", type=float, default=0.0, help="documents to hold out, in PREFIX_val"
        )
        command.add_argument("--seed", type=int, default=42, help="of the choice of held-out ones")
        if name == "from-text":
            command.add_argument("--marker", default="<|endoftext|>", help="line between documents")
    commands.add_parser("info", help="check and describe a dataset").add_argument(
        "prefix", type=Path
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    console = Console(soft_wrap=True, highlight=False)
    try:
        if args.command != "info":
            if not 0 <= args.val_fraction < 1:
                raise DatasetError(f"--val-fraction {args.val_fraction}: expected 0 <= x < 1")
            marker = args.marker if args.command == "from-text" else None
            documents = _with_progress(args.files, marker, console)
            tokenizer = Tokenizer.load(args.vocab, is_bulk=True)
            build(documents, tokenizer, args.prefix, args.val_fraction, args.seed)
            if args.val_fraction:
                show(args.prefix.with_name(args.prefix.name + "_val"), console)
        show(args.prefix, console)
    except (DatasetError, TokenizerError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
