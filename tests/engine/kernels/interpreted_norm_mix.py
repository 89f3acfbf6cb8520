"""LayerNorm with token shift against loops in float64. `test_triton` runs this file interpreted."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from engine.kernels.backend import Batch
from engine.kernels.gpu import backend as gpu
from engine.kernels.gpu import norm_mix as kernels

NUM_SLOTS, NUM_LAYERS, LAYER = 7, 2, 1
RAGGED = (3, 1, 4, 1)
# Relative error of the whole. In float32 a LayerNorm of numbers near 1 is off by a few 6e-8.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-6}


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.manual_seed(seed), dtype=torch.float64)


def inputs(num_tokens: int, channels: int, ways: int) -> tuple[Tensor, ...]:
    """x [T, C], weight and bias [C], mu [J, C]."""
    x, (weight, bias) = 2 * draw(num_tokens, channels) + 1, draw(2, channels, seed=1)
    return x, weight, bias, draw(ways, channels, seed=2)


def expected(
    x: Tensor, weight: Tensor, bias: Tensor, mu: Tensor, lengths: tuple[int, ...], firsts: Tensor
) -> tuple[Tensor, Tensor]:
    """Results [J, T, C] and the last token of each sequence, token by token."""
    mean, var = x.mean(1, keepdim=True), x.var(1, correction=0, keepdim=True)
    normed = (x - mean) / (var + 1e-5).sqrt() * weight + bias
    out, lasts, token = torch.empty(len(mu), *x.shape, dtype=x.dtype), [], 0
    for length, before in zip(lengths, firsts, strict=True):
        for _ in range(length):
            out[:, token] = mu * before + (1 - mu) * normed[token]
            before, token = normed[token], token + 1
        lasts.append(before)
    return out, torch.stack(lasts)


def error(got: Tensor, wanted: Tensor) -> float:
    assert torch.isfinite(got).all()
    return float((got.double() - wanted).norm() / wanted.norm())


def run(tensors, lengths, src, dst, pool):  # type: ignore[no-untyped-def]
    batch = Batch(lengths, torch.tensor(src), torch.tensor(dst))
    x, weight, bias, mu = tensors
    with torch.no_grad():
        return gpu.norm_mix(x, weight, bias, mu.unbind(), batch, pool)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("ways", [1, 6])
@pytest.mark.parametrize("channels", [32, 48])
@pytest.mark.parametrize("lengths", [(1, 1, 1, 1), RAGGED])
@pytest.mark.parametrize(
    ("src", "dst"),
    [
        pytest.param([3, 1, 6, 2], [3, 1, 6, 2], id="in place"),
        pytest.param([0, 0, 4, 5], [1, 2, 4, 6], id="from the zero page, in place, and moving"),
    ],
)
def test_rows_go_from_slot_to_slot(
    src: list[int],
    dst: list[int],
    lengths: tuple[int, ...],
    channels: int,
    ways: int,
    dtype: torch.dtype,
) -> None:
    pool = draw(NUM_SLOTS, NUM_LAYERS, channels, seed=3)
    tensors = inputs(sum(lengths), channels, ways)
    wanted, lasts = expected(*tensors, lengths, pool[src, LAYER])
    got_pool = pool.to(dtype)
    before = got_pool.clone()
    got = run([t.to(dtype) for t in tensors], lengths, src, dst, got_pool[:, LAYER])
    assert got.dtype == dtype
    assert error(got, wanted) < TOLERANCE[dtype]
    assert error(got_pool[dst, LAYER], lasts) < TOLERANCE[dtype]
    got_pool[dst, LAYER] = before[dst, LAYER]
    assert torch.equal(got_pool, before)


@pytest.mark.parametrize("lengths", [(1, 1, 1), (2, 3, 2)])
def test_padding_is_neither_read_nor_written(lengths: tuple[int, ...]) -> None:
    tensors = inputs(sum(lengths), 16, 6)
    pool = draw(4, 16, seed=3)
    wanted, lasts = expected(*tensors, lengths, pool[[1, 0, 2]])
    real = [t for t in range(sum(lengths)) if not lengths[0] <= t < lengths[0] + lengths[1]]
    tensors[0][lengths[0] : lengths[0] + lengths[1]] = torch.nan
    before = pool.clone()
    got = run(tensors, lengths, [1, -1, 2], [1, -1, 3], pool)
    assert error(got[:, real], wanted[:, real]) < 1e-13
    assert error(pool[[1, 3]], lasts[[0, 2]]) < 1e-13
    assert torch.equal(pool[[0, 2]], before[[0, 2]])


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_text_in_pieces_is_the_whole_bit_by_bit(dtype: torch.dtype) -> None:
    """Also where the pool has fewer bits than the arithmetic."""
    tensors = [t.to(dtype) for t in inputs(9, 32, 6)]
    whole, pieces = torch.zeros(2, 2, 32, dtype=torch.float16)
    got = run(tensors, (9,), [0], [1], whole)
    parts = [
        run([tensors[0][start:end], *tensors[1:]], (end - start,), [int(start > 0)], [1], pieces)
        for start, end in ((0, 1), (1, 4), (4, 5), (5, 9))
    ]
    assert torch.equal(torch.cat(parts, dim=1), got)
    assert torch.equal(whole, pieces)


def test_half_precision_rounds_what_is_kept_and_the_result_only() -> None:
    pool = draw(3, 64, seed=3).half()
    tensors = [t.half() for t in inputs(5, 64, 6)]
    wanted, lasts = expected(*(t.double() for t in tensors), (5,), pool[[1]].double())
    got = run(tensors, (5,), [1], [2], pool)
    assert got.dtype == torch.float16
    assert error(got, wanted) < 2.0**-11 * 2  # two tokens rounded to 11 bits, then their mixture
    assert error(pool[[2]], lasts) < 2.0**-11


def test_programs_of_some_channels_equal_those_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors, results = inputs(5, 80, 6), []
    for block in (16, 32, 128):
        monkeypatch.setattr(kernels, "choose_block", lambda tokens, channels, b=block: b)
        pool = draw(3, 80, seed=3)
        results.append((run(tensors, (2, 3), [1, 2], [1, 2], pool), pool))
    for out, pool in results[1:]:
        assert torch.equal(out, results[0][0])
        assert torch.equal(pool, results[0][1])


def test_one_value_in_all_channels_is_normalised_to_the_bias() -> None:
    x, weight, bias, mu = inputs(2, 32, 1)
    x.fill_(1000.0)
    pool = bias.repeat(2, 1).float()
    got = run([t.float() for t in (x, weight, bias, mu)], (2,), [0], [1], pool)
    assert torch.allclose(got[0].double(), bias, atol=1e-6)


def test_slots_may_lie_beyond_two_to_the_31_elements() -> None:
    """4 GiB are asked for, but memory only comes with the pages that are touched."""
    memory = torch.empty(2**31 + 16, dtype=torch.float16)
    pool = memory.as_strided((3, 16), (2**30, 1))
    pool[0], pool[2] = 0, draw(16, seed=3).half()
    tensors = inputs(3, 16, 1)
    wanted, lasts = expected(*tensors, (3,), pool[[2]].double())
    got = run([t.float() for t in tensors], (3,), [2], [2], pool)
    assert error(got, wanted) < 2.0**-10
    assert error(pool[[2]], lasts) < 2.0**-10


def test_few_tokens_are_split_until_the_gpu_is_busy_and_many_are_not() -> None:
    assert kernels.choose_block(1, 4096) == kernels.choose_block(1, 768) == 256
    assert kernels.choose_block(4096, 4096) == 4096
    assert kernels.choose_block(4096, 2560) == 4096
