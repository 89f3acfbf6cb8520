"""A checkpoint of random weights in an official shape, as benchmarks need one without a download.

Names, shapes and bfloat16 are those of the official files; values are of a sane scale and make no
sense. Ranks are those of the released checkpoints.
"""

from __future__ import annotations

from pathlib import Path

import torch

from engine.model.rwkv7 import RWKV7, ModelDims


def _dims(num_cells: int, embedded_dim: int) -> ModelDims:
    return ModelDims(
        num_cells=num_cells,
        vocab_size=65536,
        embedded_dim=embedded_dim,
        head_size=64,
        ffn_dim=4 * embedded_dim,
        w_lora_rank=64,
        a_lora_rank=64,
        v_lora_rank=32,
        g_lora_rank=128,
    )


SHAPES = {
    "0.1b": _dims(12, 768),
    "0.4b": _dims(24, 1024),
    "tiny": ModelDims(
        num_cells=2,
        vocab_size=65536,
        embedded_dim=128,
        head_size=64,
        ffn_dim=512,
        w_lora_rank=32,
        a_lora_rank=32,
        v_lora_rank=32,
        g_lora_rank=32,
    ),
}


def write_checkpoint(dims: ModelDims, path: Path, seed: int = 0) -> None:
    with torch.device("meta"):
        expected = RWKV7(dims).state_dict()
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, meta in expected.items():
        if name.endswith("weight") and meta.dim() == 1:  # norms
            value = torch.ones(meta.shape)
        elif meta.dim() == 2 and not name.endswith("r_k"):
            value = torch.empty(meta.shape).normal_(0, meta.shape[-1] ** -0.5, generator=generator)
        else:
            value = torch.empty(meta.shape).uniform_(-0.5, 0.5, generator=generator)
        tensors[name] = value.bfloat16()
    torch.save(tensors, path)
