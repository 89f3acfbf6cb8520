"""Parameter groups by name, and AdamW against the formula written out."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from tests.train.runs import tiny_model, train_config
from train.init import init_weights
from train.optim import group_of, load_moments, make_optimizer, moments, set_learning_rate

DECAYED = {
    "att.receptance.weight", "att.key.weight", "att.value.weight", "att.output.weight",
    "ffn.key.weight", "ffn.value.weight",
}  # fmt: skip


def test_only_weight_matrices_are_decayed_and_only_w0_learns_twice_as_fast() -> None:
    for name, parameter in tiny_model().named_parameters():
        group = group_of(name, parameter.shape)
        short = name.split(".", 2)[2] if name.startswith("blocks.") else name
        assert group.has_decay == (short in DECAYED | {"emb.weight", "head.weight"}), name
        assert group.lr_scale == (2.0 if short == "att.w0" else 1.0), name


def test_every_parameter_is_in_one_group(tmp_path: Path) -> None:
    model = tiny_model()
    optimizer = make_optimizer(model, train_config(tmp_path))
    grouped = [p for group in optimizer.param_groups for p in group["params"]]
    assert len(grouped) == len({id(p) for p in grouped}) == len(list(model.parameters()))
    assert {(g["lr_scale"], g["weight_decay"]) for g in optimizer.param_groups} == {
        (1.0, 0.1),
        (1.0, 0.0),
        (2.0, 0.0),
    }


def _by_hand(
    weight: float, grads: list[float], lr: float, decay: float, b1: float, b2: float, eps: float
) -> float:
    m = v = 0.0
    for t, g in enumerate(grads, 1):
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        weight -= lr * decay * weight
        weight -= lr * (m / (1 - b1**t)) / (math.sqrt(v / (1 - b2**t)) + eps)
    return weight


@pytest.mark.parametrize("grads", [[0.3, -0.1], [1e-12, 1e-12], [0.0, 0.0], [0.0, 2.0]])
def test_steps_equal_the_formula_including_zero_gradients(
    tmp_path: Path, grads: list[float]
) -> None:
    model = tiny_model()
    init_weights(model, 0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = make_optimizer(model, train_config(tmp_path))
    set_learning_rate(optimizer, 0.01)
    for g in grads:
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, g)
        optimizer.step()
    for name, parameter in model.named_parameters():
        group = group_of(name, parameter.shape)
        old, new = before[name].flatten()[3].item(), parameter.flatten()[3].item()
        decay = 0.1 if group.has_decay else 0.0
        expected = _by_hand(old, grads, 0.01 * group.lr_scale, decay, 0.9, 0.99, 1e-18)
        assert new == pytest.approx(expected, rel=2e-6, abs=1e-8), name
        assert parameter.isfinite().all()


def test_moments_survive_saving_and_loading(tmp_path: Path) -> None:
    cfg = train_config(tmp_path)
    a, b = tiny_model(), tiny_model()
    for model in (a, b):
        init_weights(model, 0)
    first, second = make_optimizer(a, cfg), make_optimizer(b, cfg)
    skipped = "blocks.0.ffn.x_k"
    for name, parameter in a.named_parameters():
        parameter.grad = None if name == skipped else torch.ones_like(parameter)
    first.step()
    b.load_state_dict(a.state_dict())
    saved = {name: tensor.clone() for name, tensor in moments(first, a).items()}
    assert f"{skipped}:step" not in saved
    load_moments(second, b, saved)
    for optimizer, model in ((first, a), (second, b)):
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, -0.5)
        optimizer.step()
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
