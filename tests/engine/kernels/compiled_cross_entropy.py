"""How the cross-entropy kernel is launched, and what it may need of a GPU."""

from __future__ import annotations

import triton.language as tl

from engine.kernels.gpu.cross_entropy import BLOCK, NUM_WARPS, cross_entropy_kernel
from engine.kernels.reference import L2WRAP_FACTOR
from tests.engine.kernels.machine_code import Case, Limits


def case(
    logits_type: str, limits: Limits, has_gradient: bool = True, is_aligned: bool = True
) -> Case:
    notes = " loss only" * (not has_gradient) + " odd V" * (not is_aligned)
    return Case(
        name=f"cross-entropy {logits_type}{notes}",
        kernel=cross_entropy_kernel,
        types=dict(logits_ptr=f"*{logits_type}", target_ptr="*i64", loss_ptr="*fp32"),
        constants=dict(
            V=65536 if is_aligned else 50277,
            HAS_GRADIENT=has_gradient,
            HAS_L2WRAP=True,
            L2WRAP_FACTOR=L2WRAP_FACTOR,
            COMPUTE=tl.float32,
            BLOCK=BLOCK,
        ),
        limits=limits,
        num_warps=NUM_WARPS,
    )


# 8 values per thread: 1 load of 16 bytes in half types and 2 in float32, in each of two loops.
# 128 registers let two rows share a multiprocessor, of 256 threads each.
CASES = [
    case("bf16", Limits(registers=128, shared_bytes=2048, wide_loads=2, wide_stores=1)),
    case("fp16", Limits(registers=128, shared_bytes=2048, wide_loads=2, wide_stores=1)),
    case("fp32", Limits(registers=128, shared_bytes=2048, wide_loads=4, wide_stores=2)),
    case("bf16", Limits(registers=128, shared_bytes=2048, wide_loads=1), has_gradient=False),
    case("bf16", Limits(registers=128, shared_bytes=2048), is_aligned=False),
]
