"""The fused model on trained weights, against float64 logits and answers made elsewhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from engine.kernels.backend import Batch
from engine.model.weights import dims_of, load_checkpoint

pytest.importorskip("numba", reason="the fused kernels are numba's")

from engine.model.fused import FusedRWKV7
from engine.model.pack import pack
from engine.model.rwkv7 import State

SYMBOLS = "0123456789,#"


def fused(path: Path, dtype: str) -> FusedRWKV7:
    tensors = load_checkpoint(path)
    dims = dims_of(tensors, path)
    return FusedRWKV7(dims, pack(tensors, dims, dtype), num_threads=2)


def fed(model: FusedRWKV7, texts: list[list[int]], state: State) -> tuple[Tensor, ...]:
    """Logits [tokens, V] of each text, all as one ragged batch from the zero state; the first one's
    state goes to slot 1, and so on."""
    lengths, slots = [len(text) for text in texts], torch.arange(1, len(texts) + 1)
    ids = torch.tensor([token for text in texts for token in text])
    hidden = model(ids, Batch(tuple(lengths), torch.zeros_like(slots), slots), state)
    return model.head(hidden).split(lengths)


def logits_of(model: FusedRWKV7, texts: list[list[int]]) -> list[np.ndarray]:
    parts = fed(model, texts, model.new_state(len(texts) + 1))
    return [part.double().numpy() for part in parts]


def greedy(model: FusedRWKV7, prompts: list[list[int]], num_tokens: int) -> list[list[int]]:
    """One token of every prompt at a time."""
    state, size = model.new_state(len(prompts) + 1), len(prompts)
    slots = torch.arange(1, size + 1)
    found = [torch.stack([logits[-1].argmax() for logits in fed(model, prompts, state)])]
    for _ in range(num_tokens - 1):
        hidden = model(found[-1], Batch((1,) * size, slots, slots), state)
        found.append(model.head(hidden).argmax(-1))
    return torch.stack(found, dim=1).tolist()


def test_reversed_digits_have_the_golden_logits(shared_dir: Path) -> None:
    """Heads of 16 and ranks of 8; a wrong formula moves these logits by more than 7e-3."""
    models = shared_dir / "assets/models"
    golden = np.load(models / "golden_reverse_fp64.npz")
    answers = json.loads((models / "golden_reverse.json").read_text())
    texts = {len(a["prompt"]) + len(a["greedy"]): a["prompt"] + a["greedy"] for a in answers}
    keys = list(golden)
    ids = [[SYMBOLS.index(c) for c in texts[golden[key].shape[0]]] for key in keys]
    found = logits_of(fused(models / "rwkv7-reverse-L4-D32.pth", "float32"), ids)
    for key, logits in zip(keys, found, strict=True):
        assert np.abs(logits - golden[key]).max() < 1e-3, key


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_chat_model_has_the_golden_logits_and_says_the_same(shared_dir: Path, dtype: str) -> None:
    """Its checkpoint is bfloat16, so nothing may be lost."""
    models, cases = shared_dir / "assets/models", chats(shared_dir)
    golden = np.load(models / "golden_chat_demo_fp64.npz")
    model = fused(models / "rwkv7-chat-demo-D128-L4-V2048.pth", dtype)
    for i, logits in enumerate(logits_of(model, [case["ids"] for case in cases])):
        exact = golden[f"prompt{i}_logits"]
        assert np.abs(logits[-8:] - exact).max() < 1e-5 * np.abs(exact).max()
    said = greedy(model, [case["ids"] for case in cases], 40)
    assert said == [case["greedy_ids"] for case in cases]


def test_int8_keeps_the_most_probable_tokens_of_a_chat_model(shared_dir: Path) -> None:
    cases = chats(shared_dir)
    model = fused(shared_dir / "assets/models/rwkv7-chat-demo-D128-L4-V2048.pth", "int8")
    texts = [[*case["ids"], *case["greedy_ids"]] for case in cases]
    for case, logits in zip(cases, logits_of(model, texts), strict=True):
        found = logits[len(case["ids"]) - 1 : -1].argmax(-1).tolist()
        same = sum(map(int.__eq__, found, case["greedy_ids"]))
        assert same >= 38, f"{same} of {len(found)}"


def chats(shared_dir: Path) -> list[dict[str, Any]]:
    cases = json.loads((shared_dir / "assets/models/golden_chat_demo.json").read_text())
    assert len(cases) == 2
    return cases
