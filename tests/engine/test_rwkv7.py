"""The model against independent oracles: float64 golden logits of trained weights, the `rwkv`
package on random official-shape checkpoints, and itself in other chunkings."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from config import ModelConfig
from config import load_model as load_model_config
from engine.kernels import reference
from engine.model.rwkv7 import RWKV7, Batch, ModelDims, State
from engine.model.weights import dummy_model, load_model

SYMBOLS = "0123456789,#"


def model_config(**keys: int) -> ModelConfig:
    shape = dict(num_cells=3, vocab_size=97, embedded_dim=64, num_heads=2) | keys
    return ModelConfig(name="test", **shape)


def reverse_model(shared_dir: Path, dtype: torch.dtype) -> RWKV7:
    cfg = model_config(num_cells=4, vocab_size=12, embedded_dim=32, num_heads=2)
    return load_model(
        shared_dir / "assets/models/rwkv7-reverse-L4-D32.pth", cfg, device="cpu", dtype=dtype
    )


def run(model: RWKV7, tokens: list[int], state: State, slot: int = 0) -> Tensor:
    """Logits of every token; the state in `slot` moves on."""
    slots = torch.tensor([slot])
    batch = Batch(lengths=(len(tokens),), src_slot=slots, dst_slot=slots)
    with torch.inference_mode():
        logits: Tensor = model.head(model(torch.tensor(tokens), batch, state))
    return logits


def greedy(model: RWKV7, prompt: list[int], num_tokens: int, stop: int | None = None) -> list[int]:
    state = model.new_state(1, "cpu")
    logits = run(model, prompt, state)[-1]
    out: list[int] = []
    while len(out) < num_tokens:
        token = int(logits.argmax())
        if token == stop:
            break
        out.append(token)
        logits = run(model, [token], state)[-1]
    return out


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-3)])
def test_logits_of_trained_weights_match_float64_golden(
    shared_dir: Path, dtype: torch.dtype, tolerance: float
) -> None:
    model = reverse_model(shared_dir, dtype)
    golden = np.load(shared_dir / "assets/models/golden_reverse_fp64.npz")
    answers = json.loads((shared_dir / "assets/models/golden_reverse.json").read_text())
    by_size = {len(a["prompt"]) + len(a["greedy"]): a for a in answers}
    for key in golden:
        answer = by_size[golden[key].shape[0]]
        tokens = [SYMBOLS.index(c) for c in answer["prompt"] + answer["greedy"]]
        logits = run(model, tokens, model.new_state(1, "cpu")).double().numpy()
        assert np.abs(logits - golden[key]).max() < tolerance, key


def test_every_greedy_answer_of_the_reverse_model_is_right(shared_dir: Path) -> None:
    model = reverse_model(shared_dir, torch.float32)
    for answer in json.loads((shared_dir / "assets/models/golden_reverse.json").read_text()):
        prompt = [SYMBOLS.index(c) for c in answer["prompt"]]
        out = greedy(model, prompt, 64, stop=SYMBOLS.index("#"))
        assert "".join(SYMBOLS[t] for t in out) == answer["prompt"][-2::-1]


def test_chat_model_matches_float64_golden_and_greedy_text(shared_dir: Path) -> None:
    cfg = model_config(num_cells=4, vocab_size=2048, embedded_dim=128, num_heads=2)
    path = shared_dir / "assets/models/rwkv7-chat-demo-D128-L4-V2048.pth"
    model = load_model(path, cfg, device="cpu", dtype=torch.float32)
    golden = np.load(shared_dir / "assets/models/golden_chat_demo_fp64.npz")
    cases = json.loads((shared_dir / "assets/models/golden_chat_demo.json").read_text())
    for i, case in enumerate(cases):
        logits = run(model, case["ids"], model.new_state(1, "cpu"))[-8:].double().numpy()
        assert np.abs(logits - golden[f"prompt{i}_logits"]).max() < 1e-3
        assert greedy(model, case["ids"], 40) == case["greedy_ids"]


# One size has ranks unlike any other dimension, one has a single head.
OFFICIAL_SHAPES = [
    dict(num_cells=2, vocab_size=128, embedded_dim=64, num_heads=1),
    dict(num_cells=3, vocab_size=300, embedded_dim=128, num_heads=2, w_lora_rank=32,
         a_lora_rank=48, v_lora_rank=16, g_lora_rank=96),
    dict(num_cells=5, vocab_size=512, embedded_dim=256, num_heads=4),
]  # fmt: skip


@pytest.mark.parametrize("shape", OFFICIAL_SHAPES, ids=lambda s: f"D{s['embedded_dim']}")
def test_random_official_checkpoint_matches_the_rwkv_package(
    shape: dict[str, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compare_with_the_rwkv_package(model_config(**shape), tmp_path, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["rwkv-lm-0.1b", "rwkv-lm-0.4b"])
def test_random_checkpoint_of_a_released_shape_matches_the_rwkv_package(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = load_model_config(Path(__file__).parents[2] / "config", name)
    compare_with_the_rwkv_package(cfg, tmp_path, monkeypatch)


def compare_with_the_rwkv_package(
    cfg: ModelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sequence mode over 40 tokens, then token by token from the state it left."""
    tensors = {
        name: t.view(1, 1, -1) if name.split(".")[-1].startswith("x_") else t
        for name, t in dummy_model(cfg, "cpu", torch.float32, seed=1).state_dict().items()
    }
    torch.save(tensors, tmp_path / "model.pth")
    oracle = official_model(tmp_path / "model", monkeypatch)
    ours = load_model(tmp_path / "model.pth", cfg, device="cpu", dtype=torch.float32)
    tokens = torch.randint(0, cfg.vocab_size, (50,), generator=torch.manual_seed(2)).tolist()

    expected, oracle_state = oracle.forward(tokens[:40], None, full_output=True)
    state = ours.new_state(1, "cpu")
    scale = expected.abs().max()
    assert (run(ours, tokens[:40], state) - expected).abs().max() < 1e-4 * scale
    for token in tokens[40:]:  # token by token, from the state the sequence left
        step, oracle_state = oracle.forward([token], oracle_state)
        assert (run(ours, [token], state)[-1] - step).abs().max() < 1e-4 * scale


def official_model(path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    for key, value in {"RWKV_JIT_ON": "0", "RWKV_CUDA_ON": "0", "RWKV_V7_ON": "1"}.items():
        monkeypatch.setitem(os.environ, key, value)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the package's own
        from rwkv.model import RWKV

        return RWKV(model=str(path), strategy="cpu fp32")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_any_chunking_of_a_prompt_equals_token_by_token(dtype: torch.dtype) -> None:
    cfg = model_config(embedded_dim=48, num_heads=3)  # head size 16
    model = dummy_model(cfg, "cpu", dtype)
    tokens = torch.randint(0, cfg.vocab_size, (90,), generator=torch.manual_seed(3)).tolist()
    state = model.new_state(1, "cpu")
    plain = torch.stack([run(model, [token], state)[-1] for token in tokens])
    tolerance = 1e-9 if dtype == torch.float64 else 2e-3
    for cuts in ([90], [1, 89], [64, 26], [33, 1, 31, 25], [7] * 12 + [6]):
        other, position = model.new_state(1, "cpu"), 0
        for size in cuts:
            logits = run(model, tokens[position : position + size], other)
            position += size
            assert (logits[-1] - plain[position - 1]).abs().max() < tolerance
        assert (other.wkv - state.wkv).abs().max() < tolerance
        assert (other.shift - state.shift).abs().max() < tolerance


def test_packed_ragged_batch_equals_each_sequence_alone() -> None:
    model = dummy_model(model_config(), "cpu", torch.float64)
    generator = torch.manual_seed(4)
    lengths = (1, 40, 7, 1, 33)
    parts = [torch.randint(0, 97, (n,), generator=generator) for n in lengths]
    pool = model.new_state(8, "cpu")
    pool.wkv.normal_(generator=generator)
    pool.shift.normal_(generator=generator)
    before = State(pool.wkv.clone(), pool.shift.clone())
    src, dst = torch.tensor([1, 2, 2, 0, 5]), torch.tensor([1, 3, 4, 6, 5])
    with torch.inference_mode():
        logits = model.head(model(torch.cat(parts), Batch(lengths, src, dst), pool))
    for i, part in enumerate(logits.split(lengths)):
        alone = State(before.wkv[src[i]][None].clone(), before.shift[src[i]][None].clone())
        assert torch.allclose(run(model, parts[i].tolist(), alone), part, atol=1e-10)
        assert torch.allclose(pool.wkv[dst[i]], alone.wkv[0], atol=1e-10)
        assert torch.allclose(pool.shift[dst[i]], alone.shift[0], atol=1e-10)
    for slot in (0, 2, 7):  # read only, or not named at all
        assert torch.equal(pool.wkv[slot], before.wkv[slot])
        assert torch.equal(pool.shift[slot], before.shift[slot])


def test_training_form_equals_packed_form_and_has_every_gradient() -> None:
    cfg = model_config()
    model = dummy_model(cfg, "cpu", torch.float64).requires_grad_(True)
    tokens = torch.randint(0, 97, (2, 37), generator=torch.manual_seed(5))
    hidden = model.hidden(tokens)
    for row in range(2):
        expected = run(model, tokens[row].tolist(), model.new_state(1, "cpu"))
        assert torch.allclose(model.head(hidden[row]), expected, atol=1e-10)
    targets = tokens.roll(-1, 1).reshape(-1)
    loss = reference.cross_entropy_l2wrap(hidden.flatten(0, 1), model.head.weight, targets)
    loss.backward()
    without = {name for name, p in model.named_parameters() if p.grad is None}
    assert without == {"blocks.0.att.v0", "blocks.0.att.v1", "blocks.0.att.v2"}
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    hidden = model.hidden(tokens, grad_checkpoint=True)
    reference.cross_entropy_l2wrap(hidden.flatten(0, 1), model.head.weight, targets).backward()
    for name, expected in gradients.items():
        assert torch.allclose(model.get_parameter(name).grad, expected, atol=1e-12), name


def test_0_1b_has_the_published_number_of_parameters() -> None:
    dims = ModelDims(
        num_cells=12, vocab_size=65536, embedded_dim=768, head_size=64, ffn_dim=3072,
        w_lora_rank=64, a_lora_rank=64, v_lora_rank=32, g_lora_rank=128,
    )  # fmt: skip
    with torch.device("meta"):
        model = RWKV7(dims)
    assert sum(p.numel() for p in model.parameters()) == 191_084_544
