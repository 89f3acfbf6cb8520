"""What RWKV-7 computes of one token in one head before and after its recurrence, both ways.

Specification: `reference.time_mix` around `wkv7`. With rate = sigmoid(a), gate = sigmoid(d),
share = sigmoid(m), before it:

    w = exp(DECAY_SCALE * gate)             kk = k * k_k / max(|k * k_k|, KEY_NORM_EPS)
    key = k * (1 + (rate - 1) * k_a)        value = v + (v_first - v) * share
    A = -kk                                 B = kk * rate

and after it out = (norm(y) * weight + bias + (sum of r * key * r_k) * value) * g. Gradients, d_x
being that of the loss by x:

    d_rate = d_B * kk + d_key * k * k_a     d_kk = d_B * rate - d_A
    d_k = p * k_k + d_key * (1 + (rate - 1) * k_a),  p = (d_kk - kk * (d_kk . kk)) / |k * k_k|
    d_d = d_w * w * DECAY_SCALE * gate * (1 - gate)
    d_v = d_value * (1 - share)             d_v_first = d_value * share
    d_y = scale * (n - mean(n) - normed * mean(n * normed)),  n = d_out * g * weight

Memory is addresses; `run` is a record of `recurrence.RUN`. A token's own vectors lie in the
thread's scratch, one place of `size` float32 each; gradients of parameters are added up at
`partial`, a row of C for each of them. Head sizes are multiples of 16; where the model's is not,
the rest is zeros in all that comes in, and `run.mask` says so to the norm.
"""

from __future__ import annotations

import math

from numba import float32, njit

from engine.kernels.cpu.vector import exp, fma, load, sigmoid, splat, store, total
from engine.kernels.reference import DECAY_SCALE, GROUP_NORM_EPS, KEY_NORM_EPS

# Places of a token in the scratch.
W, KEY, A, B, VALUE, D_W, D_KEY, D_A, D_B, D_VALUE, D_R, D_Y = range(12)
NUM_PLACES = 12
# Rows of a partial sum.
D_K_K, D_K_A, D_R_K, D_WEIGHT, D_BIAS = range(5)
NUM_PARTIALS = 5

SCALE, EPS, KEY_EPS = float32(DECAY_SCALE), float32(GROUP_NORM_EPS), float32(KEY_NORM_EPS)


@njit(forceinline=True)
def _add(where, offset, value):
    store(where, offset, load(where, offset) + value)


@njit(cache=True, nogil=True)
def prepare(run, head, row, token):
    """W, KEY, A, B and VALUE of a token; returns what its removal key was divided by."""
    size = run.size
    c = head * size
    o = row * run.width + c
    one, squares = splat(1.0), splat(0.0)
    for i in range(0, size, 16):
        gate = sigmoid(load(run.d, o + i))
        store(token, W * size + i, exp(gate * splat(SCALE)))
        rate = sigmoid(load(run.a, o + i))
        k = load(run.k, o + i)
        removed = k * load(run.k_k, c + i)
        squares = fma(removed, removed, squares)
        store(token, A * size + i, removed)
        store(token, B * size + i, rate)
        store(token, KEY * size + i, k * fma(rate - one, load(run.k_a, c + i), one))
        value = load(run.v, o + i)
        if run.v_first != 0:
            share = sigmoid(load(run.m, o + i))
            value = fma(load(run.v_first, o + i) - value, share, value)
        store(token, VALUE * size + i, value)
    norm = float32(math.sqrt(total(squares)))
    norm = KEY_EPS if norm < KEY_EPS else norm  # NaN stays NaN
    divisor, zero = splat(norm), splat(0.0)
    for i in range(0, size, 16):
        kk = load(token, A * size + i) / divisor
        store(token, A * size + i, zero - kk)
        store(token, B * size + i, load(token, B * size + i) * kk)
    return norm


@njit(cache=True, nogil=True)
def _moments(run, y):
    """Mean of y, and one over its standard deviation."""
    sums, squares = splat(0.0), splat(0.0)
    for i in range(0, run.size, 16):
        sums = sums + load(y, i)
    mean = total(sums) / float32(run.head_size)
    for i in range(0, run.size, 16):
        moved = load(y, i) - splat(mean) * load(run.mask, i)
        squares = fma(moved, moved, squares)
    variance = total(squares) / float32(run.head_size)
    return mean, float32(1.0) / float32(math.sqrt(variance + EPS))


@njit(cache=True, nogil=True)
def read_out(run, head, row, token):
    """Group norm of y, the bonus, the gate."""
    size = run.size
    c = head * size
    o = row * run.width + c
    y = run.y + 4 * o
    bonus = splat(0.0)
    for i in range(0, size, 16):
        product = load(run.r, o + i) * load(token, KEY * size + i)
        bonus = fma(product, load(run.r_k, c + i), bonus)
    times = splat(total(bonus))
    mean, scale = _moments(run, y)
    for i in range(0, size, 16):
        normed = (load(y, i) - splat(mean)) * splat(scale)
        z = fma(normed, load(run.norm_weight, c + i), load(run.norm_bias, c + i))
        z = fma(times, load(token, VALUE * size + i), z)
        store(run.out, o + i, z * load(run.g, o + i))


@njit(cache=True, nogil=True)
def read_out_backward(run, head, row, token, partial):
    """D_Y, and what the bonus gives to D_R, D_KEY and D_VALUE; d_g is whole."""
    size, width = run.size, run.width
    c = head * size
    o = row * width + c
    y = run.y + 4 * o
    mean, scale = _moments(run, y)
    sum_bonus, sum_d_bonus = splat(0.0), splat(0.0)
    sum_n, sum_along = splat(0.0), splat(0.0)
    for i in range(0, size, 16):
        normed = (load(y, i) - splat(mean) * load(run.mask, i)) * splat(scale)
        d_z = load(run.d_out, o + i) * load(run.g, o + i)
        _add(partial, D_WEIGHT * width + c + i, d_z * normed)
        _add(partial, D_BIAS * width + c + i, d_z)
        n = d_z * load(run.norm_weight, c + i)
        sum_n = sum_n + n
        sum_along = fma(n, normed, sum_along)
        product = load(run.r, o + i) * load(token, KEY * size + i)
        sum_bonus = fma(product, load(run.r_k, c + i), sum_bonus)
        sum_d_bonus = fma(d_z, load(token, VALUE * size + i), sum_d_bonus)
    bonus, d_bonus = splat(total(sum_bonus)), splat(total(sum_d_bonus))
    mean_n = splat(total(sum_n) / float32(run.head_size))
    along = splat(total(sum_along) / float32(run.head_size))
    for i in range(0, size, 16):
        mask = load(run.mask, i)
        normed = (load(y, i) - splat(mean) * mask) * splat(scale)
        d_out = load(run.d_out, o + i)
        d_z = d_out * load(run.g, o + i)
        weight, r_k = load(run.norm_weight, c + i), load(run.r_k, c + i)
        r, key = load(run.r, o + i), load(token, KEY * size + i)
        z = fma(bonus, load(token, VALUE * size + i), load(run.norm_bias, c + i))
        store(run.d_g, o + i, d_out * fma(normed, weight, z))
        d_y = (d_z * weight - mean_n * mask - normed * along) * splat(scale)
        store(token, D_Y * size + i, d_y)
        store(token, D_VALUE * size + i, d_z * bonus)
        store(token, D_R * size + i, d_bonus * key * r_k)
        store(token, D_KEY * size + i, d_bonus * r * r_k)
        _add(partial, D_R_K * width + c + i, d_bonus * r * key)


@njit(cache=True, nogil=True)
def prepare_backward(run, head, row, token, norm, partial):
    """Gradients of a token's inputs, from those of W, KEY, A, B, VALUE and r."""
    size, width = run.size, run.width
    c = head * size
    o = row * width + c
    one, zero, sums = splat(1.0), splat(0.0), splat(0.0)
    for i in range(0, size, 16):
        kk = zero - load(token, A * size + i)
        rate = sigmoid(load(run.a, o + i))
        d_kk = fma(load(token, D_B * size + i), rate, zero - load(token, D_A * size + i))
        sums = fma(d_kk, kk, sums)
    # A key shorter than the least divisor is divided by a constant.
    along = splat(total(sums) if norm > KEY_EPS else float32(0.0))
    for i in range(0, size, 16):
        kk = zero - load(token, A * size + i)
        rate, k = sigmoid(load(run.a, o + i)), load(run.k, o + i)
        k_k, k_a = load(run.k_k, c + i), load(run.k_a, c + i)
        d_b, d_key = load(token, D_B * size + i), load(token, D_KEY * size + i)
        d_rate = fma(d_b, kk, d_key * k * k_a)
        store(run.d_a, o + i, d_rate * rate * (one - rate))
        d_kk = fma(d_b, rate, zero - load(token, D_A * size + i))
        d_product = (d_kk - kk * along) / splat(norm)
        store(run.d_k, o + i, fma(d_product, k_k, d_key * fma(rate - one, k_a, one)))
        _add(partial, D_K_K * width + c + i, d_product * k)
        _add(partial, D_K_A * width + c + i, d_key * k * (rate - one))
        gate = sigmoid(load(run.d, o + i))
        d_log = load(token, D_W * size + i) * load(token, W * size + i)
        store(run.d_d, o + i, d_log * splat(SCALE) * gate * (one - gate))
        store(run.d_r, o + i, load(token, D_R * size + i))
        d_value = load(token, D_VALUE * size + i)
        if run.v_first != 0:
            share = sigmoid(load(run.m, o + i))
            away = load(run.v_first, o + i) - load(run.v, o + i)
            store(run.d_v_first, o + i, d_value * share)
            store(run.d_m, o + i, d_value * away * share * (one - share))
            d_value = d_value * (one - share)
        store(run.d_v, o + i, d_value)
