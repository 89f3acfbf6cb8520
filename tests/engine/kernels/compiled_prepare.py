"""How the kernels before and after the recurrence are launched, and what they may need of a GPU."""

from __future__ import annotations

from typing import Any

from engine.kernels.gpu import prepare, readout
from engine.kernels.reference import DECAY_SCALE, GROUP_NORM_EPS, KEY_NORM_EPS
from tests.engine.kernels.machine_code import Case, Limits

# What comes from matrix products is of the rows' type; biases and parameters are float32 under
# autocast, and so is all that goes to the recurrence and comes from it.
HALF = {f"{x}_pointer" for x in ("k", "v", "v_first", "r", "g", "out", "d_out")}
HALF |= {f"{x}_pointer" for x in ("d_k", "d_v", "d_v_first", "d_r", "d_g")}


def case(name: str, kernel: Any, row_type: str, size: int, limits: Limits, **more: object) -> Case:
    types = {x: f"*{row_type if x in HALF else 'fp32'}" for x in kernel.arg_names}
    types |= dict(sequences_pointer="*i64", dst_pointer="*i64", num_tokens="i32", num_heads="i32")
    constants = dict(N=size, TOKENS=prepare.tokens_per_program(size), **more)
    return Case(
        name=f"{name} {row_type} N={size}",
        kernel=kernel,
        types=types,
        constants={x: y for x, y in constants.items() if x in kernel.arg_names},
        limits=limits,
        num_warps=prepare.NUM_WARPS,
    )


def cases(row_type: str, size: int, has_residual: bool = True, pads: bool = True) -> list[Case]:
    constants = dict(PADS=pads, DECAY_SCALE=DECAY_SCALE, KEY_NORM_EPS=KEY_NORM_EPS)
    constants |= dict(HAS_RESIDUAL=has_residual, EPS=GROUP_NORM_EPS)
    suffix = " first layer" * (not has_residual) + " no padding" * (not pads)
    kernels = [
        ("prepare", prepare.prepare_kernel, FORWARD),
    ]
    if not pads:
        kernels.append(("prepare backward", prepare.prepare_backward_kernel, BACKWARD))
    if has_residual:
        kernels.append(("readout", readout.readout_kernel, FORWARD))
    if has_residual and not pads:
        kernels.append(("readout backward", readout.readout_backward_kernel, BACKWARD))
    return [
        case(name + suffix, kernel, row_type, size, limits, **constants)
        for name, kernel, limits in kernels
    ]


# 64 and 128 registers for 128 threads let 8 and 4 programs share a multiprocessor, which is what
# hides the wait for memory. A tile of 1024 numbers is one or two wide loads of a thread.
FORWARD = Limits(registers=64, shared_bytes=4096, wide_loads=8, wide_stores=1)
BACKWARD = Limits(registers=128, shared_bytes=4096, wide_loads=12, wide_stores=5)
CASES = [
    *cases("bf16", 64),
    *cases("fp16", 64),
    *cases("fp32", 64),
    *cases("bf16", 64, has_residual=False),
    *cases("bf16", 64, pads=False),
    *cases("fp32", 64, pads=False),
    *cases("bf16", 64, has_residual=False, pads=False),
    *cases("bf16", 16, pads=False),
]
