"""Initial weights of a new RWKV-7, as RWKV-LM draws them (RWKV-v7/train_temp, `better init`).

Knows parameter names and shapes, not how the model computes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from config.errors import ConfigError
from engine.model.rwkv7 import RWKV7, ModelDims


@torch.no_grad()
def init_weights(model: RWKV7, seed: int) -> None:
    """Fill every parameter in place, in float32 on the CPU: the same for any device.

    Right after it the loss is close to ln(vocab_size).
    """
    if model.dims.num_cells < 2:
        raise ConfigError(
            "the initial values depend on a layer's place among at least 2 layers",
            key="num_cells",
            value=model.dims.num_cells,
        )
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        value = initial_value(name, parameter.shape, model.dims, generator)
        assert value.shape == parameter.shape, name
        parameter.copy_(value)


def initial_value(
    name: str, shape: torch.Size, dims: ModelDims, generator: torch.Generator
) -> Tensor:
    """The initial value of one parameter by its official name."""
    if name == "emb.weight":
        return torch.empty(shape).uniform_(-1e-4, 1e-4, generator=generator)
    if name == "head.weight":
        gain = 0.5 * math.sqrt(max(1.0, dims.vocab_size / dims.embedded_dim))
        return _orthogonal(shape, gain, generator)
    if not name.startswith("blocks.") or (".ln" in name and "ln_x" not in name):
        return torch.ones(shape) if name.endswith("weight") else torch.zeros(shape)
    _, layer, part, key = name.split(".", 3)
    if part == "ffn":
        return _channel_mix(key, shape, int(layer), dims, generator)
    return _time_mix(key, shape, int(layer), dims, generator)


def _channel_mix(
    key: str, shape: torch.Size, layer: int, dims: ModelDims, generator: torch.Generator
) -> Tensor:
    if key == "x_k":
        left = 1 - layer / dims.num_cells
        return (1 - _channels(dims) ** (left**4)).view(shape)
    if key == "key.weight":
        return _orthogonal(shape, 1.0, generator)
    assert key == "value.weight", key
    return torch.zeros(shape)


def _time_mix(
    key: str, shape: torch.Size, layer: int, dims: ModelDims, generator: torch.Generator
) -> Tensor:
    depth, left = layer / (dims.num_cells - 1), 1 - layer / dims.num_cells
    C, N = dims.embedded_dim, dims.head_size
    index = torch.arange(C, dtype=torch.float32)
    ramp = index / (C - 1)  # 0 .. 1 over all channels
    linear = ramp - 0.5
    centred = (index % N - (N - 1) / 2) / ((N - 1) / 2)  # -1 .. 1 over each head
    zigzag = centred * centred.abs()
    if key in _SHIFT_POWERS:
        return (1 - _channels(dims) ** (_SHIFT_POWERS[key] * left)).view(shape)
    if key in ("w1", "a1", "v1", "g1", "output.weight", "ln_x.bias"):
        return torch.zeros(shape)
    if key in ("w2", "a2", "v2", "g2", "key.weight"):
        return _orthogonal(shape, 0.1, generator)
    if key in ("receptance.weight", "value.weight"):
        return _orthogonal(shape, 1.0, generator)
    if key == "ln_x.weight":
        return torch.full(shape, ((1 + layer) / dims.num_cells) ** 0.7)
    if key == "r_k":
        return torch.full(shape, -0.04)
    vectors: dict[str, Tensor] = {
        "w0": -6 + 6 * ramp ** (1 + depth**0.3) + 0.5 + 2.5 * zigzag,
        "a0": -0.19 + 0.3 * zigzag + 0.4 * linear,
        "v0": 0.73 - 0.4 * linear,
        "k_k": 0.71 - 0.1 * linear,
        "k_a": torch.full((C,), 1.02),
    }
    return vectors[key].view(shape)


_SHIFT_POWERS = {"x_r": 0.2, "x_g": 0.2, "x_w": 0.9, "x_a": 0.9, "x_k": 0.7, "x_v": 0.7}


def _channels(dims: ModelDims) -> Tensor:
    return torch.arange(dims.embedded_dim, dtype=torch.float32) / dims.embedded_dim


def _orthogonal(shape: torch.Size, gain: float, generator: torch.Generator) -> Tensor:
    value = torch.empty(shape)
    nn.init.orthogonal_(value, gain=gain, generator=generator)
    return value
