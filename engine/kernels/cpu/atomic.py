"""Words that threads share without a lock, and sleeping on one until it changes."""

from __future__ import annotations

import platform
import sys
from typing import Any

from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from engine.kernels.cpu.vector import I32, pointer

_FUTEX = {"x86_64": 202, "aarch64": 98}.get(platform.machine(), 0)  # numbers of the system call
HAS_FUTEX = sys.platform == "linux" and _FUTEX > 0
WAIT_PRIVATE, WAKE_PRIVATE = 128, 129
ALL = 1 << 30
_PAUSES = {"x86_64": "llvm.x86.sse2.pause", "AMD64": "llvm.x86.sse2.pause"}

_syscall = types.ExternalFunction("syscall", types.int64(*(types.int64 for _ in range(7))))
_yield = types.ExternalFunction("sched_yield", types.int32())


@intrinsic
def atomic_add(typing: Any, address: Any, offset: Any, value: Any) -> Any:
    """Add to an int32; what it was before."""

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        address, offset, value = args
        return builder.atomic_rmw(
            "add", pointer(builder, address, offset, I32, 4), value, "seq_cst"
        )

    return types.int32(types.int64, types.int64, types.int32), emit


@intrinsic
def atomic_load(typing: Any, address: Any, offset: Any) -> Any:
    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.load_atomic(pointer(builder, args[0], args[1], I32, 4), "seq_cst", 4)

    return types.int32(types.int64, types.int64), emit


@intrinsic
def atomic_store(typing: Any, address: Any, offset: Any, value: Any) -> Any:
    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        address, offset, value = args
        builder.store_atomic(value, pointer(builder, address, offset, I32, 4), "seq_cst", 4)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int32), emit


@intrinsic
def pause(typing: Any) -> Any:
    """Tell the processor that this thread only waits."""

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        name = _PAUSES.get(platform.machine())
        if name is not None:
            kind = ir.FunctionType(ir.VoidType(), [])
            builder.call(builder.module.declare_intrinsic(name, (), kind), [])
        return context.get_dummy_value()

    return types.void(), emit


if HAS_FUTEX:

    @njit(cache=True, nogil=True)
    def sleep_while(address, offset, value):
        """Until the int32 is another one, or for no reason at all."""
        _syscall(_FUTEX, address + 4 * offset, WAIT_PRIVATE, value, 0, 0, 0)

    @njit(cache=True, nogil=True)
    def wake_all(address, offset):
        _syscall(_FUTEX, address + 4 * offset, WAKE_PRIVATE, ALL, 0, 0, 0)

else:

    @njit(cache=True, nogil=True)
    def sleep_while(address, offset, value):
        """Lets others have the processor."""
        _yield()

    @njit(cache=True, nogil=True)
    def wake_all(address, offset):
        """Nobody sleeps."""
