"""How clipping and AdamW are launched, and what they may need of a GPU."""

from __future__ import annotations

from engine.kernels.gpu.adamw import (
    BLOCK,
    NUM_PARTIALS,
    NUM_WARPS,
    adamw_kernel,
    clip_factor_kernel,
    sum_of_squares_kernel,
)
from engine.kernels.optimizer import NORM_EPS
from tests.engine.kernels.machine_code import Case, Limits

_SCALARS = ("keep", "step_size", "share1", "share2", "scale2", "eps")
_ADAMW = dict.fromkeys(adamw_kernel.arg_names, "*fp32") | dict.fromkeys(_SCALARS, "fp32")


def adamw_case(count_type: str) -> Case:
    """`num_elements` is i64 from 2^31 on. Each thread moves two times 16 bytes of each buffer."""
    return Case(
        name=f"adamw {count_type}",
        kernel=adamw_kernel,
        types=_ADAMW | dict(num_elements=count_type),
        constants=dict(BLOCK=BLOCK),
        limits=Limits(registers=64, shared_bytes=0, wide_loads=8, wide_stores=6),
        aligned=("num_elements",),
        num_warps=NUM_WARPS,
    )


CASES = [
    adamw_case("i32"),
    adamw_case("i64"),
    Case(
        name="gradient norm",
        kernel=sum_of_squares_kernel,
        types=dict(grads_ptr="*fp32", partials_ptr="*fp32", num_elements="i64"),
        constants=dict(NUM_ROUNDS=180, BLOCK=BLOCK),  # of 0.1B
        limits=Limits(registers=64, shared_bytes=64, wide_loads=2),
        aligned=("num_elements",),
        num_warps=NUM_WARPS,
    ),
    Case(
        name="clip factor",
        kernel=clip_factor_kernel,
        types=dict.fromkeys(clip_factor_kernel.arg_names, "*fp32") | dict(max_norm="fp32"),
        constants=dict(NUM_PARTIALS=NUM_PARTIALS, NORM_EPS=NORM_EPS),
        limits=Limits(registers=64, shared_bytes=64),
        num_warps=NUM_WARPS,
    ),
]
