"""How the low-rank products of few rows are launched, and what they may need of a GPU."""

from __future__ import annotations

import triton.language as tl

from engine.kernels.gpu.lora import (
    BLOCK_CHANNELS,
    BLOCK_RANK,
    BLOCK_RANK_OUT,
    MAX_PARTS,
    MAX_ROWS,
    NUM_WARPS,
    choose_block_out,
    choose_num_stages,
    lora_in_kernel,
    lora_out_kernel,
)
from tests.engine.kernels.machine_code import Case, Limits

TYPES = {"bf16": tl.bfloat16, "fp16": tl.float16, "fp32": tl.float32}


def cases(
    row_type: str, into: Limits, out_of: Limits, channels: int = 4096, parts: int = MAX_PARTS
) -> list[Case]:
    shared = dict(BM=MAX_ROWS, COMPUTE=TYPES[row_type], SUM=tl.float32)
    found = []
    for kernel, limits, constants in (
        (lora_in_kernel, into, dict(BR=BLOCK_RANK, BC=BLOCK_CHANNELS)),
        (lora_out_kernel, out_of, dict(P=parts, BR=BLOCK_RANK_OUT, BC=choose_block_out(channels))),
    ):
        integers = [name for name in kernel.arg_names if not name.endswith("_ptr")]
        pointers = set(kernel.arg_names) - set(integers)
        types = dict.fromkeys(integers, "i32") | dict.fromkeys(pointers, f"*{row_type}")
        ranks = [name for name in integers if "rank" in name]
        found.append(
            Case(
                name=f"{kernel.__name__} {row_type} C={channels} P={parts}",
                kernel=kernel,
                types=types | dict(parts_ptr="*fp32"),
                constants=constants | shared,
                limits=limits,
                aligned=("num_channels", *ranks),
                num_warps=NUM_WARPS,
                num_stages=choose_num_stages(TYPES[row_type].primitive_bitwidth // 8),
            )
        )
    return found


# 64 registers leave room for eight programs of 128 threads, more than their shared memory does.
# 16 bytes are 8 weights, so 128 threads fetch 128 * 32 of them in four loads, and their inputs in
# two, once for each of 4 stages.
IN = Limits(registers=56, shared_bytes=36 * 1024, wide_loads=24, wide_stores=1, matrix_products=8)
OUT = Limits(registers=64, shared_bytes=37 * 1024, wide_loads=24, wide_stores=1, matrix_products=4)
# A tile of 32 channels, and three parts.
NARROW = Limits(registers=48, shared_bytes=25 * 1024, wide_loads=16, matrix_products=2)
SINGLE_IN = Limits(registers=64, shared_bytes=48 * 1024, wide_loads=36, wide_stores=1)
SINGLE_OUT = Limits(registers=80, shared_bytes=34 * 1024, wide_loads=24, wide_stores=2)
CASES = [
    *cases("bf16", IN, OUT),
    cases("fp16", IN, NARROW, channels=768, parts=3)[1],  # the first launch is the same
    *cases("fp32", SINGLE_IN, SINGLE_OUT),
]
