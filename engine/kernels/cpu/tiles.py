"""The innermost loops of matrix products: a few rows times a block of 64 outputs.

Weights lie in blocks of 64 outputs, [outputs / 64][K][64] in the order that the loop reads:
    float32   [k][64]
    bfloat16  [k][2][16] words, output j in the lower half of a word, j + 16 in the upper one
    int8      [k / 4][64][4] as byte + 128, and scales [k / 64][64] in float32
Rows are float32 [K], or int8 [K] with a scale and the correction -128 * sum per 64 of them.

Every output is summed in order of k in one accumulator, for any number of rows: the result for
a row does not depend on the rows beside it. A tile adds to `out` [rows, 64].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from engine.kernels.cpu import features
from engine.kernels.cpu.features import float_tile, int8_dot
from engine.kernels.cpu.vector import (
    F32,
    F32_VECTOR,
    I8,
    I32,
    I32_VECTOR,
    I64,
    constant,
    fma_of,
    load_at,
    pointer,
    prefetch_at,
    splat_of,
)

BLOCK = 64  # outputs
GROUP = 64  # inputs of an int8 matrix that share a scale
VECTORS = BLOCK // 16
UNROLLED = 4  # inputs in one turn of a loop; rows are padded to a multiple of 64
PREFETCH_BYTES = 2048  # ahead, of weights that are read once
FLOAT_TILE, INT8_TILE = float_tile(), features.int8_tile()

Emit = Callable[[Any, int, tuple[Any, ...]], None]


def _i64(value: int) -> Any:
    return ir.Constant(I64, value)


def _counted(
    builder: Any, count: Any, carried: list[Any], body: Callable[..., list[Any]]
) -> list[Any]:
    """for i in range(count), values carried from turn to turn; count is at least 1."""
    before, loop = builder.block, builder.append_basic_block("loop")
    builder.branch(loop)
    builder.position_at_end(loop)
    index = builder.phi(I64)
    index.add_incoming(_i64(0), before)
    phis = [builder.phi(value.type) for value in carried]
    for phi, value in zip(phis, carried, strict=True):
        phi.add_incoming(value, before)
    results = body(index, phis)
    following = builder.add(index, _i64(1))
    index.add_incoming(following, builder.block)
    for phi, value in zip(phis, results, strict=True):
        phi.add_incoming(value, builder.block)
    after = builder.append_basic_block("after")
    builder.cbranch(builder.icmp_signed("<", following, count), loop, after)
    builder.position_at_end(after)
    return results


def _by_rows(max_rows: int, emit: Emit, num_args: int) -> Any:
    """An intrinsic whose first argument, 1 to `max_rows`, picks the code for so many rows."""

    @intrinsic
    def tile(
        typing: Any, rows: Any, a: Any, b: Any, c: Any, d: Any, e: Any, f: Any, g: Any, h: Any
    ) -> Any:
        def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            rows, *others = args
            cases = [builder.append_basic_block(f"rows{n}") for n in range(1, max_rows + 1)]
            done = builder.append_basic_block("done")
            switch = builder.switch(rows, cases[0])
            for n, case in enumerate(cases, 1):
                if n > 1:
                    switch.add_case(_i64(n), case)
                builder.position_at_end(case)
                emit(builder, n, tuple(others))
                builder.branch(done)
            builder.position_at_end(done)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 9), lower

    return tile


def _outputs(builder: Any, out: Any, rows: int, first: int, vectors: int) -> list[Any]:
    """Where the sums go."""
    return [
        pointer(builder, out, _i64(r * BLOCK + (first + p) * 16), F32_VECTOR, 4)
        for r in range(rows)
        for p in range(vectors)
    ]


def _store_all(builder: Any, values: list[Any], places: list[Any]) -> None:
    for value, place in zip(values, places, strict=True):
        builder.store(value, place).align = 4


def _float_weights(builder: Any, w: Any, k: Any, first: int, vectors: int) -> list[Any]:
    base = builder.add(builder.mul(k, _i64(BLOCK)), _i64(first * 16))
    return [
        load_at(builder, pointer(builder, w, builder.add(base, _i64(p * 16)), F32_VECTOR, 4))
        for p in range(vectors)
    ]


def _bfloat16_weights(builder: Any, w: Any, k: Any, first: int, vectors: int) -> list[Any]:
    base = builder.add(builder.mul(k, _i64(BLOCK // 2)), _i64(first * 8))
    found = []
    for pair in range(vectors // 2):
        where = pointer(builder, w, builder.add(base, _i64(pair * 16)), I32_VECTOR, 4)
        words = load_at(builder, where)
        low = builder.shl(words, constant(I32_VECTOR, 16))
        high = builder.and_(words, constant(I32_VECTOR, -65536))
        found += [builder.bitcast(half, F32_VECTOR) for half in (low, high)]
    return found


def _float_tile(weights: Callable[..., list[Any]], k_bytes: int) -> Emit:
    vectors = FLOAT_TILE.vectors

    def emit(builder: Any, rows: int, args: tuple[Any, ...]) -> None:
        w, x, stride, num_k, out, *_ = args
        x_rows = [builder.add(x, builder.mul(stride, _i64(4 * r))) for r in range(rows)]
        for first in range(0, VECTORS, vectors):
            places = _outputs(builder, out, rows, first, vectors)

            def body(turn: Any, sums: list[Any], first: int = first) -> list[Any]:
                sums = list(sums)
                for step in range(UNROLLED):
                    k = builder.add(builder.mul(turn, _i64(UNROLLED)), _i64(step))
                    if rows == 1:
                        ahead = builder.add(builder.mul(k, _i64(k_bytes)), _i64(PREFETCH_BYTES))
                        for line in range(0, k_bytes * vectors // VECTORS, 64):
                            prefetch_at(builder, builder.add(w, builder.add(ahead, _i64(line))))
                    found = weights(builder, w, k, first, vectors)
                    for r in range(rows):
                        one = load_at(builder, pointer(builder, x_rows[r], k, F32, 4))
                        value = splat_of(builder, one, F32_VECTOR)
                        for p in range(vectors):
                            at = r * vectors + p
                            sums[at] = fma_of(builder, found[p], value, sums[at])
                return sums

            turns = builder.sdiv(num_k, _i64(UNROLLED))
            sums = [constant(F32_VECTOR, 0.0)] * len(places)
            _store_all(builder, _counted(builder, turns, sums, body), places)

    return emit


float32_tile = _by_rows(FLOAT_TILE.rows, _float_tile(_float_weights, 4 * BLOCK), 9)
bfloat16_tile = _by_rows(FLOAT_TILE.rows, _float_tile(_bfloat16_weights, 2 * BLOCK), 9)


BYTES, HALF_BYTES = ir.VectorType(I8, 64), ir.VectorType(I8, 32)
I32_HALF, I16_HALF = ir.VectorType(I32, 8), ir.VectorType(ir.IntType(16), 16)
IS_CORRECTED = int8_dot() != "avx2"  # it takes signed weights


def _call(builder: Any, name: str, result: Any, *args: Any) -> Any:
    kind = ir.FunctionType(result, [arg.type for arg in args])
    return builder.call(builder.module.declare_intrinsic(name, (), kind), args)


def _halves(builder: Any, value: Any) -> list[Any]:
    count = value.type.count // 2
    lanes = ir.VectorType(I32, count)
    return [
        builder.shuffle_vector(value, value, ir.Constant(lanes, list(range(first, first + count))))
        for first in (0, count)
    ]


def _dot4(builder: Any, sums: Any, w: Any, x: Any) -> Any:
    """sums[j] + the four products of unsigned w and signed x in lane j: <16 x i32> all three."""
    path = int8_dot()
    if path == "avx512-vnni":
        return _call(builder, "llvm.x86.avx512.vpdpbusd.512", I32_VECTOR, sums, w, x)
    if path == "plain":
        return builder.add(sums, _dot4_plain(builder, w, x))
    parts = zip(*(_halves(builder, value) for value in (sums, w, x)), strict=True)
    dot = _dot4_avx_vnni if path == "avx-vnni" else _dot4_avx2
    low, high = (dot(builder, *part) for part in parts)
    return builder.shuffle_vector(low, high, ir.Constant(I32_VECTOR, list(range(16))))


def _dot4_avx_vnni(builder: Any, sums: Any, w: Any, x: Any) -> Any:
    return _call(builder, "llvm.x86.avx512.vpdpbusd.256", I32_HALF, sums, w, x)


def _dot4_avx2(builder: Any, sums: Any, w: Any, x: Any) -> Any:
    """Of signed weights: two products of at most 127 * 127 fit 16 bits, with one sign moved."""
    w, x = builder.bitcast(w, HALF_BYTES), builder.bitcast(x, HALF_BYTES)
    w = builder.xor(w, constant(HALF_BYTES, -128))
    signed = _call(builder, "llvm.x86.avx2.psign.b", HALF_BYTES, w, x)
    size = _call(builder, "llvm.x86.avx2.psign.b", HALF_BYTES, x, x)
    pairs = _call(builder, "llvm.x86.avx2.pmadd.ub.sw", I16_HALF, size, signed)
    ones = constant(I16_HALF, 1)
    fours = _call(builder, "llvm.x86.avx2.pmadd.wd", I32_HALF, pairs, ones)
    return builder.add(sums, fours)


def _dot4_plain(builder: Any, w: Any, x: Any) -> Any:
    total = None
    for byte in range(4):
        shift = constant(I32_VECTOR, 8 * byte)
        unsigned = builder.and_(builder.lshr(w, shift), constant(I32_VECTOR, 255))
        signed = builder.ashr(
            builder.shl(x, constant(I32_VECTOR, 24 - 8 * byte)), constant(I32_VECTOR, 24)
        )
        product = builder.mul(unsigned, signed)
        total = product if total is None else builder.add(total, product)
    return total


def _int8_tile(builder: Any, rows: int, args: tuple[Any, ...]) -> None:
    w, x, stride, num_k, out, w_scale, x_scale, x_correction = args
    vectors = INT8_TILE.vectors
    num_groups = builder.sdiv(num_k, _i64(GROUP))
    groups_stride = builder.sdiv(stride, _i64(GROUP))
    x_rows = [builder.add(x, builder.mul(stride, _i64(r))) for r in range(rows)]
    offsets = [builder.mul(groups_stride, _i64(r)) for r in range(rows)]
    for first in range(0, VECTORS, vectors):
        places = _outputs(builder, out, rows, first, vectors)

        def body(group: Any, carried: list[Any], first: int = first) -> list[Any]:
            sums: list[Any] = []
            for r in range(rows):
                start = constant(I32_VECTOR, 0)
                if IS_CORRECTED:
                    at = builder.add(offsets[r], group)
                    one = load_at(builder, pointer(builder, x_correction, at, I32, 4))
                    start = splat_of(builder, one, I32_VECTOR)
                sums += [start] * vectors
            base = builder.mul(group, _i64(GROUP * BLOCK))
            for step in range(GROUP // 4):
                here = builder.add(w, builder.add(base, _i64(step * 4 * BLOCK + first * 64)))
                if rows == 1:
                    for p in range(vectors):
                        prefetch_at(builder, builder.add(here, _i64(PREFETCH_BYTES + 64 * p)))
                found = [
                    load_at(builder, pointer(builder, here, _i64(16 * p), I32_VECTOR, 4))
                    for p in range(vectors)
                ]
                for r in range(rows):
                    at = builder.add(builder.mul(group, _i64(GROUP)), _i64(4 * step))
                    one = load_at(builder, pointer(builder, x_rows[r], at, I32, 1), 1)
                    value = splat_of(builder, one, I32_VECTOR)
                    for p in range(vectors):
                        at = r * vectors + p
                        sums[at] = _dot4(builder, sums[at], found[p], value)
            scale_at = builder.add(builder.mul(group, _i64(BLOCK)), _i64(first * 16))
            scales = [
                load_at(
                    builder,
                    pointer(builder, w_scale, builder.add(scale_at, _i64(16 * p)), F32_VECTOR, 4),
                )
                for p in range(vectors)
            ]
            results = []
            for r in range(rows):
                at = builder.add(offsets[r], group)
                one = load_at(builder, pointer(builder, x_scale, at, F32, 4))
                x_scales = splat_of(builder, one, F32_VECTOR)
                for p in range(vectors):
                    at = r * vectors + p
                    scale = builder.fmul(x_scales, scales[p])
                    value = builder.sitofp(sums[at], F32_VECTOR)
                    results.append(fma_of(builder, value, scale, carried[at]))
            return results

        start = [constant(F32_VECTOR, 0.0)] * len(places)
        _store_all(builder, _counted(builder, num_groups, start, body), places)


int8_tile = _by_rows(INT8_TILE.rows, _int8_tile, 9)
