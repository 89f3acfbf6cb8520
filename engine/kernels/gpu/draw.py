"""The kernels that draw a token per row, in Triton. Knows arrays, no tensors and no launches.

The rules of a seat are added to the logits, then these become weights relative to the largest:
two kernels with a program for each tile. The third has one for each row: the threshold of top-k
and top-p is found by narrowing an interval of float bits, so that no weight is ever sorted, and
the token by running sums. Greedy rows need nothing but the maximum; rows without limits pass over
the search. Sums have one order, whatever the batch: a draw depends on its row alone.

What a draw means is told by `engine.sampler`; the arrays of seats are `sampler.SeatArrays`.

Legend: V vocabulary, W words of 32 tokens, T tiles.
"""

from __future__ import annotations

import triton
import triton.language as tl

from engine.plan import BAD_TOKEN, NO_TOKEN

# Columns of `SeatArrays.floats` and `.integers`, and bits of the flags.
INVERSE_TEMPERATURE, TOP_P, LOG_MIN_P = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
PRESENCE, REPETITION, DECAY, NUM_FLOATS = (tl.constexpr(i) for i in range(3, 7))
SEED, TOP_K, MIN_TOKENS, FLAGS, NUM_INTEGERS = (tl.constexpr(i) for i in range(5))
IS_GREEDY, IS_LIMITED, HAS_BIASES, HAS_PENALTIES = (tl.constexpr(1 << i) for i in range(4))

LEAST_SCALE = tl.constexpr(2.0**-64)  # far from what float32 cannot hold, on both sides
LEAST_PENALTY = tl.constexpr(2.0**-126)  # but for zero
BAD, NONE = tl.constexpr(BAD_TOKEN), tl.constexpr(NO_TOKEN)
ROWS = tl.constexpr(4)  # of a tile that the search looks at together: loads in flight per thread


@triton.jit
def adjust_kernel(
    logits_ptr,
    logits_stride,
    seats_ptr,
    integers_ptr,
    allowed_ptr,
    biases_ptr,
    penalties_ptr,
    scales_ptr,
    num_drawn_ptr,
    masks_ptr,
    masks_stride,
    x_ptr,
    stats_ptr,
    best_ids_ptr,
    num_seats,
    V: tl.constexpr,
    TILE: tl.constexpr,
    T: tl.constexpr,
    HAS_MASKS: tl.constexpr,
):
    """Program (row, tile): biases, penalties, and -inf for what may not be drawn.

    stats [row, 4, T] gets the largest logit, the sum of e^(logit - largest), which is NaN if one
    is not finite, and the largest adjusted one, best_ids [row, T] the first id that has it.
    """
    row, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    seat = tl.load(seats_ptr + row).to(tl.int64)
    if seat < 0:  # padding
        return
    W: tl.constexpr = (V + 31) // 32
    integers = integers_ptr + seat * NUM_INTEGERS
    flags = tl.load(integers + FLAGS)
    word = tile * (TILE // 32) + tl.arange(0, TILE // 32)
    bit = tl.arange(0, 32)[None, :]
    token = word[:, None] * 32 + bit
    inside = token < V

    logits = tl.load(logits_ptr + row * logits_stride + token, mask=inside, other=0.0)
    logits = logits.to(tl.float32)
    is_sound = tl.abs(logits) < float("inf")
    num_bad = tl.sum(tl.sum(tl.where(is_sound, 0, 1), 1), 0)
    logits = tl.where(is_sound & inside, logits, float("-inf"))
    largest = tl.max(tl.max(logits, 1), 0)
    shift = tl.where(num_bad > 0, 0.0, largest)
    mass = tl.sum(tl.sum(tl.exp(tl.minimum(logits - shift, 0.0)), 1), 0)
    stats = stats_ptr + row * (4 * T) + tile
    tl.store(stats, largest)
    tl.store(stats + T, tl.where(num_bad > 0, float("nan"), mass))

    is_early = tl.load(num_drawn_ptr + seat) < tl.load(integers + MIN_TOKENS)
    allowed = allowed_ptr + (tl.where(is_early, num_seats, 0) + seat) * W
    words = tl.load(allowed + word, mask=word < W, other=0)
    if HAS_MASKS:
        words &= tl.load(masks_ptr + row * masks_stride + word, mask=word < W, other=0)
    x = tl.where(((words[:, None] >> bit) & 1) != 0, logits, float("-inf"))
    if flags & HAS_BIASES:
        x += tl.load(biases_ptr + seat * V + token, mask=inside, other=0.0)
    if flags & HAS_PENALTIES:
        entries = tl.load(penalties_ptr + seat * V + token, mask=inside, other=0.0)
        x -= entries * tl.load(scales_ptr + seat)
    best = tl.max(tl.max(x, 1), 0)
    tl.store(stats + 2 * T, best)
    tl.store(best_ids_ptr + row * T + tile, tl.min(tl.min(tl.where(x == best, token, V), 1), 0))
    if (flags & IS_GREEDY) == 0:
        tl.store(x_ptr + row * (T * TILE) + token, x)


@triton.jit
def weigh_kernel(
    seats_ptr,
    floats_ptr,
    integers_ptr,
    x_ptr,
    stats_ptr,
    TILE: tl.constexpr,
    T: tl.constexpr,
    T_POWER: tl.constexpr,
):
    """Program (row, tile): temperature and min_p. Weights take the place of x, 1 being the
    largest; stats [row, 3, tile] gets their sum."""
    row, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    seat = tl.load(seats_ptr + row).to(tl.int64)
    if seat < 0:
        return
    if tl.load(integers_ptr + seat * NUM_INTEGERS + FLAGS) & IS_GREEDY:
        return
    tiles = tl.arange(0, T_POWER)
    stats = stats_ptr + row * (4 * T)
    best = tl.max(tl.load(stats + 2 * T + tiles, mask=tiles < T, other=float("-inf")), 0)
    if best == float("-inf"):
        return
    floats = floats_ptr + seat * NUM_FLOATS
    at = x_ptr + row * (T * TILE) + tile * TILE + tl.arange(0, TILE)
    x = (tl.load(at) - best) * tl.load(floats + INVERSE_TEMPERATURE)
    weights = tl.where(x < tl.load(floats + LOG_MIN_P), 0.0, tl.exp(x))
    tl.store(at, weights)
    tl.store(stats + 3 * T + tile, tl.sum(weights, 0))


@triton.jit
def _threshold(weights, goal, top_k, mass, V: tl.constexpr, TILE: tl.constexpr, T: tl.constexpr):
    """The bits of the largest weight t with mass(w >= t) >= goal or count(w >= t) >= top_k.

    As an interval [low, high] that holds no other weight, with mass and count of the weights from
    it on and above it. Three places in the interval are tried at a time, and its ends then move
    on to the nearest weights. Floats that are not negative are ordered as their bits are.
    """
    LANES: tl.constexpr = TILE // ROWS
    offsets = tl.arange(0, ROWS)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    low, high = 0, 0x40000000  # 0.0 and 2.0
    num_from, num_above = V, 0
    mass_from, mass_above = mass, 0.0
    while (low < high) & (num_from - num_above > 1):
        step = (high - low + 3) // 4
        m1, m2, m3 = low + step, low + 2 * step, low + 3 * step
        n1 = tl.zeros([LANES], tl.int32)
        n2 = tl.zeros([LANES], tl.int32)
        n3 = tl.zeros([LANES], tl.int32)
        s1 = tl.zeros([LANES], tl.float32)
        s2 = tl.zeros([LANES], tl.float32)
        s3 = tl.zeros([LANES], tl.float32)
        least = tl.full([LANES], 0x7F800000, tl.int32)
        most = tl.zeros([LANES], tl.int32)
        for tile in range(T):
            w = tl.load(weights + tile * TILE + offsets)
            bits = w.to(tl.int32, bitcast=True)
            n1 += tl.sum((bits >= m1).to(tl.int32), 0)
            n2 += tl.sum((bits >= m2).to(tl.int32), 0)
            n3 += tl.sum((bits >= m3).to(tl.int32), 0)
            s1 += tl.sum(tl.where(bits >= m1, w, 0.0), 0)
            s2 += tl.sum(tl.where(bits >= m2, w, 0.0), 0)
            s3 += tl.sum(tl.where(bits >= m3, w, 0.0), 0)
            least = tl.minimum(least, tl.min(tl.where(bits >= low, bits, 0x7F800000), 0))
            most = tl.maximum(most, tl.max(tl.where(bits <= high, bits, 0), 0))
        n1, s1 = tl.sum(n1, 0), tl.sum(s1, 0)
        n2, s2 = tl.sum(n2, 0), tl.sum(s2, 0)
        n3, s3 = tl.sum(n3, 0), tl.sum(s3, 0)
        is1 = (n1 >= top_k) | (s1 >= goal)
        is2 = (n2 >= top_k) | (s2 >= goal)
        is3 = (n3 >= top_k) | (s3 >= goal)
        num_above = tl.where(is3, num_above, tl.where(is2, n3, tl.where(is1, n2, n1)))
        mass_above = tl.where(is3, mass_above, tl.where(is2, s3, tl.where(is1, s2, s1)))
        num_from = tl.where(is3, n3, tl.where(is2, n2, tl.where(is1, n1, num_from)))
        mass_from = tl.where(is3, s3, tl.where(is2, s2, tl.where(is1, s1, mass_from)))
        new_high = tl.where(is3, high, tl.where(is2, m3, tl.where(is1, m2, m1)) - 1)
        new_low = tl.where(is3, m3, tl.where(is2, m2, tl.where(is1, m1, low)))
        low = tl.maximum(new_low, tl.min(least, 0))
        high = tl.minimum(tl.minimum(new_high, high), tl.max(most, 0))
    return low, high, num_from, num_above, mass_from, mass_above


@triton.jit
def _share(goal, top_p, top_k, num_from, num_above, mass_from, mass_above):
    """How much of their weight the tokens at the threshold keep."""
    num_equal = (num_from - num_above).to(tl.float32)
    share = (top_k - num_above).to(tl.float32) / num_equal
    mass_equal = mass_from - mass_above
    if (top_p < 1.0) & (mass_equal > 0.0):
        share = tl.minimum(share, (goal - mass_above) / mass_equal)
    # Where none is above them, all keep the same share, and it may be too small for a float.
    return tl.where(num_above == 0, 1.0, tl.maximum(tl.minimum(share, 1.0), 0.0))


@triton.jit
def _kept(weights, low, high, share):
    bits = weights.to(tl.int32, bitcast=True)
    return tl.where(bits > high, weights, tl.where(bits >= low, weights * share, 0.0))


@triton.jit
def _pick(
    weights,
    sums,
    is_limited,
    uniform,
    top_p,
    top_k,
    V: tl.constexpr,
    TILE: tl.constexpr,
    T: tl.constexpr,
    T_POWER: tl.constexpr,
):
    """The first id whose running mass exceeds that part of the kept mass; sums [T_POWER] are those
    of the tiles, before limits."""
    LANES: tl.constexpr = TILE // ROWS
    tiles = tl.arange(0, T_POWER)
    low, high, share = 0, -1, 1.0
    if is_limited:
        mass = tl.sum(sums, 0)
        goal = tl.where(top_p < 1.0, top_p * mass, float("inf"))
        low, high, num_from, num_above, mass_from, mass_above = _threshold(
            weights, goal, top_k, mass, V, TILE, T
        )
        share = _share(goal, top_p, top_k, num_from, num_above, mass_from, mass_above)
        offsets = tl.arange(0, ROWS)[:, None] * LANES + tl.arange(0, LANES)[None, :]
        for tile in range(T):
            kept = _kept(tl.load(weights + tile * TILE + offsets), low, high, share)
            sums = tl.where(tiles == tile, tl.sum(tl.sum(kept, 0), 0), sums)
    goal = uniform * tl.sum(sums, 0)
    # A scan may round its sums out of order: what has no weight is never hit all the same.
    hits = (tl.cumsum(sums, 0) > goal) & (sums > 0.0)
    last = tl.max(tl.where(sums > 0.0, tiles, 0), 0)
    tile = tl.minimum(tl.min(tl.where(hits, tiles, T_POWER), 0), last)
    before = tl.sum(tl.where(tiles < tile, sums, 0.0), 0)
    lane = tl.arange(0, TILE)
    kept = _kept(tl.load(weights + tile * TILE + lane), low, high, share)
    hits = (before + tl.cumsum(kept, 0) > goal) & (kept > 0.0)
    last = tl.max(tl.where(kept > 0.0, lane, 0), 0)
    return tile * TILE + tl.minimum(tl.min(tl.where(hits, lane, TILE), 0), last)


@triton.jit
def _uniform(seed, position):
    """`engine.kernels.philox.uniform`."""
    low = (position & 0xFFFFFFFF).to(tl.uint32)
    high = ((position >> 32) & 0xFFFFFFFF).to(tl.uint32)
    zero = tl.zeros_like(low)
    bits, _, _, _ = tl.philox(seed, low, high, zero, zero)
    return (bits >> 8).to(tl.int32).to(tl.float32) * (2.0**-24)


@triton.jit
def _penalise(floats, entries, scale_ptr, token, V: tl.constexpr, TILE: tl.constexpr):
    """`Penalties.update` of one token. Its numbers, to the last bit, are those of
    `engine.device_sampler.replayed`: no multiplication here may be fused with an addition."""
    presence, repetition = tl.load(floats + PRESENCE), tl.load(floats + REPETITION)
    decay = tl.load(floats + DECAY)
    scale = tl.load(scale_ptr) * decay
    tl.debug_barrier()  # all threads take the same way below, which one of them writes the scale on
    # Down to a half, rounding lets what decays arrive at zero; above it stays, however small.
    is_lost = decay <= 0.5
    if scale < LEAST_SCALE:
        lane = tl.arange(0, TILE)
        for start in range(0, V, TILE):
            at = entries + start + lane
            old = tl.load(at, mask=start + lane < V, other=0.0)
            new = old * scale
            stays = (old != 0.0) & (tl.abs(new) < LEAST_PENALTY) & (is_lost == 0)
            new = tl.where(stays, tl.where(old > 0.0, LEAST_PENALTY, -LEAST_PENALTY), new)
            added = tl.where(new == 0.0, presence, repetition)
            new = tl.where(start + lane == token, new + added, new)
            tl.store(at, new, mask=start + lane < V)
        tl.store(scale_ptr, 1.0)
    else:
        old = tl.load(entries + token)
        is_first = tl.where(is_lost, old * scale, old) == 0.0
        added = tl.div_rn(tl.where(is_first, presence, repetition), scale)
        tl.store(entries + token, old + added)
        tl.store(scale_ptr, scale)


@triton.jit
def pick_kernel(
    logits_ptr,
    logits_stride,
    seats_ptr,
    positions_ptr,
    floats_ptr,
    integers_ptr,
    penalties_ptr,
    scales_ptr,
    num_drawn_ptr,
    weights_ptr,
    stats_ptr,
    best_ids_ptr,
    tokens_ptr,
    logprobs_ptr,
    V: tl.constexpr,
    TILE: tl.constexpr,
    T: tl.constexpr,
    T_POWER: tl.constexpr,
):
    """Program (row): the token, its log probability by the logits as they were, and what drawing
    it changes for its seat."""
    row = tl.program_id(0).to(tl.int64)
    seat = tl.load(seats_ptr + row).to(tl.int64)
    if seat < 0:
        return
    tiles = tl.arange(0, T_POWER)
    there = tiles < T
    stats = stats_ptr + row * (4 * T) + tiles
    largests = tl.load(stats, mask=there, other=float("-inf"))
    largest = tl.max(largests, 0)
    masses = tl.load(stats + T, mask=there, other=0.0)
    mass = tl.sum(masses * tl.exp(tl.minimum(largests - largest, 0.0)), 0)
    bests = tl.load(stats + 2 * T, mask=there, other=float("-inf"))
    best = tl.max(bests, 0)
    if (mass != mass) | (best == float("-inf")):
        tl.store(tokens_ptr + row, tl.where(mass != mass, BAD, NONE))
        tl.store(logprobs_ptr + row, float("nan"))
        return
    floats = floats_ptr + seat * NUM_FLOATS
    integers = integers_ptr + seat * NUM_INTEGERS
    flags = tl.load(integers + FLAGS)
    best_ids = tl.load(best_ids_ptr + row * T + tiles, mask=there, other=V)
    token = tl.min(tl.where(bests == best, best_ids, V), 0)
    if (flags & IS_GREEDY) == 0:
        token = _pick(
            weights_ptr + row * (T * TILE),
            tl.load(stats + 3 * T, mask=there, other=0.0),
            (flags & IS_LIMITED) != 0,
            _uniform(tl.load(integers + SEED), tl.load(positions_ptr + row).to(tl.int64)),
            tl.load(floats + TOP_P),
            tl.load(integers + TOP_K).to(tl.int32),
            V,
            TILE,
            T,
            T_POWER,
        )
    logit = tl.load(logits_ptr + row * logits_stride + token).to(tl.float32)
    tl.store(tokens_ptr + row, token.to(tl.int64))
    tl.store(logprobs_ptr + row, logit - largest - tl.log(mass))
    tl.store(num_drawn_ptr + seat, tl.load(num_drawn_ptr + seat) + 1)
    if flags & HAS_PENALTIES:
        _penalise(floats, penalties_ptr + seat * V, scales_ptr + seat, token, V, TILE)
