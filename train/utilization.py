"""How much of a device's arithmetic a run uses: model FLOP utilisation (MFU). Knows no clock.

MFU counts the products that the model needs, whatever was computed: layers computed again for
their gradients (`grad_checkpoint`) do not raise it. Defined in PaLM, arXiv 2204.02311, appendix B.
"""

from __future__ import annotations

import torch

from engine.model.rwkv7 import RWKV7

# Dense products in bf16 with sums in float32, in TFLOP/s, by NVIDIA's data sheets: half of those
# "with sparsity". Under the names that CUDA gives: a part of a GPU (MIG) has another, and no peak.
PEAK_BF16_TFLOP_PER_S = {
    "NVIDIA A100-PCIE-40GB": 312.0,
    "NVIDIA A100 80GB PCIe": 312.0,
    "NVIDIA A100-SXM4-40GB": 312.0,
    "NVIDIA A100-SXM4-80GB": 312.0,
    "NVIDIA H100 80GB HBM3": 989.5,
    "NVIDIA H100 PCIe": 756.5,
    "NVIDIA H200": 989.5,
    "NVIDIA B200": 2250.0,
    "NVIDIA L4": 121.0,
    "NVIDIA L40S": 362.0,
    "NVIDIA GeForce RTX 3090": 71.0,
    "NVIDIA GeForce RTX 4090": 165.2,
}


def training_flop_per_token(model: RWKV7) -> int:
    """Of forward and backward: two per weight of a product, and twice as many for the gradients.

    The recurrence has 9 per element of a state: 2 for Sᵀa, 5 for the new state, 2 for Sᵀr. The
    embedding is looked up, not multiplied; work on vectors is left out, as is usual.
    """
    dims = model.dims
    C, num_layers = dims.embedded_dim, dims.num_cells
    ranks = dims.w_lora_rank + dims.a_lora_rank + dims.g_lora_rank
    num_weights = num_layers * (4 * C * C + 2 * C * dims.ffn_dim + 2 * C * ranks)
    num_weights += (num_layers - 1) * 2 * C * dims.v_lora_rank  # the first layer has no residual
    num_weights += dims.vocab_size * C
    num_state_elements = num_layers * C * dims.head_size
    return 3 * (2 * num_weights + 9 * num_state_elements)


def peak_tokens_per_s(model: RWKV7, device: torch.device, dtype: str) -> float | None:
    """At full use of the device; None where its peak in the type of the products is not known."""
    if device.type != "cuda" or dtype != "bfloat16":
        return None
    peak = PEAK_BF16_TFLOP_PER_S.get(torch.cuda.get_device_name(device))
    return None if peak is None else peak * 1e12 / training_flop_per_token(model)
