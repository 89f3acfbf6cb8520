"""How the decode kernel is launched, and what it may need of a GPU."""

from __future__ import annotations

import triton.language as tl

from engine.kernels.gpu.decode import choose_num_warps, decode_kernel
from engine.kernels.reference import DECAY_SCALE, GROUP_NORM_EPS, KEY_NORM_EPS
from tests.engine.kernels.machine_code import Case, Limits


def case(
    row_type: str, pool_type: str, size: int, limits: Limits, is_first_layer: bool = False
) -> Case:
    pointers = dict.fromkeys(decode_kernel.arg_names, f"*{row_type}")
    return Case(
        name=f"decode {row_type} pool {pool_type} N={size}" + " first layer" * is_first_layer,
        kernel=decode_kernel,
        types=pointers
        | dict(pool_ptr=f"*{pool_type}", src_ptr="*i64", dst_ptr="*i64")
        | dict(slot_stride="i32", num_heads="i32"),
        constants=dict(
            N=size,
            HAS_RESIDUAL=not is_first_layer,
            COMPUTE=tl.float32,
            DECAY_SCALE=DECAY_SCALE,
            GROUP_NORM_EPS=GROUP_NORM_EPS,
            KEY_NORM_EPS=KEY_NORM_EPS,
        ),
        limits=limits,
        aligned=("slot_stride",),
        num_warps=choose_num_warps(size),
    )


# 192 and 128 registers for 64 threads let 5 and 8 heads share a multiprocessor. 16 bytes are 4
# values of float32, so 64 threads move a state of 64 * 64 in 16 loads each.
SINGLE = Limits(registers=192, shared_bytes=1024, wide_loads=16, wide_stores=16)
HALF = Limits(registers=128, shared_bytes=1024, wide_loads=8, wide_stores=8)
SMALL = Limits(registers=80, shared_bytes=1024, wide_loads=2, wide_stores=2)
CASES = [
    case("bf16", "fp32", 64, SINGLE),
    case("bf16", "fp32", 64, SINGLE, is_first_layer=True),
    case("fp16", "fp32", 64, SINGLE),
    case("fp16", "fp16", 64, HALF),
    case("bf16", "fp32", 16, SMALL),
]
