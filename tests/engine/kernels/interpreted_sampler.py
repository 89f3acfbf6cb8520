"""The device's sampler against float64. `test_triton` runs this file interpreted."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from engine.device_sampler import DeviceSampler
from engine.kernels.gpu import sampler as launches
from engine.kernels.gpu.sampler import SeatArrays, draw
from engine.kernels.philox import uniform
from engine.plan import BAD_TOKEN, NO_TOKEN
from engine.types import SamplingParams
from tests.engine.test_constraints import oracle_logits, oracle_weights

CPU = torch.device("cpu")
TOLERANCE = 1e-5  # of mass: sums of float32, and e^x of the GPU's own
PENALISED = SamplingParams(presence_penalty=0.4, repetition_penalty=0.15, penalty_decay=0.9)


def assert_is_pick(logits: np.ndarray, p: SamplingParams, token: int, position: int) -> None:
    """The inverse cumulative mass at the uniform, wherever rounding cannot decide otherwise."""
    x = oracle_logits(logits, p, ())
    if p.is_greedy:
        assert token == x.argmax()
        return
    mass = np.cumsum(oracle_weights(x, p))
    mass /= mass[-1]
    u, low = uniform(p.seed, position), mass[token - 1] if token else 0.0
    assert low - TOLERANCE <= u <= mass[token] + TOLERANCE, (u, low, mass[token], p)


def drawn(
    params: Sequence[SamplingParams], logits: Tensor, positions: Sequence[int], **options: int
) -> tuple[list[int], list[float]]:
    sampler = DeviceSampler(len(params), logits.shape[-1], CPU, ())
    for seat, p in enumerate(params):
        sampler.start(seat, p)
    seats = torch.arange(len(params))
    tokens, logprobs = draw(logits, seats, torch.tensor(positions), sampler.arrays, **options)
    return tokens.tolist(), logprobs.tolist()


LIMITS = [
    {"temperature": 0.0}, {}, {"top_k": 1}, {"top_k": 5}, {"top_k": 1000}, {"top_p": 1e-42},
    {"top_p": 0.3}, {"top_p": 0.9}, {"top_p": 0.9999}, {"top_p": 0.8, "top_k": 7},
    {"min_p": 0.2}, {"min_p": 1.0}, {"min_p": 0.05, "top_p": 0.7}, {"top_p": 0.0},
    {"logit_bias": ((3, 4.0), (9, -100.0)), "top_p": 0.9}, {"banned_token_ids": (1, 2)},
    {"allowed_token_ids": (4, 30, 31, 32), "top_k": 2}, {"min_tokens": 1, "stop_token_ids": (5,)},
]  # fmt: skip


@pytest.mark.parametrize("levels", [3, 10**6], ids=["ties", "none equal"])
@pytest.mark.parametrize("vocab_size", [40, 300])  # 300 are three tiles, the last of them part
def test_draws_are_those_of_float64(vocab_size: int, levels: int) -> None:
    rng = np.random.default_rng(vocab_size + levels)
    temperatures = rng.choice([0.1, 0.7, 1.0, 30.0], len(LIMITS))
    params = [
        SamplingParams(**{"temperature": t, "seed": int(rng.integers(2**64, dtype=np.uint64))} | p)
        for t, p in zip(temperatures, LIMITS, strict=True)
    ]
    positions = [int(p) for p in rng.integers(0, 2**40, len(params))]
    logits = rng.integers(0, levels, (len(params), vocab_size)).astype(np.float32) * (9 / levels)
    tokens, logprobs = drawn(params, torch.from_numpy(logits), positions, tile=128)
    x = logits.astype(np.float64)
    expected = x - np.log(np.exp(x).sum(-1, keepdims=True))
    for row, (p, token) in enumerate(zip(params, tokens, strict=True)):
        assert_is_pick(logits[row], p, token, positions[row])
        assert abs(logprobs[row] - expected[row, token]) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_whole_vocabulary_of_half_types(dtype: torch.dtype) -> None:
    logits = (torch.randn(1, 65536, generator=torch.manual_seed(3)) * 3).to(dtype)
    params = SamplingParams(seed=8, top_p=0.6, top_k=4000)
    (token,), (logprob,) = drawn([params], logits, [17])
    assert_is_pick(logits[0].double().numpy(), params, token, 17)
    assert abs(logprob - logits.double().log_softmax(-1)[0, token]) < 1e-5


def test_nothing_depends_on_the_tile() -> None:
    logits = torch.randn(2, 500, generator=torch.manual_seed(1))
    params = [SamplingParams(seed=s, top_p=0.9, min_p=0.01) for s in range(2)]
    results = [drawn(params, logits, [5, 6], tile=tile) for tile in (128, 512)]
    assert results[0][0] == results[1][0]
    assert np.allclose(results[0][1], results[1][1], atol=1e-6)


def test_padding_is_not_read_and_changes_nothing() -> None:
    sampler = DeviceSampler(2, 40, CPU, ())
    for seat in range(2):
        sampler.start(seat, PENALISED)
    logits = torch.randn(4, 40, generator=torch.manual_seed(1))
    alone = DeviceSampler(2, 40, CPU, ())
    alone.start(1, PENALISED)
    positions = torch.full((4,), 3)
    expected, _ = alone.draw(logits[2:3].clone(), torch.tensor([1]), positions[:1])
    logits[[0, 1, 3]] = torch.nan
    tokens, _ = sampler.draw(logits, torch.tensor([-1, -1, 1, -1]), positions)
    assert tokens[2] == expected[0]
    assert sampler.arrays.num_drawn.tolist() == [0, 1]
    assert not sampler.arrays.penalties[0].any()


@pytest.mark.filterwarnings("ignore:invalid value encountered")  # numpy's, of the interpreter
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("column", [0, 150, slice(None)])
def test_a_row_that_is_not_finite_draws_nothing(value: float, column: int | slice) -> None:
    sampler = DeviceSampler(2, 200, CPU, (3,))
    for seat in range(2):
        sampler.start(seat, replace(PENALISED, seed=seat, temperature=float(seat)))
    logits = torch.zeros(2, 200)
    logits[1, column] = value
    before = sampler.arrays.penalties.clone()
    seats, positions = torch.tensor([0, 1]), torch.tensor([1, 1])
    tokens, logprobs = draw(logits, seats, positions, sampler.arrays, tile=128)
    assert tokens.tolist() == [0, BAD_TOKEN]
    assert abs(logprobs[0] + math.log(200)) < 1e-5
    assert logprobs[1].isnan()
    assert torch.equal(sampler.arrays.penalties[1], before[1])
    assert sampler.arrays.num_drawn.tolist() == [1, 0]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_no_token_where_everything_is_forbidden(temperature: float) -> None:
    sampler = DeviceSampler(2, 40, CPU, (3,))
    params = SamplingParams(temperature=temperature, allowed_token_ids=(3, 7))
    sampler.start(0, params)
    sampler.start(1, replace(params, banned_token_ids=(7,)))
    logits, pair = torch.zeros(2, 40), torch.tensor([0, 1])
    assert sampler.draw(logits, pair, pair)[0].tolist() == [7, NO_TOKEN]
    masks = sampler.masks([bytes(5), None])
    assert sampler.draw(logits, pair, pair, masks)[0].tolist() == [NO_TOKEN, NO_TOKEN]


def test_masks_allow_what_their_bits_say() -> None:
    sampler = DeviceSampler(3, 70, CPU, ())
    for seat in range(3):
        sampler.start(seat, SamplingParams(temperature=0.0))
    bits = np.zeros((2, 72), dtype=bool)
    bits[0, [5, 33]] = bits[1, [66, 71]] = True  # 71 is no token
    packed = [row.tobytes() for row in np.packbits(bits, axis=-1, bitorder="little")]
    logits, three = torch.arange(210.0).view(3, 70), torch.arange(3)
    tokens, _ = sampler.draw(logits, three, three, sampler.masks([packed[0], packed[1], None]))
    assert tokens.tolist() == [33, 66, 69]


class _NoKernel:
    def __getitem__(self, grid: object) -> _NoKernel:
        return self

    def __call__(self, *args: object, **options: object) -> None: ...


def test_draw_reads_nothing_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors of the meta device have no values to be read: what a CUDA graph needs."""
    for name in ("adjust_kernel", "weigh_kernel", "pick_kernel"):
        monkeypatch.setattr(launches, name, _NoKernel())
    sampler = DeviceSampler(4, 300, torch.device("meta"), ())
    rows = torch.empty(3, dtype=torch.int64, device="meta")
    masks = torch.empty(3, 10, dtype=torch.int32, device="meta")
    tokens, logprobs = sampler.draw(torch.empty(3, 300, device="meta"), rows, rows, masks)
    assert (tokens.device.type, tokens.shape, logprobs.shape) == ("meta", (3,), (3,))


@pytest.mark.parametrize("params", [PENALISED, SamplingParams(logit_bias=((9, 30.0),))])
def test_seats_may_lie_beyond_two_to_the_31_elements(params: SamplingParams) -> None:
    """8 GiB are asked for, but memory only comes with the few pages that are touched."""
    seat, vocab_size = 2**24, 128
    small, few = DeviceSampler(1, vocab_size, CPU, ()), torch.empty(0)
    small.start(0, params, (1, 1, 2))
    rows = torch.empty(seat + 1, vocab_size)
    rows[seat] = (small.arrays.penalties if params.has_penalties else small.arrays.biases)[0]
    arrays = SeatArrays(
        floats=torch.empty(seat + 1, 6),
        integers=torch.empty(seat + 1, 4, dtype=torch.int64),
        allowed=torch.empty(2, seat + 1, 4, dtype=torch.int32),
        biases=few if params.has_penalties else rows,
        penalties=rows,
        scales=torch.empty(seat + 1),
        num_drawn=torch.empty(seat + 1, dtype=torch.int64),
    )
    for name in ("floats", "integers", "scales", "num_drawn"):
        getattr(arrays, name)[seat] = getattr(small.arrays, name)[0]
    arrays.allowed[:, seat] = small.arrays.allowed[:, 0]
    logits, position = torch.randn(1, vocab_size, generator=torch.manual_seed(6)), torch.tensor([2])
    expected, _ = small.draw(logits, torch.tensor([0]), position)
    got, _ = draw(logits, torch.tensor([seat]), position, arrays)
    assert torch.equal(got, expected)
    if params.has_penalties:
        assert torch.equal(rows[seat], small.arrays.penalties[0])
