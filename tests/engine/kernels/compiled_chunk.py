"""How the chunk kernels are launched, and what they may need of a GPU."""

from __future__ import annotations

from typing import Any

from engine.kernels.gpu import chunk, chunk_backward
from engine.kernels.gpu.packed import CHUNK_LEN
from engine.kernels.gpu.wkv import PRECISION, SOLVE_PRECISION, Launch, gradient_warps, launch_of
from tests.engine.kernels.machine_code import CUDA, Case, Limits

# A program of 61 KiB leaves room for three on a multiprocessor of sm_90, which no limit of
# registers does. It holds a state and repeats nothing: 255 registers are meant to be used.
LIMITS = Limits(shared_bytes=62 * 1024, wide_loads=6, wide_stores=1, matrix_products=28)
BLACKWELL_CARDS = (120,)
OTHERS = tuple(arch for arch in CUDA if arch not in BLACKWELL_CARDS)


def case(
    name: str,
    kernel: Any,
    row_type: str,
    num_warps: int,
    archs: tuple[int, ...] = CUDA,
    limits: Limits = LIMITS,
    pool_type: str = "fp32",
    v_type: str = "fp32",
    **constants: object,
) -> Case:
    """r is of the rows' type, and v in the first layer; all that was prepared is float32."""
    pointers = {x: f"*{'i64' if 'starts' in x else 'fp32'}" for x in kernel.arg_names}
    pointers |= dict.fromkeys(("r_pointer", "d_r_pointer"), f"*{row_type}")
    pointers |= dict.fromkeys(("v_pointer", "d_v_pointer"), f"*{v_type}")
    pointers |= dict.fromkeys(("source_pointer", "target_pointer"), f"*{pool_type}")
    pointers |= dict.fromkeys(("src_pointer", "dst_pointer", "chunk_tokens_pointer"), "*i64")
    pointers |= dict.fromkeys(("num_heads", "source_stride", "target_stride"), "i32")
    return Case(
        name=f"{name} {row_type} v {v_type} pool {pool_type} N={constants['N']}",
        kernel=kernel,
        types=pointers,
        constants=dict(C=CHUNK_LEN, PRECISION=PRECISION, **constants),
        limits=limits,
        aligned=("source_stride", "target_stride"),
        num_warps=num_warps,
        archs=archs,
    )


def launches(size: int) -> list[tuple[Launch, tuple[int, ...]]]:
    """How programs with a state are cut, and where."""
    usual, cards = launch_of(size, (9, 0)), launch_of(size, (12, 0))
    if usual == cards:
        return [(usual, CUDA)]
    return [(usual, OTHERS), (cards, BLACKWELL_CARDS)]


def forward(row_type: str, size: int = 64, saves: bool = False, **types: str) -> list[Case]:
    return [
        case(
            f"chunk forward{' saving' * saves} V={launch.value_block}",
            chunk.chunk_forward,
            row_type,
            launch.num_warps,
            archs,
            N=size,
            V=launch.value_block,
            HAS_CHECKPOINTS=saves,
            SOLVE_PRECISION=SOLVE_PRECISION,
            **types,
        )
        for launch, archs in launches(size)
    ]


def backward(row_type: str, size: int = 64, **types: str) -> list[Case]:
    chain = [
        case(
            f"chunk chain V={launch.value_block}",
            chunk_backward.chunk_chain,
            row_type,
            launch.num_warps,
            archs,
            LIMITS._replace(wide_loads=5 if size == 16 else LIMITS.wide_loads),
            N=size,
            V=launch.value_block,
            SOLVE_PRECISION=SOLVE_PRECISION,
            **types,
        )
        for launch, archs in launches(size)
    ]
    gradients = [
        case(
            f"chunk gradients {num_warps} warps",
            chunk_backward.chunk_gradients,
            row_type,
            num_warps,
            archs,
            # Rows of float32 are not what GPUs train on, and need a few registers more.
            LIMITS._replace(stack_bytes=stack_bytes if row_type == "fp32" else 0),
            N=size,
            **types,
        )
        for num_warps, archs, stack_bytes in (
            (gradient_warps(size, (8, 9)), (89,), 40),
            (gradient_warps(size, (9, 0)), (80, 90, 100), 0),
            (gradient_warps(size, (12, 0)), (120,), 8),
        )
    ]
    return [*chain, *gradients]


CASES = [
    *forward("bf16"),
    *forward("bf16", v_type="bf16"),
    *forward("bf16", pool_type="fp16"),
    *forward("fp16"),
    *forward("fp16", pool_type="fp16"),
    *forward("fp32"),
    *forward("bf16", size=16),
    *forward("bf16", size=32),
    *forward("bf16", saves=True),
    *forward("fp16", saves=True),
    *forward("fp32", saves=True),
    *forward("bf16", size=16, saves=True),
    *forward("bf16", size=32, saves=True),
    *backward("bf16"),
    *backward("fp16"),
    *backward("fp32"),
    *backward("bf16", size=16),
    *backward("bf16", size=32),
]
