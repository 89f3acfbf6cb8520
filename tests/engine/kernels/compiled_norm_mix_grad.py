"""How the gradients of LayerNorm with token shift are launched, and what they may need of a GPU."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from engine.kernels.gpu import norm_mix_grad as kernels
from engine.kernels.reference import LAYER_NORM_EPS
from tests.engine.kernels.machine_code import Case, Limits

INTEGERS = dict.fromkeys(("num_tokens", "num_channels", "tokens_per_program"), "i32")


def types(kernel: Any, out_type: str) -> dict[str, str]:
    pointers = dict.fromkeys(kernel.arg_names, "*fp32") | dict(d_out_ptr=f"*{out_type}")
    return pointers | dict(starts_ptr="*i64", sequences_ptr="*i64") | INTEGERS


def rows_case(out_type: str, channels: int, ways: int, limits: Limits) -> Case:
    width = triton.next_power_of_2(channels)
    return Case(
        name=f"norm_mix gradient of rows {out_type} C={channels} J={ways}",
        kernel=kernels.rows_backward_kernel,
        types=types(kernels.rows_backward_kernel, out_type),
        constants=dict(J=ways, WIDTH=width, COMPUTE=tl.float32, EPS=LAYER_NORM_EPS),
        limits=limits,
        aligned=("num_channels",),
        num_warps=kernels.choose_row_warps(width),
    )


def parameters_case(out_type: str, ways: int, limits: Limits) -> Case:
    return Case(
        name=f"norm_mix gradient of parameters {out_type} J={ways}",
        kernel=kernels.parameters_backward_kernel,
        types=types(kernels.parameters_backward_kernel, out_type),
        constants=dict(J=ways, BLOCK=kernels.BLOCK, COMPUTE=tl.float32),
        limits=limits,
        aligned=("num_channels",),
        num_warps=kernels.BLOCK_WARPS,
    )


ROWS = Limits(registers=128, shared_bytes=16 * 1024, wide_loads=4, wide_stores=2)
RUNS = Limits(registers=128, shared_bytes=1024)
CASES = [
    rows_case("bf16", 768, 6, ROWS),
    rows_case("fp32", 768, 6, ROWS),
    rows_case("bf16", 768, 1, ROWS),
    rows_case("bf16", 2560, 6, ROWS),
    rows_case("bf16", 4096, 6, ROWS),
    parameters_case("bf16", 6, RUNS),
    parameters_case("bf16", 1, RUNS),
    parameters_case("fp32", 6, RUNS),
]
