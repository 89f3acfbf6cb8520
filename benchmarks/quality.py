"""What a number format of weights or states costs in quality, beside float32 in the same run.

    python -m benchmarks.quality [--texts FOLDER] [--save]

Held-out documents of the embedded model (train/corpus.py says which), each from the zero state:
bits per byte, how far logits are from those of float32, and how often the most probable token is
the same. Then greedy answers from the beginnings of documents, until they part.

"int8" computes in float32, "int8 + bfloat16" in bfloat16, on a CPU with matrices rounded to it:
the GPU's kernel does not round them. "fused" is what serves on a CPU: its int8 is of all matrices,
low-rank ones too, and of the rows they multiply, in groups of 64. With "float16 states" all tokens
are fed one by one, so that states are rounded after each of them; a server rounds those of a prompt
once in a chunk. Last, two small trained models beside logits and answers of float64.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import config
from benchmarks.record import finish
from config import load_model as load_model_config
from config.schema import ModelConfig
from engine.kernels.backend import Batch
from engine.model.fused import FusedRWKV7
from engine.model.pack import pack
from engine.model.rwkv7 import RWKV7, State
from engine.model.weights import load_model, read_checkpoint
from engine.tokenizer import Tokenizer
from train import corpus
from train.data import read_jsonl

CONFIG_DIR = Path(config.__file__).parent
TEXTS = Path(__file__).parents[2] / "shared" / "assets" / "text"


@dataclass(frozen=True, slots=True)
class Format:
    """`dtype` is of all weights, or of those beside matrices of int8, and of activations."""

    dtype: torch.dtype
    is_int8: bool = False
    has_half_states: bool = False
    fused: str | None = None  # computed by FusedRWKV7, with matrices of this kind


FORMATS = {
    "float32": Format(torch.float32),
    "bfloat16": Format(torch.bfloat16),
    "int8": Format(torch.float32, is_int8=True),
    "int8 + bfloat16": Format(torch.bfloat16, is_int8=True),
    "float16 states": Format(torch.float32, has_half_states=True),
    "fused bfloat16": Format(torch.float32, fused="bfloat16"),
    "fused int8": Format(torch.float32, fused="int8"),
}
PROMPT_LEN = 24
Model = RWKV7 | FusedRWKV7
Feed = Callable[[Model, Sequence[list[int]], State], list[Tensor]]


@dataclass(frozen=True, slots=True)
class Reading:
    """Logits [T, V] in float32 of all tokens of all documents, and the greedy answers."""

    logits_TV: Tensor
    answers: list[list[int]]
    weight_bytes: int


def held_out(folder: Path, num_each: int) -> list[str]:
    """As train.corpus divides them: one generator for both sources, in this order."""
    rng = random.Random(42)
    chats = (x.text for x in read_jsonl(folder / "persona_chat_rwkv.jsonl"))
    persona = corpus.hold_out(corpus.persona_documents(chats, rng))[1]
    stories = (folder / "tinystories_3863.txt").read_text(encoding="utf-8")
    told = corpus.hold_out(corpus.story_documents(stories, rng))[1]
    return persona[:num_each] + told[:num_each]


def load(weights: Path, cfg: ModelConfig, form: Format) -> tuple[Model, int]:
    """The model, and the bytes of its weights."""
    if form.fused is not None:
        dims, tensors = read_checkpoint(weights, cfg)
        packed = pack(tensors, dims, form.fused)
        return FusedRWKV7(dims, packed, num_threads=1), packed.num_bytes
    model = load_model(weights, cfg, "cpu", form.dtype, form.is_int8)
    return model, sum(x.nbytes for x in (*model.parameters(), *model.buffers()))


@torch.inference_mode()
def read(
    model: Model,
    weight_bytes: int,
    documents: Sequence[list[int]],
    answer_len: int,
    *,
    has_half_states: bool,
) -> Reading:
    inputs = [[0, *ids[:-1]] for ids in documents]
    state = new_state(model, len(documents), is_half=has_half_states)
    feed = feed_one_by_one if has_half_states else feed_whole
    hidden_TC = torch.cat(feed(model, inputs, state))
    return Reading(
        logits_TV=model.head(hidden_TC).float(),
        answers=greedy(model, [ids[: 1 + PROMPT_LEN] for ids in inputs], answer_len, feed, state),
        weight_bytes=weight_bytes,
    )


def new_state(model: Model, num_slots: int, *, is_half: bool) -> State:
    state = model.new_state(num_slots, "cpu")
    return State(wkv=state.wkv.half(), shift=state.shift) if is_half else state


def feed_whole(model: Model, texts: Sequence[list[int]], state: State) -> list[Tensor]:
    """Hidden rows [T, C] of each text."""
    slots, lengths = torch.arange(len(texts)), tuple(map(len, texts))
    tokens = torch.tensor([token for ids in texts for token in ids])
    return list(model(tokens, Batch(lengths, slots, slots), state).split(lengths))


def feed_one_by_one(model: Model, texts: Sequence[list[int]], state: State) -> list[Tensor]:
    """The same; the state is stored after each token."""
    rows: list[list[Tensor]] = [[] for _ in texts]
    for position in range(max(map(len, texts))):
        running = [i for i, ids in enumerate(texts) if position < len(ids)]
        tokens, slots = torch.tensor([texts[i][position] for i in running]), torch.tensor(running)
        hidden_SC = model(tokens, Batch((1,) * len(running), slots, slots), state)
        for i, row_C in zip(running, hidden_SC, strict=True):
            rows[i].append(row_C)
    return [torch.stack(each) for each in rows]


@torch.inference_mode()
def greedy(
    model: Model, prompts: Sequence[list[int]], num_tokens: int, feed: Feed, state: State
) -> list[list[int]]:
    """Answers to all prompts at once. The state is cleared first."""
    state.wkv.zero_()
    state.shift.zero_()
    slots = torch.arange(len(prompts))
    last = torch.stack([hidden_TC[-1] for hidden_TC in feed(model, prompts, state)])
    drawn = []
    for _ in range(num_tokens):
        drawn.append(model.head(last).argmax(-1))
        last = model(drawn[-1], Batch((1,) * len(prompts), slots, slots), state)
    answers: list[list[int]] = torch.stack(drawn, dim=1).tolist()
    return answers


def compare(
    reading: Reading, exact: Reading, targets_T: Tensor, num_bytes: int
) -> dict[str, float]:
    nats = -reading.logits_TV.log_softmax(-1).gather(1, targets_T.unsqueeze(1)).double().sum()
    wanted = exact.logits_TV.log_softmax(-1)
    found = reading.logits_TV.log_softmax(-1)
    divergence = (wanted.exp() * (wanted - found)).sum(-1).double().mean()
    pairs = list(zip(reading.answers, exact.answers, strict=True))
    same = [
        next((i for i, (a, b) in enumerate(zip(*p, strict=True)) if a != b), None) for p in pairs
    ]
    length = len(exact.answers[0])
    return {
        "weight_mib": reading.weight_bytes / 2**20,
        "bits_per_byte": float(nats) / math.log(2) / num_bytes,
        "logit_error": float((reading.logits_TV - exact.logits_TV).norm() / exact.logits_TV.norm()),
        "kl_nats": float(divergence),
        "same_top": float(
            (reading.logits_TV.argmax(-1) == exact.logits_TV.argmax(-1)).double().mean()
        ),
        "same_answers": sum(i is None for i in same) / len(same),
        "same_tokens_before_parting": sum(length if i is None else i for i in same) / len(same),
    }


def measure(
    weights: Path, model_cfg: str, vocab: str, texts: Sequence[str], answer_len: int
) -> dict[str, dict[str, float]]:
    tokenizer = Tokenizer.load(vocab)
    cfg = load_model_config(CONFIG_DIR, model_cfg)
    documents = [[*tokenizer.encode(text), 0] for text in texts]
    targets_T = torch.tensor([token for ids in documents for token in ids])
    num_bytes = sum(len(text.encode()) for text in texts)
    readings = {
        name: read(
            *load(weights, cfg, form),
            documents,
            answer_len,
            has_half_states=form.has_half_states,
        )
        for name, form in FORMATS.items()
    }
    return {
        name: compare(reading, readings["float32"], targets_T, num_bytes)
        for name, reading in readings.items()
    }


@torch.inference_mode()
def golden(folder: Path) -> dict[str, dict[str, float]]:
    """Two trained models beside what float64 made of them: logits, and greedy answers."""
    chat = ModelConfig(name="chat", num_cells=4, vocab_size=2048, embedded_dim=128, num_heads=2)
    reverse = ModelConfig(
        **dict(name="reverse", num_cells=4, vocab_size=12, embedded_dim=32, num_heads=2),
        **dict.fromkeys(("w_lora_rank", "a_lora_rank", "v_lora_rank", "g_lora_rank"), 8),
    )
    chats = json.loads((folder / "golden_chat_demo.json").read_text())
    logits = np.load(folder / "golden_chat_demo_fp64.npz")
    reversals = json.loads((folder / "golden_reverse.json").read_text())
    found = {}
    for name in ("float32", "fused bfloat16", "fused int8"):
        model, _ = load(folder / "rwkv7-chat-demo-D128-L4-V2048.pth", chat, FORMATS[name])
        texts = [[*case["ids"], *case["greedy_ids"]] for case in chats]
        state = model.new_state(len(texts), "cpu")
        num_same, error, norm = 0, 0.0, 0.0
        for i, rows in enumerate(feed_whole(model, texts, state)):
            length = len(chats[i]["ids"])
            logits_TV = model.head(rows)
            drawn = logits_TV[length - 1 : -1].argmax(-1).tolist()
            num_same += sum(map(int.__eq__, drawn, chats[i]["greedy_ids"]))
            wanted = torch.from_numpy(logits[f"prompt{i}_logits"])
            error += float((logits_TV[length - 8 : length].double() - wanted).square().sum())
            norm += float(wanted.square().sum())
        model, _ = load(folder / "rwkv7-reverse-L4-D32.pth", reverse, FORMATS[name])
        num_right = 0
        for case in reversals:
            wanted = ["0123456789,#".index(c) for c in case["greedy"]]
            prompt = ["0123456789,#".index(c) for c in case["prompt"]]
            state = model.new_state(1, "cpu")
            num_right += greedy(model, [prompt], len(wanted), feed_whole, state) == [wanted]
        found[name] = {
            "chat_logit_error": math.sqrt(error / norm),
            "chat_same_tokens": num_same / sum(len(case["greedy_ids"]) for case in chats),
            "reverse_right_answers": num_right / len(reversals),
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    assets = CONFIG_DIR / "assets"
    parser.add_argument("--weights", type=Path, default=assets / "rwkv-lm-tiny.safetensors")
    parser.add_argument("--model-cfg", default="rwkv-lm-tiny")
    parser.add_argument("--vocab", default=str(assets / "rwkv_vocab_tiny.txt"))
    parser.add_argument("--texts", type=Path, default=TEXTS, help="folder of the two sources")
    parser.add_argument("--documents", type=int, default=16, help="of each source")
    parser.add_argument("--answer-len", type=int, default=64)
    parser.add_argument("--save", action="store_true", help="append to benchmarks/results/")
    args = parser.parse_args()
    torch.set_num_threads(1)
    texts = held_out(args.texts, args.documents)
    rows = measure(args.weights, args.model_cfg, args.vocab, texts, args.answer_len)
    names = list(rows["int8"])
    print(f"{'':16}" + "".join(f"{name.split('_before')[0]:>16}" for name in names))
    for label, row in rows.items():
        print(f"{label:16}" + "".join(f"{row[name]:>16.5f}" for name in names))
    num_bytes = sum(len(text.encode()) for text in texts)
    figures: dict[str, object] = {"num_documents": len(texts), "num_bytes": num_bytes, **rows}
    if (args.texts.parent / "models").is_dir():
        figures["golden"] = checked = golden(args.texts.parent / "models")
        for label, row in checked.items():
            print(f"{label:16}" + ", ".join(f"{name} {value:.5f}" for name, value in row.items()))
    finish("quality", figures, save=args.save)


if __name__ == "__main__":
    main()
