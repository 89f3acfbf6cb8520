"""What the decode kernel needs on each GPU. `test_triton` runs this file, without interpreter."""

from __future__ import annotations

from pathlib import Path

import pytest
import triton.language as tl

from engine.kernels.reference import DECAY_SCALE, GROUP_NORM_EPS, KEY_NORM_EPS
from engine.kernels.triton_decode import choose_num_warps, decode_kernel
from tests.engine.cubin import Needs, compiled

ARCHS = (80, 89, 90, 100, 120)
# (type of rows, type of the pool, head size): at most these registers, at least these wide loads
# and stores. 192 and 128 registers for 64 threads let 5 and 8 heads share a multiprocessor. 16
# bytes are 4 values of float32, so 64 threads move a state of 64 * 64 in 16 loads each.
LIMITS = {
    ("bf16", "fp32", 64): (192, 16, 16),
    ("fp16", "fp32", 64): (192, 16, 16),
    ("fp16", "fp16", 64): (128, 8, 8),
    ("bf16", "fp32", 16): (80, 2, 2),
}


def decode_needs(
    row_type: str, pool_type: str, size: int, arch: int, folder: Path, is_first_layer: bool = False
) -> Needs:
    types = dict.fromkeys(decode_kernel.arg_names, f"*{row_type}")
    types |= dict(pool_ptr=f"*{pool_type}", src_ptr="*i64", dst_ptr="*i64")
    types |= dict(slot_stride="i32", num_heads="i32")
    constants = dict(
        N=size,
        HAS_RESIDUAL=not is_first_layer,
        COMPUTE=tl.float32,
        DECAY_SCALE=DECAY_SCALE,
        GROUP_NORM_EPS=GROUP_NORM_EPS,
        KEY_NORM_EPS=KEY_NORM_EPS,
    )
    num_warps = choose_num_warps(size)
    return compiled(decode_kernel, types, constants, ("slot_stride",), arch, num_warps, folder)


def check(needs: Needs, limits: tuple[int, int, int]) -> None:
    registers, wide_loads, wide_stores = limits
    assert needs.registers <= registers
    assert needs.stack_bytes == 0
    assert needs.shared_bytes <= 1024
    assert needs.wide_loads >= wide_loads
    assert needs.wide_stores >= wide_stores


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("case", LIMITS, ids=str)
def test_decode_kernel_keeps_to_its_limits(
    case: tuple[str, str, int], arch: int, tmp_path: Path
) -> None:
    needs = decode_needs(*case, arch, tmp_path)
    check(needs, LIMITS[case])


def test_first_layer_keeps_to_the_same_limits(tmp_path: Path) -> None:
    needs = decode_needs("bf16", "fp32", 64, 90, tmp_path, is_first_layer=True)
    check(needs, LIMITS["bf16", "fp32", 64])
