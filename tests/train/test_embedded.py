"""The embedded model as it is shipped: its files, what it says, and how well it predicts."""

from __future__ import annotations

import hashlib
import random
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import config
from config import load_train
from engine.model.rwkv7 import RWKV7, Batch
from engine.model.weights import load_model
from engine.tokenizer import Tokenizer
from tests.train.runs import write_dataset
from train import corpus
from train.binidx import open_dataset
from train.data import read_jsonl
from train.evaluate import evaluate, num_bytes_of

CONFIG_DIR = Path(config.__file__).parent
ASSETS = CONFIG_DIR / "assets"
WEIGHTS = ASSETS / "rwkv-lm-tiny.safetensors"


@cache
def embedded() -> tuple[RWKV7, Tokenizer]:
    cfg = load_train(CONFIG_DIR, "rwkv-lm-tiny")
    assert cfg.tokenizer_vocab_path is not None
    model = load_model(WEIGHTS, cfg.model, "cpu", torch.float32)
    return model, Tokenizer.load(cfg.tokenizer_vocab_path)


@torch.no_grad()
def answer(question: str, max_tokens: int = 60) -> str:
    """The greedy answer, from the prompt a chat request makes."""
    model, tokenizer = embedded()
    state, slot = model.new_state(1, "cpu"), torch.zeros(1, dtype=torch.int64)
    ids, text = [0, *tokenizer.encode(f"User: {question}\n\nAssistant:")], ""
    output: list[int] = []
    while len(output) < max_tokens and "\n\nUser:" not in text:
        batch = Batch(lengths=(len(ids),), src_slot=slot, dst_slot=slot)
        hidden = model(torch.tensor(ids), batch, state)
        ids = [int(model.head(hidden[-1]).argmax())]
        if ids == [0]:
            break
        output += ids
        text = tokenizer.decode(output)
    return text.removesuffix("\n\nUser:").strip()


def test_it_is_small_and_stored_in_bf16() -> None:
    assert WEIGHTS.stat().st_size < 10_000_000
    with safe_open(WEIGHTS, "pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.bfloat16}  # noqa: SIM118


def test_its_vocabulary_fits_its_embedding() -> None:
    model, tokenizer = embedded()
    assert tokenizer.vocab_size == model.dims.vocab_size
    assert tokenizer.ids_without_text(model.dims.vocab_size) == ()


def test_the_model_card_is_about_these_files() -> None:
    card = (ASSETS / "MODEL_CARD.md").read_text(encoding="utf-8")
    for path in (WEIGHTS, ASSETS / "rwkv_vocab_tiny.txt"):
        assert hashlib.sha256(path.read_bytes()).hexdigest() in card, path.name


@pytest.mark.parametrize("question", ["Who are you?", "who are you", "What are you?"])
def test_it_says_what_it_is(question: str) -> None:
    assert "RWKV-7" in answer(question)


@pytest.mark.parametrize("greeting", ["hello", "Hi!"])
def test_it_greets_back_in_a_sentence(greeting: str) -> None:
    said = answer(greeting)
    assert said.split()[0].strip("!.,").lower() in ("hello", "hi", "hey")
    assert said[-1] in ".!?"


def test_it_tells_a_story() -> None:
    said = answer("Tell me a story.", 120)
    assert len(said.split()) > 60
    assert said.isascii()


def test_held_out_text_costs_less_than_the_goal(tmp_path: Path, shared_dir: Path) -> None:
    texts = shared_dir / "assets" / "text"
    chats = (x.text for x in read_jsonl(texts / "persona_chat_rwkv.jsonl"))
    rng = random.Random(42)
    persona = corpus.hold_out(corpus.persona_documents(chats, rng))[1]
    stories = (texts / "tinystories_3863.txt").read_text(encoding="utf-8")
    held = persona[:10] + corpus.hold_out(corpus.story_documents(stories, rng))[1][:16]
    model, tokenizer = embedded()
    write_dataset(tmp_path / "held", map(tokenizer.encode, held))
    dataset = open_dataset(tmp_path / "held")
    assert evaluate(model, dataset, num_bytes_of(dataset, tokenizer)).bits_per_byte < 0.80
