"""How the int8 kernels are launched, and what they may need of a GPU."""

from __future__ import annotations

import triton.language as tl

from engine.kernels.backend import INT8_GROUP
from engine.kernels.gpu.int8 import REDUCED_AT_ONCE, add_parts, int8_kernel, launch_of
from tests.engine.kernels.machine_code import Case, Limits

TYPES = {"bf16": tl.bfloat16, "fp16": tl.float16}


def case(
    row_type: str,
    num_rows: int,
    limits: Limits,
    num_outputs: int = 4096,
    num_inputs: int = 4096,
    is_squared_relu: bool = False,
) -> Case:
    how = launch_of(num_rows, num_outputs, num_inputs)
    return Case(
        name=f"int8 {row_type} M={num_rows} O={num_outputs} I={num_inputs}"
        + " squared relu" * is_squared_relu,
        kernel=int8_kernel,
        types=dict(
            x_ptr=f"*{row_type}",
            weight_ptr="*i8",
            scale_ptr="*fp16",
            y_ptr="*fp32" if how.num_parts > 1 else f"*{row_type}",
            num_rows="i32",
            num_outputs="i32",
            num_inputs="i32",
            groups_per_part="i32",
        ),
        constants=dict(
            BM=how.block_rows,
            BO=how.block_outputs,
            GROUP=INT8_GROUP,
            IS_SQUARED_RELU=is_squared_relu,
            COMPUTE=TYPES[row_type],
        ),
        limits=limits,
        aligned=("num_outputs", "num_inputs"),
        num_warps=how.num_warps,
        num_stages=how.num_stages,
    )


def adding(row_type: str, limits: Limits) -> Case:
    return Case(
        name=f"int8 add_parts {row_type}",
        kernel=add_parts,
        types=dict(parts_ptr="*fp32", y_ptr=f"*{row_type}", num_parts="i32", num_elements="i32"),
        constants=dict(BLOCK=REDUCED_AT_ONCE),
        limits=limits,
        aligned=("num_elements",),
    )


# Of 65,536 registers 80 let six programs of 128 threads share a multiprocessor; 16 bytes are 16
# weights, so 128 threads fetch a tile of 64 * 64 in two loads, once for each of 4 stages. The
# shared memory is that of three stages in flight.
FEW = Limits(registers=80, shared_bytes=18 * 1024, wide_loads=8, wide_stores=1, matrix_products=8)
SOME = Limits(registers=128, shared_bytes=24 * 1024, wide_loads=8, wide_stores=4)
MANY = Limits(registers=240, shared_bytes=64 * 1024, wide_loads=6, wide_stores=4)
SOME, MANY = (limits._replace(matrix_products=4) for limits in (SOME, MANY))
CASES = [
    case("bf16", 1, FEW),
    case("fp16", 16, FEW),
    case("bf16", 16, FEW, num_inputs=16384, is_squared_relu=True),
    case("bf16", 16, FEW, num_outputs=65536),
    case("bf16", 64, SOME),
    case("bf16", 2048, MANY),
    case("bf16", 2048, MANY, num_inputs=16384, is_squared_relu=True),
    case("fp16", 2048, MANY),
    adding("bf16", Limits(registers=48, shared_bytes=0, wide_loads=2, wide_stores=1)),
]
