"""llama.cpp is the oracle: what it computes from our GGUF is what our model computes."""

from __future__ import annotations

import json
import urllib.request
from pathlib import Path

import pytest
import torch

from benchmarks.gguf import write_gguf
from benchmarks.peer_llama import llama_server
from benchmarks.served import Server
from benchmarks.words import Words
from config.schema import ModelConfig
from engine.errors import WeightsError
from engine.model.rwkv7 import RWKV7
from engine.model.weights import dims_of, dummy_model, load_checkpoint, save_safetensors
from engine.tokenizer import END_OF_TEXT

ASSETS = Path(__file__).parents[2] / "config" / "assets"
VOCABULARY = ASSETS / "rwkv_vocab_tiny.txt"
NUM_TOKENS = 16


def greedy(model: RWKV7, prompt: list[int]) -> list[int]:
    """The whole text anew for every token, without an end: no state, no engine."""
    ids = list(prompt)
    with torch.inference_mode():
        for _ in range(NUM_TOKENS):
            logits = model.head(model.hidden(torch.tensor([ids]))[0, -1])
            logits[END_OF_TEXT] = -torch.inf
            ids.append(int(logits.argmax()))
    return ids[len(prompt) :]


def random_checkpoint(folder: Path) -> Path:
    """All ranks differ, and some ids of the model are in no vocabulary."""
    cfg = ModelConfig(
        name="test",
        num_cells=3,
        vocab_size=2112,
        embedded_dim=128,
        num_heads=2,
        w_lora_rank=32,
        a_lora_rank=64,
        v_lora_rank=96,
        g_lora_rank=128,
    )
    path = folder / "random.safetensors"
    save_safetensors(path, dummy_model(cfg, "cpu", torch.float32).state_dict())
    return path


def continued_by(server: Server, prompt: list[int]) -> list[int]:
    """Greedy token ids, which only llama.cpp's own route gives."""
    fields = {"prompt": prompt, "n_predict": NUM_TOKENS, "temperature": 0, "ignore_eos": True}
    body = json.dumps(fields | {"return_tokens": True}).encode()
    with urllib.request.urlopen(f"http://{server.address}/completion", body, 60) as response:
        tokens: list[int] = json.load(response)["tokens"]
    return tokens


def load(path: Path) -> RWKV7:
    tensors = load_checkpoint(path)
    model = RWKV7(dims_of(tensors, path))
    state = {name: tensors[name].reshape(t.shape) for name, t in model.state_dict().items()}
    model.load_state_dict(state)
    return model.double()


@pytest.mark.parametrize("is_trained", [True, False])
def test_llama_cpp_continues_our_gguf_like_our_model(tmp_path: Path, is_trained: bool) -> None:
    pytest.importorskip(
        "xllamacpp", reason="llama.cpp is an optional oracle: pip install xllamacpp"
    )
    weights = ASSETS / "rwkv-lm-tiny.safetensors" if is_trained else random_checkpoint(tmp_path)
    write_gguf(weights, VOCABULARY, tmp_path / "model.gguf")
    words, model = Words(VOCABULARY), load(weights)
    server = llama_server(
        tmp_path / "model.gguf", tmp_path / "log", num_slots=1, num_threads=1, context_len=256
    )
    with server:
        for prompt in (words.document("one", 5), words.document("two", 60), [0, 255, 1, 10, 256]):
            assert continued_by(server, prompt) == greedy(model, prompt)


def test_another_dtype_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="dtype = 'int8'"):
        write_gguf(ASSETS / "rwkv-lm-tiny.safetensors", VOCABULARY, tmp_path / "out", "int8")


def test_a_missing_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"no such file: .*gone\.pth"):
        write_gguf(tmp_path / "gone.pth", VOCABULARY, tmp_path / "out")
