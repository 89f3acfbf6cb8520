"""int8 matrices: what is quantized, how well, and that the model computes what its numbers say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from config import ModelConfig
from engine.errors import WeightsError
from engine.kernels import reference
from engine.kernels.backend import INT8_GROUP, Batch
from engine.model import quantize as quantizing
from engine.model.quantize import Int8Linear, quantize
from engine.model.rwkv7 import RWKV7
from engine.model.weights import dummy_model, fingerprint, load_model, save_safetensors

CFG = ModelConfig(name="test", num_cells=2, vocab_size=50, embedded_dim=64, num_heads=4)
MATRICES = {"receptance", "key", "value", "output", "head"}


def matrix(num_outputs: int, num_inputs: int) -> Tensor:
    """Rows of very different size, as trained matrices have them, and one of zeros."""
    generator = torch.manual_seed(num_outputs)
    weight = torch.randn(num_outputs, num_inputs, generator=generator, dtype=torch.float64)
    weight *= torch.logspace(-6, 2, num_outputs, dtype=torch.float64).unsqueeze(1)
    weight[-1] = 0
    return weight


def groups(x: Tensor) -> Tensor:
    return x.unflatten(1, (-1, INT8_GROUP))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_no_weight_moves_by_more_than_half_a_scale(dtype: torch.dtype) -> None:
    exact = matrix(40, 192).to(dtype)
    packed, scale = quantize(exact, "cpu")
    assert (packed.dtype, packed.shape) == (torch.int8, (40, 192))
    assert (scale.dtype, scale.shape) == (torch.float16, (40, 3))
    found = reference.dequantize(packed, scale, torch.float64)
    moved = groups((found - exact.double()).abs()).amax(-1)
    assert (moved <= scale.double() * (0.5 + 1e-5)).all()
    # The scale is the smallest that will do; in float16 it has 11 bits, or steps of 2**-24.
    least = groups(exact.double().abs()).amax(-1) / 127
    assert (scale.double() <= least * (1 + 2.0**-10) + 2.0**-24).all()


def test_zeros_stay_zeros_and_the_largest_stay_the_largest() -> None:
    weight = torch.zeros(2, 128)
    weight[0, 3], weight[0, 70], weight[1, 5] = -4.0, 1e-30, 0.1
    packed, scale = quantize(weight, "cpu")
    assert packed[0, 3] == -127
    assert packed[1, 5] == 127
    assert packed.count_nonzero() == 2
    assert scale[1, 1] == 0


def test_rows_at_once_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = matrix(50, 128)
    x = torch.randn(3, 128, generator=torch.manual_seed(1), dtype=torch.float64)
    packed, scale = quantize(weight, "cpu")
    y = reference.int8_linear(x, packed, scale)
    monkeypatch.setattr(quantizing, "ELEMENTS_AT_ONCE", 7 * 128)
    monkeypatch.setattr(reference, "DEQUANTIZED_ELEMENTS", 1)
    again = quantize(weight, "cpu")
    assert torch.equal(packed, again[0])
    assert torch.equal(scale, again[1])
    # Products of fewer columns may add in another order.
    assert torch.allclose(reference.int8_linear(x, packed, scale), y, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_reference_multiplies_by_what_the_numbers_say(dtype: torch.dtype) -> None:
    packed, scale = quantize(matrix(30, 128), "cpu")
    x = torch.randn(2, 5, 128, generator=torch.manual_seed(1), dtype=torch.float64).to(dtype)
    y = reference.int8_linear(x, packed, scale)
    assert (y.dtype, y.shape) == (dtype, (2, 5, 30))
    for o in range(30):  # written out, number by number
        row = [float(packed[o, i]) * float(scale[o, i // 64]) for i in range(128)]
        expected = x.double() @ torch.tensor(row, dtype=torch.float64)
        tolerance = 20 * torch.finfo(dtype).eps * float(expected.abs().max())
        assert (y[..., o].double() - expected).abs().max() <= tolerance
    assert torch.allclose(reference.int8_linear(x[0, 0], packed, scale), y[0, 0], rtol=0.05)


@torch.inference_mode()
def run(model: RWKV7, num_tokens: int = 12) -> Tensor:
    tokens = torch.arange(num_tokens) * 7 % CFG.vocab_size
    logits: Tensor = model.head(model.hidden(tokens.unsqueeze(0))[0])
    return logits


def test_every_matrix_is_quantized_and_nothing_else() -> None:
    plain = dummy_model(CFG, "cpu", torch.float32, seed=3)
    model = dummy_model(CFG, "cpu", torch.float32, seed=3, is_int8=True)
    linears = {name for name, x in plain.named_modules() if isinstance(x, nn.Linear)}
    assert {name.split(".")[-1] for name in linears} == MATRICES
    packed = {name for name, x in model.named_modules() if isinstance(x, Int8Linear)}
    assert packed == linears
    assert not any(isinstance(x, nn.Linear) for x in model.modules())
    others = model.state_dict().items()
    for name, tensor in others:
        if name.rpartition(".")[0] not in packed:
            assert torch.equal(tensor, plain.state_dict()[name]), name
    assert (
        model.num_parameters == plain.num_parameters == sum(p.numel() for p in plain.parameters())
    )


def test_model_equals_one_of_the_dequantized_weights() -> None:
    model = dummy_model(CFG, "cpu", torch.float64, is_int8=True)
    tensors = dict(model.state_dict())
    for name in [name for name in tensors if name.endswith(".scale")]:
        weight = name.replace(".scale", ".weight")
        tensors[weight] = reference.dequantize(tensors[weight], tensors.pop(name), torch.float64)
    plain = dummy_model(CFG, "cpu", torch.float64, seed=9)
    plain.load_state_dict(tensors)
    assert torch.allclose(run(model), run(plain), rtol=1e-10, atol=1e-10)


def test_int8_moves_logits_a_little() -> None:
    plain, int8 = (dummy_model(CFG, "cpu", torch.float32, is_int8=x) for x in (False, True))
    error = (run(int8) - run(plain)).norm() / run(plain).norm()
    assert 1e-4 < error < 3e-2


def test_prompt_in_any_chunks_equals_token_by_token() -> None:
    model = dummy_model(CFG, "cpu", torch.float64, is_int8=True)
    tokens = torch.arange(40) * 3 % CFG.vocab_size
    slot = torch.zeros(1, dtype=torch.int64)
    results = []
    with torch.inference_mode():
        for cuts in ([40], [1] * 40, [16, 1, 23]):
            state = model.new_state(1, "cpu")
            hidden = [model(x, Batch((len(x),), slot, slot), state) for x in tokens.split(cuts)]
            results.append((model.head(torch.cat(hidden)), state.wkv))
    for logits, wkv in results[1:]:
        assert torch.allclose(logits, results[0][0], rtol=1e-9, atol=1e-9)
        assert torch.allclose(wkv, results[0][1], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32])
def test_a_file_is_quantized_from_the_numbers_it_holds(
    tmp_path: Path, suffix: str, stored: torch.dtype
) -> None:
    tensors = dummy_model(CFG, "cpu", stored, seed=5).state_dict()
    path = tmp_path / f"model{suffix}"
    if suffix == ".pth":
        torch.save(tensors, path)
    else:
        save_safetensors(path, tensors)
    model = load_model(path, CFG, "cpu", torch.bfloat16, is_int8=True)
    assert model.emb.weight.dtype == torch.bfloat16
    found = model.state_dict()
    for name in ("blocks.1.att.key", "blocks.0.ffn.value", "head"):
        packed, scale = quantize(tensors[f"{name}.weight"], "cpu")
        assert torch.equal(found[f"{name}.weight"], packed)
        assert torch.equal(found[f"{name}.scale"], scale)


def test_states_of_both_kinds_are_told_apart() -> None:
    plain, int8 = (dummy_model(CFG, "cpu", torch.float32, is_int8=x) for x in (False, True))
    assert fingerprint(plain.state_dict()) != fingerprint(int8.state_dict())
    scale = int8.state_dict()["blocks.1.ffn.value.scale"]
    before = fingerprint(int8.state_dict())
    scale[3] *= 2
    assert fingerprint(int8.state_dict()) != before


@pytest.mark.parametrize("value", [torch.inf, torch.nan, 1e8])
def test_weights_that_no_scale_expresses_are_one_clear_error(tmp_path: Path, value: float) -> None:
    tensors = dummy_model(CFG, "cpu", torch.float32).state_dict()
    tensors["blocks.1.ffn.key.weight"][2, 3] = value
    path = tmp_path / "model.pth"
    torch.save(tensors, path)
    with pytest.raises(WeightsError, match=r"model\.pth: blocks\.1\.ffn\.key\.weight holds inf"):
        load_model(path, CFG, "cpu", torch.float32, is_int8=True)


def test_a_backend_set_on_the_model_serves_its_matrices() -> None:
    model = dummy_model(CFG, "cpu", torch.float32, is_int8=True)
    seen: list[str] = []

    class Spy:
        def __getattr__(self, name: str) -> object:
            seen.append(name)
            return getattr(reference, name)

    model.kernels = Spy()  # type: ignore[assignment]
    run(model)
    assert seen.count("int8_linear") == 2 * 5 + 1  # of two layers, and the head
    assert seen.count("int8_channel_mix") == 2
    assert "channel_mix" not in seen


def test_trained_model_says_nearly_every_token_as_before(shared_dir: Path) -> None:
    """Token by token beside the greedy answers of float64."""
    models = shared_dir / "assets" / "models"
    cfg = ModelConfig(name="demo", num_cells=4, vocab_size=2048, embedded_dim=128, num_heads=2)
    path = models / "rwkv7-chat-demo-D128-L4-V2048.pth"
    model = load_model(path, cfg, "cpu", torch.float32, is_int8=True)
    slot = torch.zeros(1, dtype=torch.int64)
    for case in json.loads((models / "golden_chat_demo.json").read_text()):
        ids = [*case["ids"], *case["greedy_ids"]]
        with torch.inference_mode():
            hidden = model(
                torch.tensor(ids), Batch((len(ids),), slot, slot), model.new_state(1, "cpu")
            )
            found = model.head(hidden[len(case["ids"]) - 1 : -1]).argmax(-1).tolist()
        same = sum(map(int.__eq__, found, case["greedy_ids"]))
        assert same >= 38, f"{same} of {len(found)}"
