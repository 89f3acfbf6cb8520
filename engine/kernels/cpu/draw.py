"""Draws a token from a row of logits in two passes over it: maxima, then weights.

What a draw means is told by `engine.sampler`. The kernel knows rows of float32 and the numbers of
seats (`SEATS`), no requests. Each row is worked on alone and always in the same order, so that a
draw depends on no other row and on no number of threads; `draw_rows` takes a range of rows.

What top-k and top-p leave is found among the candidates near the maximum. Logits are compared as
integers of the same order (keys), so that equal logits are equal, whatever rounds their weights.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from engine.kernels.cpu.vector import (
    F32_VECTOR,
    I32_VECTOR,
    LANES,
    across,
    constant,
    exp,
    f32x16,
    i32x16,
    larger,
    larger_of,
    largest,
    load,
    magnitude_bits,
    splat,
    store,
    total,
)
from engine.plan import BAD_TOKEN, NO_TOKEN

BLOCK = 4 * LANES  # logits whose maximum and mass are kept
LEAST = -87.0  # where `exp` ends: less has no weight
UNKNOWN, SOUND, UNSOUND = range(3)  # whether a row was finite before it was changed

SEATS = np.dtype(
    [
        ("seed", np.uint64),
        ("top_p", np.float64),  # 1 = off
        ("top_k", np.int64),  # 0 = off
        ("temperature", np.float32),  # 0 = greedy
        ("least", np.float32),  # logarithm of min_p, or LEAST
    ]
)


@intrinsic
def keys(typing: Any, x: Any) -> Any:
    """Integers in the order of the float32; both zeros are one."""

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        bits = builder.bitcast(args[0], I32_VECTOR)
        sign = builder.ashr(bits, constant(I32_VECTOR, 31))
        key = builder.xor(bits, builder.and_(sign, constant(I32_VECTOR, 0x7FFFFFFF)))
        is_minus_zero = builder.icmp_signed("==", key, constant(I32_VECTOR, -1))
        return builder.select(is_minus_zero, constant(I32_VECTOR, 0), key)

    return i32x16(f32x16), emit


@intrinsic
def largest_key(typing: Any, x: Any) -> Any:
    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return across(builder, args[0], lambda a, b: larger_of(builder, a, b))

    return types.int32(i32x16), emit


@intrinsic
def where_at_least(typing: Any, x: Any, low: Any, value: Any) -> Any:
    """`value` where x >= low, else 0."""

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        x, low, value = args
        is_kept = builder.fcmp_ordered(">=", x, low)
        return builder.select(is_kept, value, ir.Constant(F32_VECTOR, [0.0] * LANES))

    return f32x16(f32x16, f32x16, f32x16), emit


@njit(forceinline=True)
def key_of(bits):
    """As `keys`, of the bits of one float32."""
    key = np.int64(bits)
    if key < 0:
        key ^= 0x7FFFFFFF
    return 0 if key == -1 else key


@njit(cache=True, nogil=True)
def uniform(seed, position):
    """As `engine.kernels.philox.uniform`."""
    low = np.uint64(0xFFFFFFFF)
    half = np.uint64(32)
    c0, c1 = np.uint64(position) & low, np.uint64(position) >> half
    c2, c3 = np.uint64(0), np.uint64(0)
    k0, k1 = seed & low, seed >> half
    for _ in range(10):
        product_0, product_1 = np.uint64(0xD2511F53) * c0, np.uint64(0xCD9E8D57) * c2
        c0, c1 = (product_1 >> half) ^ c1 ^ k0, product_1 & low
        c2, c3 = (product_0 >> half) ^ c3 ^ k1, product_0 & low
        k0 = (k0 + np.uint64(0x9E3779B9)) & low
        k1 = (k1 + np.uint64(0xBB67AE85)) & low
    return np.float64(np.int64(c0 >> np.uint64(8))) * 2.0**-24


@njit(forceinline=True)
def _address(row, tail, block):
    """Where a block lies: the last one, where it is not whole, in `tail`."""
    if (block + 1) * BLOCK > row.size:
        return tail.ctypes.data
    return row.ctypes.data + 4 * BLOCK * block


@njit(cache=True, nogil=True)
def _fill_tail(row, tail, padding):
    begun = row.size // BLOCK * BLOCK
    for i in range(BLOCK):
        tail[i] = row[begun + i] if begun + i < row.size else padding


@njit(cache=True, nogil=True)
def _block_maximum(row, tail, block):
    address = _address(row, tail, block)
    most = keys(load(address, 0))
    for i in range(LANES, BLOCK, LANES):
        most = larger(most, keys(load(address, i)))
    return largest_key(most)


@njit(cache=True, nogil=True)
def find_maxima(row, tail, maxima):
    """The largest key of each block; whether all logits are finite."""
    _fill_tail(row, tail, row[0])
    magnitude = magnitude_bits(splat(np.float32(0.0)))
    for block in range(maxima.size):
        address = _address(row, tail, block)
        x = load(address, 0)
        most = keys(x)
        magnitude = larger(magnitude, magnitude_bits(x))
        for i in range(LANES, BLOCK, LANES):
            x = load(address, i)
            most = larger(most, keys(x))
            magnitude = larger(magnitude, magnitude_bits(x))
        maxima[block] = largest_key(most)
    return largest(magnitude) < np.inf


@njit(cache=True, nogil=True)
def _forbid(row, mask):
    """What a mask of bits does not allow, the lowest bit of the first byte being id 0."""
    for place in range((row.size + 7) // 8):
        byte = mask[place]
        if byte == 255:
            continue
        for token in range(8 * place, min(8 * place + 8, row.size)):
            if not byte >> (token & 7) & 1:
                row[token] = -np.inf


@njit(cache=True, nogil=True)
def _edit(row, tail, maxima, banned, ids, penalties):
    """Forbid what is banned, subtract penalties, and look for the maxima of those blocks again."""
    for token in banned:
        row[token] = -np.inf
    for i in range(ids.size):
        row[ids[i]] -= penalties[i]
    if banned.size + ids.size >= maxima.size:
        find_maxima(row, tail, maxima)
        return
    _fill_tail(row, tail, row[0])
    for token in banned:
        maxima[token // BLOCK] = _block_maximum(row, tail, token // BLOCK)
    for token in ids:
        maxima[token // BLOCK] = _block_maximum(row, tail, token // BLOCK)


@njit(cache=True, nogil=True)
def _first(row, maxima, key):
    """The first token with the largest key."""
    bits = row.view(np.int32)
    block = 0
    while maxima[block] != key:
        block += 1
    token = block * BLOCK
    while key_of(bits[token]) != key:
        token += 1
    return token


@njit(cache=True, nogil=True)
def _weigh(row, tail, best, temperature, least, weights, masses):
    """exp((logit - best) / temperature) of all tokens, 0 below `least`; the mass of each block."""
    _fill_tail(row, tail, np.float32(-np.inf))
    best_16, temperature_16, least_16 = splat(best), splat(temperature), splat(least)
    whole = 0.0
    for block in range(masses.size):
        address = _address(row, tail, block)
        mass = splat(np.float32(0.0))
        for i in range(0, BLOCK, LANES):
            x = (load(address, i) - best_16) / temperature_16
            weight = where_at_least(x, least_16, exp(x))
            store(weights.ctypes.data, block * BLOCK + i, weight)
            mass = mass + weight
        masses[block] = total(mass)
        whole += masses[block]
    return whole


@njit(cache=True, nogil=True)
def _by_blocks(weights, masses, goal):
    """The first token whose running mass exceeds the goal, which is less than the whole mass."""
    running, block, last = 0.0, 0, 0
    for block in range(masses.size):
        if masses[block] > 0.0:
            last = block
            if running + masses[block] > goal:
                break
            running += masses[block]
    token = last * BLOCK
    for i in range(last * BLOCK, (last + 1) * BLOCK):
        if weights[i] > 0.0:
            token = i
            running += weights[i]
            if running > goal:
                break
    return token


@njit(cache=True, nogil=True)
def _collect(row, maxima, cut, weights, found, found_keys):
    """Tokens with weight from the key `cut` on, in the order of their ids."""
    bits = row.view(np.int32)
    num, mass = 0, 0.0
    for block in range(maxima.size):
        if maxima[block] < cut:
            continue
        for token in range(block * BLOCK, min((block + 1) * BLOCK, row.size)):
            key = key_of(bits[token])
            if key >= cut and weights[token] > 0.0:
                found[num], found_keys[num] = token, key
                num += 1
                mass += weights[token]
    return num, mass


@njit(cache=True, nogil=True)
def _threshold(work_keys, work_weights, num, top_k, top_p):
    """The largest key from which on there are `top_k` tokens or a mass of `top_p`, else the least;
    number and mass above, and number at it. Halves the range of keys; overwrites the work."""
    above, mass_above = 0, 0.0
    while True:
        low = high = work_keys[0]
        for i in range(num):
            low, high = min(low, work_keys[i]), max(high, work_keys[i])
        if low == high:
            return low, above, mass_above, num
        middle = low + (np.int64(high) - low + 1) // 2
        upper, mass = 0, 0.0
        for i in range(num):
            if work_keys[i] >= middle:
                upper += 1
                mass += work_weights[i]
        is_upper = above + upper >= top_k or mass_above + mass >= top_p
        if not is_upper:
            above += upper
            mass_above += mass
        kept = 0
        for i in range(num):
            if (work_keys[i] >= middle) == is_upper:
                work_keys[kept], work_weights[kept] = work_keys[i], work_weights[i]
                kept += 1
        num = kept


@njit(cache=True, nogil=True)
def _among_candidates(row, maxima, best, seat, whole, u, scratch):
    """A draw from what top-k and top-p leave."""
    weights, found, found_keys, work_keys, work_weights, cut = scratch
    top_k = seat.top_k if 0 < seat.top_k < row.size else row.size
    top_p = seat.top_p * whole if seat.top_p < 1.0 else np.inf
    depth = 4.0
    while True:
        cut[0] = best - seat.temperature * np.float32(depth) if depth < -LEAST else -np.inf
        lowest = key_of(cut.view(np.int32)[0])
        num, mass = _collect(row, maxima, lowest, weights, found, found_keys)
        if num >= top_k or mass >= top_p or depth >= -LEAST:
            break
        depth *= 1.5
    for i in range(num):
        work_keys[i], work_weights[i] = found_keys[i], weights[found[i]]
    key, above, mass_above, equal = _threshold(work_keys, work_weights, num, top_k, top_p)
    share = (top_k - above) / equal
    if seat.top_p < 1.0:
        share = min(share, (top_p - mass_above) / (work_weights[0] * np.float64(equal)))
    share = min(max(share, 0.0), 1.0)
    mass = 0.0
    for i in range(num):
        if found_keys[i] >= key:
            mass += weights[found[i]] * (1.0 if found_keys[i] > key else share)
    running, token = 0.0, found[0]
    for i in range(num):
        if found_keys[i] < key:
            continue
        weight = weights[found[i]] * (1.0 if found_keys[i] > key else share)
        if weight > 0.0:
            token = found[i]
            running += weight
            if running > u * mass:
                break
    return token


@njit(cache=True, nogil=True, error_model="numpy")
def _draw_row(row, seat, position, soundness, mask, banned, ids, penalties, scratch):
    tail, maxima, masses, candidates = scratch
    is_finite = find_maxima(row, tail, maxima)
    if soundness == UNSOUND or (soundness == UNKNOWN and not is_finite):
        return BAD_TOKEN
    if mask.size:
        _forbid(row, mask)
        find_maxima(row, tail, maxima)
    if banned.size or ids.size:
        _edit(row, tail, maxima, banned, ids, penalties)
    key = maxima.max()
    token = _first(row, maxima, key)
    best = row[token]
    if best == -np.inf:
        return NO_TOKEN
    if seat.temperature == 0.0:
        return token
    weights = candidates[0]
    whole = _weigh(row, tail, best, seat.temperature, seat.least, weights, masses)
    u = uniform(seat.seed, position)
    if 0 < seat.top_k < row.size or seat.top_p < 1.0:
        return _among_candidates(row, maxima, best, seat, whole, u, candidates)
    return _by_blocks(weights, masses, u * whole)


@njit(cache=True, nogil=True, error_model="numpy")
def draw_rows(
    first, last, logits_RV, seats_R, positions_R, soundness_R, mask_R, masks_GM, banned,
    starts_R1, ids, penalties, tokens_R,
):  # fmt: skip
    """Tokens of the rows from `first` to before `last`; overwrites their logits.

    `mask_R` is a row of `masks_GM`, or -1; `penalties` are those of row i from starts_R1[i] on.
    """
    vocab_size = logits_RV.shape[1]
    num_blocks = (vocab_size + BLOCK - 1) // BLOCK
    candidates = (
        np.empty(num_blocks * BLOCK, np.float32), np.empty(vocab_size, np.int32),
        np.empty(vocab_size, np.int32), np.empty(vocab_size, np.int32),
        np.empty(vocab_size, np.float32), np.empty(1, np.float32),
    )  # fmt: skip
    scratch = (
        np.empty(BLOCK, np.float32), np.empty(num_blocks, np.int32),
        np.empty(num_blocks, np.float32), candidates,
    )  # fmt: skip
    nothing = masks_GM[0, :0]
    for i in range(first, last):
        mask = masks_GM[mask_R[i]] if mask_R[i] >= 0 else nothing
        part = slice(starts_R1[i], starts_R1[i + 1])
        tokens_R[i] = _draw_row(
            logits_RV[i], seats_R[i], positions_R[i], soundness_R[i], mask, banned,
            ids[part], penalties[part], scratch,
        )  # fmt: skip
