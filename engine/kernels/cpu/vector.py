"""Vectors of 16 float32 or int32 as a type of numba: what the CPU's kernels are written in.

Every operation is one instruction of LLVM's vector language, without reordering, so a result is
the same to the last bit on every processor that rounds as IEEE 754 says, and LLVM makes of it
AVX-512, AVX2, SSE2 or NEON, whichever the machine has. Memory is an address and an offset in
elements; nothing is checked.
"""

from __future__ import annotations

import operator
from typing import Any

from llvmlite import ir
from numba import njit, types
from numba.core.typing.templates import ConcreteTemplate, infer_global, signature
from numba.extending import intrinsic, lower_builtin, models, register_model

LANES = 16

I8, I32, I64, F32 = ir.IntType(8), ir.IntType(32), ir.IntType(64), ir.FloatType()
F32_VECTOR, I32_VECTOR = ir.VectorType(F32, LANES), ir.VectorType(I32, LANES)
ROUNDER = 12582912.0  # 1.5 * 2**23: adding it leaves no bits for a fraction
ROUNDER_BITS = 0x4B400000


class Vector(types.Type):  # type: ignore[misc]
    """16 lanes in one register, or in as many as the machine needs."""

    def __init__(self, name: str) -> None:
        super().__init__(name=name)


f32x16, i32x16 = Vector("f32x16"), Vector("i32x16")


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):  # type: ignore[misc]
    def __init__(self, manager: Any, kind: Vector) -> None:
        llvm = F32_VECTOR if kind.name == "f32x16" else I32_VECTOR
        super().__init__(manager, kind, llvm)


def _operator(symbol: Any, kind: Vector, emit: str) -> None:
    @infer_global(symbol)
    class _Template(ConcreteTemplate):  # type: ignore[misc]
        key = symbol
        cases = (signature(kind, kind, kind),)

    @lower_builtin(symbol, kind, kind)
    def _lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return getattr(builder, emit)(*args)


for _symbol, _emit in (("add", "fadd"), ("sub", "fsub"), ("mul", "fmul"), ("truediv", "fdiv")):
    _operator(getattr(operator, _symbol), f32x16, _emit)
for _symbol, _emit in (("add", "add"), ("sub", "sub"), ("mul", "mul")):
    _operator(getattr(operator, _symbol), i32x16, _emit)


def pointer(builder: Any, address: Any, offset: Any, kind: Any, item_bytes: int) -> Any:
    """To `offset` items behind an address."""
    if offset is not None:
        address = builder.add(address, builder.mul(offset, ir.Constant(I64, item_bytes)))
    return builder.inttoptr(address, kind.as_pointer())


def load_at(builder: Any, where: Any, align: int = 4) -> Any:
    loaded = builder.load(where)
    loaded.align = align
    return loaded


def splat_of(builder: Any, value: Any, kind: Any) -> Any:
    one = builder.insert_element(ir.Constant(kind, ir.Undefined), value, ir.Constant(I32, 0))
    lanes = ir.VectorType(I32, kind.count)
    return builder.shuffle_vector(
        one, ir.Constant(kind, ir.Undefined), ir.Constant(lanes, [0] * kind.count)
    )


def constant(kind: Any, value: float) -> Any:
    return ir.Constant(kind, [value] * kind.count)


def fma_of(builder: Any, a: Any, b: Any, c: Any) -> Any:
    kind = ir.FunctionType(a.type, [a.type] * 3)
    name = f"llvm.fma.v{a.type.count}f32"
    return builder.call(builder.module.declare_intrinsic(name, (), kind), [a, b, c])


@intrinsic
def load(typing: Any, address: Any, offset: Any) -> Any:
    """16 float32 at `address`, `offset` float32 further on."""

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return load_at(builder, pointer(builder, args[0], args[1], F32_VECTOR, 4))

    return f32x16(types.int64, types.int64), emit


@intrinsic
def store(typing: Any, address: Any, offset: Any, value: Any) -> Any:
    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        address, offset, value = args
        stored = builder.store(value, pointer(builder, address, offset, F32_VECTOR, 4))
        stored.align = 4
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, f32x16), emit


@intrinsic
def load_splat(typing: Any, address: Any, offset: Any) -> Any:
    """One float32 of memory in all lanes."""

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return splat_of(
            builder, load_at(builder, pointer(builder, args[0], args[1], F32, 4)), F32_VECTOR
        )

    return f32x16(types.int64, types.int64), emit


@intrinsic
def load_scalar(typing: Any, address: Any, offset: Any) -> Any:
    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return load_at(builder, pointer(builder, args[0], args[1], F32, 4))

    return types.float32(types.int64, types.int64), emit


@intrinsic
def store_scalar(typing: Any, address: Any, offset: Any, value: Any) -> Any:
    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        address, offset, value = args
        builder.store(value, pointer(builder, address, offset, F32, 4))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.float32), emit


@intrinsic
def store_int(typing: Any, address: Any, offset: Any, value: Any) -> Any:
    """One int32."""

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        address, offset, value = args
        builder.store(value, pointer(builder, address, offset, I32, 4))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int32), emit


@intrinsic
def load_int64(typing: Any, address: Any, offset: Any) -> Any:
    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return load_at(builder, pointer(builder, args[0], args[1], I64, 8), 8)

    return types.int64(types.int64, types.int64), emit


@intrinsic
def splat(typing: Any, value: Any) -> Any:
    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return splat_of(builder, args[0], F32_VECTOR)

    return f32x16(types.float32), emit


@intrinsic
def fma(typing: Any, a: Any, b: Any, c: Any) -> Any:
    """a * b + c, rounded once."""

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return fma_of(builder, *args)

    return f32x16(f32x16, f32x16, f32x16), emit


@intrinsic
def at_least(typing: Any, x: Any, low: Any) -> Any:
    """The greater one; NaN where x is NaN."""

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        x, low = args
        return builder.select(builder.fcmp_ordered("<", x, low), low, x)

    return f32x16(f32x16, f32x16), emit


@intrinsic
def at_most(typing: Any, x: Any, high: Any) -> Any:
    """The lesser one; NaN where x is NaN."""

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        x, high = args
        return builder.select(builder.fcmp_ordered(">", x, high), high, x)

    return f32x16(f32x16, f32x16), emit


def across(builder: Any, value: Any, join: Any) -> Any:
    """All lanes joined two by two: 16 to 8 to 4 to 2 to 1, the same on every machine."""
    count = LANES
    while count > 1:
        count //= 2
        lanes = ir.VectorType(I32, count)
        low = builder.shuffle_vector(value, value, ir.Constant(lanes, list(range(count))))
        high = builder.shuffle_vector(
            value, value, ir.Constant(lanes, list(range(count, 2 * count)))
        )
        value = join(low, high)
    return builder.extract_element(value, ir.Constant(I32, 0))


@intrinsic
def total(typing: Any, x: Any) -> Any:
    """The sum of all lanes."""

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return across(builder, args[0], builder.fadd)

    return types.float32(f32x16), emit


@intrinsic
def total_int(typing: Any, x: Any) -> Any:
    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return across(builder, args[0], builder.add)

    return types.int32(i32x16), emit


@intrinsic
def magnitude_bits(typing: Any, x: Any) -> Any:
    """The bits of |x|, which are ordered as |x| is, with NaN above all."""

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.and_(builder.bitcast(args[0], I32_VECTOR), constant(I32_VECTOR, 0x7FFFFFFF))

    return i32x16(f32x16), emit


def larger_of(builder: Any, a: Any, b: Any) -> Any:
    return builder.select(builder.icmp_signed(">", a, b), a, b)


@intrinsic
def larger(typing: Any, a: Any, b: Any) -> Any:
    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return larger_of(builder, *args)

    return i32x16(i32x16, i32x16), emit


@intrinsic
def largest(typing: Any, x: Any) -> Any:
    """The largest lane of bits of magnitudes, as the float32 that it is."""

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        bits = across(builder, args[0], lambda a, b: larger_of(builder, a, b))
        return builder.bitcast(bits, F32)

    return types.float32(i32x16), emit


@intrinsic
def rounded(typing: Any, x: Any) -> Any:
    """The nearest integers, to even at a tie, of |x| below 2**22; else anything."""

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        moved = builder.fadd(args[0], constant(F32_VECTOR, ROUNDER))
        bits = builder.bitcast(moved, I32_VECTOR)
        return builder.sub(bits, constant(I32_VECTOR, ROUNDER_BITS))

    return i32x16(f32x16), emit


@intrinsic
def as_float(typing: Any, x: Any) -> Any:
    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.sitofp(args[0], F32_VECTOR)

    return f32x16(i32x16), emit


@intrinsic
def power_of_two(typing: Any, exponent: Any) -> Any:
    """2.0 ** exponent, from -126 to 127."""

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        biased = builder.add(args[0], constant(I32_VECTOR, 127))
        return builder.bitcast(builder.shl(biased, constant(I32_VECTOR, 23)), F32_VECTOR)

    return f32x16(i32x16), emit


@intrinsic
def store_bytes(typing: Any, address: Any, offset: Any, value: Any) -> Any:
    """The lowest byte of each lane: 16 int8."""

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        address, offset, value = args
        kind = ir.VectorType(I8, LANES)
        stored = builder.store(
            builder.trunc(value, kind), pointer(builder, address, offset, kind, 1)
        )
        stored.align = 1
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, i32x16), emit


@intrinsic
def prefetch(typing: Any, address: Any) -> Any:
    """Ask for the cache line at an address, which need not be ours."""

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        prefetch_at(builder, args[0])
        return context.get_dummy_value()

    return types.void(types.int64), emit


def prefetch_at(builder: Any, address: Any) -> None:
    kind = ir.FunctionType(ir.VoidType(), [I8.as_pointer(), I32, I32, I32])
    function = builder.module.declare_intrinsic("llvm.prefetch.p0", (), kind)
    where = builder.inttoptr(address, I8.as_pointer())
    builder.call(function, [where, *(ir.Constant(I32, v) for v in (0, 3, 1))])


@njit(forceinline=True)
def exp(x):
    """To 2 units in the last place; below -87 and above 88 as if at them; NaN of NaN.

    e^x = 2^n e^r with |r| <= ln(2)/2; the polynomial is that of Cephes (expf.c).
    """
    x = at_most(at_least(x, splat(-87.0)), splat(88.0))
    n = rounded(x * splat(1.44269504))
    whole = as_float(n)
    r = fma(whole, splat(-0.693359375), x)
    r = fma(whole, splat(2.12194440e-4), r)
    p = fma(splat(1.9875691500e-4), r, splat(1.3981999507e-3))
    p = fma(p, r, splat(8.3334519073e-3))
    p = fma(p, r, splat(4.1665795894e-2))
    p = fma(p, r, splat(1.6666665459e-1))
    p = fma(p, r, splat(5.0000001201e-1))
    one = splat(1.0)
    return fma(p * r, r, r + one) * power_of_two(n)


@njit(forceinline=True)
def sigmoid(x):
    one = splat(1.0)
    return one / (one + exp(splat(0.0) - x))


@njit(forceinline=True)
def tanh(x):
    """2 sigmoid(2x) - 1: to 1e-7 absolutely, which is what a product with it feels."""
    return fma(splat(2.0), sigmoid(x + x), splat(-1.0))


@intrinsic
def load_bfloat16(typing: Any, address: Any, offset: Any) -> Any:
    """16 bfloat16, as float32."""

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        kind = ir.VectorType(ir.IntType(16), LANES)
        halves = load_at(builder, pointer(builder, args[0], args[1], kind, 2), 2)
        words = builder.shl(builder.zext(halves, I32_VECTOR), constant(I32_VECTOR, 16))
        return builder.bitcast(words, F32_VECTOR)

    return f32x16(types.int64, types.int64), emit
