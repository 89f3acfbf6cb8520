"""How the sampler's kernels are launched, and what they may need of a GPU."""

from __future__ import annotations

import triton

from engine.kernels.gpu.draw import adjust_kernel, pick_kernel, weigh_kernel
from engine.kernels.gpu.sampler import ROW_WARPS, TILE_WARPS, choose_tile
from tests.engine.kernels.machine_code import Case, Limits

TYPES = dict(
    logits_stride="i32", seats_ptr="*i64", positions_ptr="*i64", floats_ptr="*fp32",
    integers_ptr="*i64", allowed_ptr="*i32", biases_ptr="*fp32", penalties_ptr="*fp32",
    scales_ptr="*fp32", num_drawn_ptr="*i64", masks_ptr="*i32", masks_stride="i32",
    x_ptr="*fp32", weights_ptr="*fp32", stats_ptr="*fp32", best_ids_ptr="*i32",
    tokens_ptr="*i64", logprobs_ptr="*fp32", num_seats="i32",
)  # fmt: skip
WORLD, TINY = 65536, 2048  # vocabularies


def constants(vocab_size: int, *names: str) -> dict[str, int]:
    tile = choose_tile(vocab_size)
    num_tiles = -(-vocab_size // tile)
    known = dict(V=vocab_size, TILE=tile, T=num_tiles, T_POWER=triton.next_power_of_2(num_tiles))
    return {name: known[name] for name in names}


def adjust(logits_type: str, vocab_size: int, has_masks: bool, limits: Limits) -> Case:
    return Case(
        name=f"sampler adjust {logits_type} V={vocab_size}" + " masks" * has_masks,
        kernel=adjust_kernel,
        types=TYPES | dict(logits_ptr=f"*{logits_type}"),
        constants=constants(vocab_size, "V", "TILE", "T") | dict(HAS_MASKS=has_masks),
        limits=limits,
        aligned=("logits_stride", "masks_stride"),
        num_warps=TILE_WARPS,
    )


def weigh(vocab_size: int, limits: Limits) -> Case:
    return Case(
        name=f"sampler weigh V={vocab_size}",
        kernel=weigh_kernel,
        types=TYPES,
        constants=constants(vocab_size, "TILE", "T", "T_POWER"),
        limits=limits,
        num_warps=TILE_WARPS,
    )


def pick(logits_type: str, vocab_size: int, limits: Limits) -> Case:
    return Case(
        name=f"sampler pick {logits_type} V={vocab_size}",
        kernel=pick_kernel,
        types=TYPES | dict(logits_ptr=f"*{logits_type}"),
        constants=constants(vocab_size, "V", "TILE", "T", "T_POWER"),
        limits=limits,
        aligned=("logits_stride",),
        num_warps=ROW_WARPS,
    )


# 16 bytes are 8 logits of half precision or 4 of float32; biases, penalties and x are float32. A
# tile has 4096 tokens: 32 for each of 128 threads, 16 for each of 256.
HALF = Limits(registers=128, shared_bytes=8192, wide_loads=4 + 2 * 8, wide_stores=8)
SINGLE = Limits(registers=128, shared_bytes=8192, wide_loads=3 * 8, wide_stores=8)
WEIGH = Limits(registers=64, shared_bytes=1024, wide_loads=8, wide_stores=8)
# 128 registers let two programs of 256 threads share a multiprocessor. Four loads in each of the
# loops over weights: search, sums, the token's tile; and in that over penalties, with four stores.
PICK = Limits(registers=128, shared_bytes=8192, wide_loads=4 * 4, wide_stores=4)
CASES = [
    adjust("bf16", WORLD, False, HALF),
    adjust("fp16", WORLD, True, HALF),
    adjust("fp32", WORLD, True, SINGLE),
    adjust("fp32", TINY, False, SINGLE._replace(wide_loads=3 * 4, wide_stores=4)),
    weigh(WORLD, WEIGH),
    pick("bf16", WORLD, PICK),
    pick("fp32", WORLD, PICK),
    pick("fp32", TINY, PICK._replace(wide_loads=8, wide_stores=2)),
]
