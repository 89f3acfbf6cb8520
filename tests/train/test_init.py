"""Initial weights: names, shapes, closed forms and statistics of RWKV-LM's recipe."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from config.errors import ConfigError
from config.schema import ModelConfig
from engine.kernels.reference import cross_entropy_l2wrap
from engine.model.rwkv7 import RWKV7, ModelDims
from tests.train.runs import TINY, tiny_model
from train.init import init_weights

SMALL = ModelConfig(name="small", num_cells=3, vocab_size=500, embedded_dim=128, num_heads=2)
C, L, N = 128, 3, 64


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    model = RWKV7(ModelDims.from_config(SMALL))
    init_weights(model, 7)
    return {name: value.detach().squeeze() for name, value in model.named_parameters()}


def test_official_size_has_the_published_number_of_parameters() -> None:
    cfg = ModelConfig(name="x", num_cells=12, vocab_size=65_536, embedded_dim=768, num_heads=12)
    with torch.device("meta"):
        model = RWKV7(ModelDims.from_config(cfg))
    unused = sum(p.numel() for n, p in model.named_parameters() if "blocks.0.att.v" in n[:-1]
                 and n.rsplit(".", 1)[1] in ("v0", "v1", "v2"))  # fmt: skip
    assert sum(p.numel() for p in model.parameters()) - unused == 191_034_624
    assert unused in (0, 49_920)


def test_every_parameter_is_filled(weights: dict[str, torch.Tensor]) -> None:
    assert all(value.isfinite().all() for value in weights.values())


@pytest.mark.parametrize("layer", range(L))
@pytest.mark.parametrize("channel", [0, 1, 63, 64, 127])
def test_vectors_have_their_closed_forms(
    weights: dict[str, torch.Tensor], layer: int, channel: int
) -> None:
    def value(name: str) -> float:
        return weights[f"blocks.{layer}.{name}"][channel].item()

    left, depth = 1 - layer / L, layer / (L - 1)
    ddd, linear = channel / C, channel / (C - 1) - 0.5
    z = (channel % N - 31.5) / 31.5
    zigzag = z * abs(z)
    www = -6 + 6 * (channel / (C - 1)) ** (1 + depth**0.3)
    expected = {
        "att.x_r": 1 - ddd ** (0.2 * left),
        "att.x_g": 1 - ddd ** (0.2 * left),
        "att.x_w": 1 - ddd ** (0.9 * left),
        "att.x_a": 1 - ddd ** (0.9 * left),
        "att.x_k": 1 - ddd ** (0.7 * left),
        "att.x_v": 1 - ddd ** (0.7 * left),
        "att.w0": www + 0.5 + 2.5 * zigzag,
        "att.a0": -0.19 + 0.3 * zigzag + 0.4 * linear,
        "att.v0": 0.73 - 0.4 * linear,
        "att.k_k": 0.71 - 0.1 * linear,
        "att.k_a": 1.02,
        "att.ln_x.weight": ((1 + layer) / L) ** 0.7,
        "att.ln_x.bias": 0.0,
        "ffn.x_k": 1 - ddd ** (left**4),
        "ln1.weight": 1.0,
        "ln2.bias": 0.0,
    }
    for name, number in expected.items():
        assert value(name) == pytest.approx(number, abs=2e-6), name
    assert (weights[f"blocks.{layer}.att.r_k"] == torch.tensor(-0.04)).all()


@pytest.mark.parametrize("layer", range(L))
@pytest.mark.parametrize("name", ["w1", "a1", "v1", "g1", "output.weight"])
def test_outer_factors_start_at_zero(
    weights: dict[str, torch.Tensor], layer: int, name: str
) -> None:
    assert not weights[f"blocks.{layer}.att.{name}"].any()
    assert not weights[f"blocks.{layer}.ffn.value.weight"].any()


def _gains(matrix: torch.Tensor) -> torch.Tensor:
    values: torch.Tensor = torch.linalg.svdvals(matrix)
    return values


@pytest.mark.parametrize(
    ("name", "gain"),
    [
        ("att.receptance.weight", 1.0),
        ("att.key.weight", 0.1),
        ("att.value.weight", 1.0),
        ("ffn.key.weight", 1.0),
        ("att.w2", 0.1),
        ("att.a2", 0.1),
        ("att.v2", 0.1),
        ("att.g2", 0.1),
    ],
)
def test_matrices_are_orthogonal_with_their_gain(
    weights: dict[str, torch.Tensor], name: str, gain: float
) -> None:
    values = _gains(weights[f"blocks.1.{name}"])
    torch.testing.assert_close(values, torch.full_like(values, gain), atol=1e-5, rtol=0)


def test_head_gain_grows_with_the_vocabulary(weights: dict[str, torch.Tensor]) -> None:
    values = _gains(weights["head.weight"])
    expected = 0.5 * math.sqrt(500 / 128)
    torch.testing.assert_close(values, torch.full_like(values, expected), atol=1e-5, rtol=0)


def test_embedding_is_uniform_and_tiny(weights: dict[str, torch.Tensor]) -> None:
    emb = weights["emb.weight"]
    assert emb.abs().max() <= 1e-4
    assert emb.std().item() == pytest.approx(2e-4 / math.sqrt(12), rel=0.02)
    assert abs(emb.mean().item()) < 2e-6


def test_first_loss_is_that_of_a_model_that_knows_nothing() -> None:
    cfg = dataclasses.replace(SMALL, vocab_size=2048)
    model = RWKV7(ModelDims.from_config(cfg))
    init_weights(model, 1)
    tokens = torch.randint(0, 2048, (4, 65), generator=torch.Generator().manual_seed(0))
    hidden = model.hidden(tokens[:, :-1]).flatten(0, 1)
    loss = cross_entropy_l2wrap(hidden, model.head.weight, tokens[:, 1:].flatten(), False)
    assert loss.item() == pytest.approx(math.log(2048) + 0.121, abs=0.1)
    # Averaged over all targets there is no luck in it: ln V plus half the variance of the
    # logits, which is (0.5 * ln_out)^2 with ln_out a little below 1.
    logits = model.head(hidden)
    expected = (logits.logsumexp(-1).mean() - logits.mean()).item()
    assert expected == pytest.approx(math.log(2048) + 0.121, abs=0.005)


def test_the_seed_alone_decides() -> None:
    models = [tiny_model() for _ in range(3)]
    for model, seed in zip(models, (1, 1, 2), strict=True):
        torch.randn(3)  # the global generator has no say
        init_weights(model, seed)
    a, b, c = (model.state_dict() for model in models)
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a["head.weight"], c["head.weight"])


def test_one_layer_is_refused() -> None:
    model = tiny_model(dataclasses.replace(TINY, num_cells=1))
    with pytest.raises(ConfigError, match="num_cells = 1"):
        init_weights(model, 0)
