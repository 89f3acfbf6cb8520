"""How LayerNorm with token shift is launched, and what it may need of a GPU."""

from __future__ import annotations

import triton
import triton.language as tl

from engine.kernels.gpu.norm_mix import choose_block, choose_num_warps, norm_mix_kernel
from engine.kernels.reference import LAYER_NORM_EPS
from tests.engine.kernels.machine_code import Case, Limits

SLOTS = dict.fromkeys(("src_ptr", "dst_ptr", "starts_ptr", "sequences_ptr"), "*i64")


def case(
    row_type: str,
    pool_type: str,
    num_tokens: int,
    channels: int,
    ways: int,
    limits: Limits,
    out_type: str | None = None,
    is_training: bool = False,
) -> Case:
    width = triton.next_power_of_2(channels)
    pointers = dict.fromkeys(norm_mix_kernel.arg_names, f"*{row_type}")
    pointers |= dict(pool_ptr=f"*{pool_type}", out_ptr=f"*{out_type or row_type}") | SLOTS
    return Case(
        name=f"norm_mix {row_type} pool {pool_type} T={num_tokens} C={channels} J={ways}"
        + " training" * is_training,
        kernel=norm_mix_kernel,
        types=pointers | dict(slot_stride="i32", num_tokens="i32", num_channels="i32"),
        constants=dict(
            J=ways,
            WIDTH=width,
            BLOCK=choose_block(num_tokens, channels),
            SINGLE=num_tokens < 512,
            KEEPS=not is_training,
            COMPUTE=tl.float32,
            EPS=LAYER_NORM_EPS,
        ),
        limits=limits,
        aligned=("slot_stride", "num_channels"),
        num_warps=choose_num_warps(width),
    )


# A thread has 8 channels: one or two wide loads for each vector. Up to 64 registers leave room for
# all 2048 threads of a multiprocessor at half, those of one token being at most 512.
FEW = Limits(registers=64, shared_bytes=1024, wide_loads=1)
MANY = Limits(registers=80, shared_bytes=1024, wide_loads=8, wide_stores=6)
# Rows in half precision and a pool in single are laid out anew in shared memory.
MIXED = Limits(registers=80, shared_bytes=16 * 1024, wide_loads=8, wide_stores=3)
CASES = [
    case("bf16", "bf16", 1, 768, 6, FEW),
    case("bf16", "bf16", 1, 4096, 6, FEW),
    case("bf16", "bf16", 1, 4096, 1, FEW),
    case("fp16", "fp16", 64, 2560, 6, FEW),
    case("bf16", "bf16", 4096, 768, 6, MANY),
    case("bf16", "bf16", 4096, 4096, 6, MANY),
    case("fp16", "fp32", 4096, 2560, 1, MIXED),
    case("fp32", "fp32", 4096, 768, 6, MANY, out_type="bf16", is_training=True),
]
