"""How squared ReLU is launched, and what it may need of a GPU."""

from __future__ import annotations

from engine.kernels.gpu.squared_relu import BLOCK, NUM_WARPS, squared_relu_kernel
from tests.engine.kernels.machine_code import Case, Limits


def case(value_type: str, num_wide: int) -> Case:
    return Case(
        name=f"squared_relu {value_type}",
        kernel=squared_relu_kernel,
        types=dict(x_ptr=f"*{value_type}", y_ptr=f"*{value_type}", num_values="i32"),
        constants=dict(BLOCK=BLOCK),
        limits=Limits(registers=48, shared_bytes=0, wide_loads=num_wide, wide_stores=num_wide),
        aligned=("num_values",),
        num_warps=NUM_WARPS,
    )


CASES = [case("bf16", 2), case("fp16", 2), case("fp32", 4)]
