"""Parameter groups by name, and AdamW against the formula written out."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.train.runs import tiny_model, train_config
from train.init import init_weights
from train.optim import AdamW, Group, Outcome, group_of

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


def test_every_parameter_is_a_view_of_its_groups_range(tmp_path: Path) -> None:
    model = tiny_model()
    init_weights(model, 0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = AdamW(model, train_config(tmp_path))
    assert set(optimizer.groups) == {Group(1.0, True), Group(1.0, False), Group(2.0, False)}
    assert sum(x.stop - x.start for x in optimizer.groups.values()) == optimizer.weights.numel()
    taken = torch.zeros(optimizer.weights.numel())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]), name
        place = optimizer.groups[group_of(name, parameter.shape)]
        assert parameter.grad is not None
        for tensor, buffer in ((parameter, optimizer.weights), (parameter.grad, optimizer.grads)):
            start = (tensor.data_ptr() - buffer.data_ptr()) // 4
            assert start % 64 == 0
            assert place.start <= start
            assert start + tensor.numel() <= place.stop
        taken[start : start + parameter.numel()] += 1
    assert taken.max() == 1


def _by_hand(
    weight: float, grads: list[float], lr: float, decay: float, b1: float, b2: float, eps: float
) -> float:
    m = v = 0.0
    for t, g in enumerate(grads, 1):
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        weight -= lr * decay * weight
        weight -= lr * (m / (1 - b1**t)) / (math.sqrt(v / (1 - b2**t)) + eps)
    return weight


def _step(optimizer: AdamW, model: nn.Module, grad: float, lr: float = 0.01) -> Outcome:
    for parameter in model.parameters():
        assert parameter.grad is not None
        parameter.grad.fill_(grad)
    return optimizer.step(torch.zeros(()), lr)


@pytest.mark.parametrize("grads", [[0.3, -0.1], [1e-12, 1e-12], [0.0, 0.0], [0.0, 2.0]])
def test_steps_equal_the_formula_including_zero_gradients(
    tmp_path: Path, grads: list[float]
) -> None:
    model = tiny_model()
    init_weights(model, 0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = AdamW(model, train_config(tmp_path, gradient_clip_val=1e9))
    for g in grads:
        assert _step(optimizer, model, g).is_finite
    for name, parameter in model.named_parameters():
        group = group_of(name, parameter.shape)
        old, new = before[name].flatten()[3].item(), parameter.flatten()[3].item()
        decay = 0.1 if group.has_decay else 0.0
        expected = _by_hand(old, grads, 0.01 * group.lr_scale, decay, 0.9, 0.99, 1e-18)
        assert new == pytest.approx(expected, rel=2e-6, abs=1e-8), name
        assert parameter.isfinite().all()


def test_weights_follow_those_of_torch_with_clipped_gradients(tmp_path: Path) -> None:
    cfg = train_config(tmp_path)
    ours, theirs = tiny_model(), tiny_model()
    for model in (ours, theirs):
        init_weights(model, 0)
    optimizer = AdamW(ours, cfg)
    members: dict[Group, list[nn.Parameter]] = {}
    for name, parameter in theirs.named_parameters():
        members.setdefault(group_of(name, parameter.shape), []).append(parameter)
    peer = torch.optim.AdamW(
        [
            {"params": x, "lr": 0.01 * g.lr_scale, "weight_decay": 0.1 * g.has_decay}
            for g, x in members.items()
        ],
        betas=(cfg.adam_beta1, cfg.adam_beta2),
        eps=cfg.adam_eps,
    )
    generator = torch.Generator().manual_seed(0)
    for scale in (1e-4, 1.0, 10.0):  # norms below and above 1
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            b.grad = torch.randn(b.shape, generator=generator) * scale
            assert a.grad is not None
            a.grad.copy_(b.grad)
        norm = torch.nn.utils.clip_grad_norm_(theirs.parameters(), cfg.gradient_clip_val)
        peer.step()
        assert optimizer.step(torch.zeros(()), 0.01).grad_norm == pytest.approx(norm.item(), 1e-6)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_step_that_is_not_finite_changes_nothing(tmp_path: Path, what: str) -> None:
    model = tiny_model()
    init_weights(model, 0)
    optimizer = AdamW(model, train_config(tmp_path))
    _step(optimizer, model, 1.0)
    before = [x.clone() for x in (optimizer.weights, optimizer.exp_avg, optimizer.exp_avg_sq)]
    if what == "gradient":
        optimizer.grads[5] = math.inf
    loss = torch.tensor(math.nan if what == "loss" else 1.0)
    assert not optimizer.step(loss, 0.01).is_finite
    after = (optimizer.weights, optimizer.exp_avg, optimizer.exp_avg_sq)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert optimizer.num_steps == 1


def test_moments_survive_saving_and_loading(tmp_path: Path) -> None:
    cfg = train_config(tmp_path)
    a, b = tiny_model(), tiny_model()
    for model in (a, b):
        init_weights(model, 0)
    first, second = AdamW(a, cfg), AdamW(b, cfg)
    _step(first, a, 1.0)
    b.load_state_dict(a.state_dict())
    saved = {name: tensor.clone() for name, tensor in first.moments().items()}
    second.load_moments(saved)
    for optimizer, model in ((first, a), (second, b)):
        _step(optimizer, model, -0.5)
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def test_moments_may_lack_parameters_that_never_had_a_gradient(tmp_path: Path) -> None:
    model = tiny_model()
    init_weights(model, 0)
    optimizer = AdamW(model, train_config(tmp_path))
    _step(optimizer, model, 1.0)
    unused = "blocks.0.att.v0:"
    saved = {k: x.clone() for k, x in optimizer.moments().items() if not k.startswith(unused)}
    other = AdamW(tiny_model(), train_config(tmp_path))
    other.load_moments(saved)
    assert other.num_steps == 1
    assert not other.moments()[unused + "exp_avg"].any()
