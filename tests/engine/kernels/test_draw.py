"""Draws of the CPU's kernel against the specification in float64, and against each other."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("numba", reason="the kernel is numba's")

from engine.host_sampler import HostSampler
from engine.kernels.cpu import draw as kernel
from engine.kernels.philox import uniform
from engine.masks import Masks
from engine.plan import BAD_TOKEN, NO_TOKEN
from engine.sampler import Sampler, choose_host_sampler, limit
from engine.types import SamplingParams

CPU = torch.device("cpu")
BORDER = 1e-6  # of a cumulative mass: nearer to one, rounding may decide
MAX_SEATS = 64

sampling = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 1e-3, 0.1, 0.7, 1.0, 1.7, 30.0]),
    top_k=st.one_of(st.sampled_from([0, 1, 2, 50, 10_000]), st.integers(0, 400)),
    top_p=st.sampled_from([1.0, 0.999, 0.9, 0.5, 0.1, 1e-6]),
    min_p=st.sampled_from([0.0, 0.0, 0.013, 0.37, 1.0]),
    presence_penalty=st.sampled_from([0.0, 0.0, 0.4, -0.7]),
    repetition_penalty=st.sampled_from([0.0, 0.0, 0.9]),
    penalty_decay=st.sampled_from([1.0, 0.9]),
    seed=st.integers(0, 2**64 - 1),
    banned_token_ids=st.sampled_from([(), (), (0,), (3, 5, 64)]),
    logit_bias=st.sampled_from([(), (), ((2, 3.5), (7, -2.0))]),
)


@pytest.fixture(scope="module")
def host() -> HostSampler:
    return HostSampler(MAX_SEATS, ())


def draw_one(host: HostSampler, logits_V: np.ndarray, params: SamplingParams, position: int) -> int:
    host.start(0, params)
    rows = torch.from_numpy(logits_V.copy())[None]
    options = {"masks": [None], "penalties": [None], "is_sound": [None]}
    return host.draw(rows, [0], [position], **options)[0]


def exact_edges(changed_V: Tensor, params: SamplingParams) -> np.ndarray:
    """Cumulative mass after each token by the specification in float64, of 1."""
    x = (changed_V.double() - changed_V.double().max()) / params.temperature
    if params.min_p > 0:
        x = x.masked_fill(x < np.log(params.min_p), -torch.inf)
    weights = x.softmax(-1)
    if params.top_k > 0 or params.top_p < 1.0:
        weights = exact_limit(weights.numpy(), params)
    edges: np.ndarray = np.cumsum(np.asarray(weights))
    return edges / edges[-1]


def exact_limit(probs: np.ndarray, params: SamplingParams) -> np.ndarray:
    top_k = params.top_k if 0 < params.top_k < len(probs) else len(probs)
    ordered = -np.sort(-probs)
    reached = (np.arange(1, len(probs) + 1) >= top_k) | (np.cumsum(ordered) >= params.top_p)
    threshold = ordered[reached.argmax() if reached.any() else -1]
    above, equal = probs > threshold, probs == threshold
    share = (top_k - above.sum()) / equal.sum()
    if params.top_p < 1.0 and threshold > 0:
        share = min(share, (params.top_p - probs[above].sum()) / (threshold * equal.sum()))
    return np.where(above, probs, np.where(equal, threshold * np.clip(share, 0, 1), 0.0))


def check(token: int, changed_V: Tensor, params: SamplingParams, position: int) -> None:
    """Drawn as the specification would; anything goes only where a border is too near to tell."""
    if bool((changed_V == -torch.inf).all()):
        assert token == NO_TOKEN
        return
    if params.is_greedy:
        assert token == int(changed_V.argmax())
        return
    edges, u = exact_edges(changed_V, params), uniform(params.seed, position)
    if np.abs(edges - u).min() > BORDER and u > BORDER:
        assert token == int(np.searchsorted(edges, u, side="right"))
    else:
        assert changed_V[token] > -torch.inf


@settings(max_examples=150)
@given(
    params=st.lists(sampling, min_size=1, max_size=4),
    seed=st.integers(0, 2**31),
    size=st.sampled_from([1, 7, 63, 64, 65, 300, 1000]),
    levels=st.sampled_from([2, 10, 10_000_000]),
    spread=st.sampled_from([1e-3, 1.0, 12.0, 1e4, 1e30]),
    share_allowed=st.sampled_from([None, 0.0, 0.01, 0.5, 1.0]),
)
def test_every_draw_is_that_of_the_specification_in_float64(
    host: HostSampler,
    params: list[SamplingParams],
    seed: int,
    size: int,
    levels: int,
    spread: float,
    share_allowed: float | None,
) -> None:
    """Ties, huge and tiny ranges, penalties that decay, bans, biases and masks, in batches."""
    rng = np.random.default_rng(seed)
    banned = tuple(i for i in (1, 33) if i < size - 1)
    params = [within(p, size) for p in params]
    num_rows = len(params)
    sampler = Sampler(num_rows, banned, CPU, on_host=HostSampler(num_rows, banned))
    matchers = [Mask(rng, size, share_allowed if i % 2 == 0 else None) for i in range(num_rows)]
    for seat, p in enumerate(params):
        sampler.start(seat, p)
        sampler._seats[seat].matcher = matchers[seat]  # type: ignore[union-attr, assignment]
    for position in range(3):
        logits = rng.integers(-levels, levels + 1, (num_rows, size)) * (spread / levels)
        rows = torch.from_numpy(logits.astype(np.float32))
        changed = [
            specified(rows[i].clone(), i, sampler, matchers[i], banned) for i in range(num_rows)
        ]
        tokens = sampler.sample(rows, range(num_rows), [position] * num_rows).tokens
        for token, changed_V, p in zip(tokens, changed, params, strict=True):
            check(token, changed_V, p, position)


class Mask:
    """What a matcher of a grammar tells, at random."""

    def __init__(self, rng: np.random.Generator, size: int, share: float | None) -> None:
        self._rng, self._size, self._share = rng, size, share
        self._next()

    def _next(self) -> None:
        self._mask: bytes | None = None
        if self._share is not None:
            bits = self._rng.random(self._size) < self._share
            self._mask = np.packbits(bits, bitorder="little").tobytes()

    def allowed(self) -> bytes | None:
        return self._mask

    def update(self, tokens: tuple[int, ...]) -> None:
        self._next()


def within(params: SamplingParams, size: int) -> SamplingParams:
    """Without the tokens that a small vocabulary has not."""
    return replace(
        params,
        banned_token_ids=tuple(i for i in params.banned_token_ids if i < size),
        logit_bias=tuple(pair for pair in params.logit_bias if pair[0] < size),
    )


def specified(
    logits_V: Tensor, seat: int, sampler: Sampler, matcher: Mask, banned: tuple[int, ...]
) -> Tensor:
    """The logits that a seat draws from."""
    row = sampler._seats[seat]
    assert row is not None
    Masks(CPU).apply(logits_V[None], [matcher.allowed()])
    logits_V[list(banned)] = -torch.inf
    if row.constraints is not None:
        row.constraints.apply(logits_V)
    if row.penalties is not None:
        row.penalties.apply(logits_V)
    return logits_V


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(),
        SamplingParams(top_p=0.5),
        SamplingParams(top_p=0.999, temperature=2.0),
        SamplingParams(top_k=50),
        SamplingParams(top_k=40_000),
        SamplingParams(top_k=2000, top_p=0.9, min_p=0.001),
        SamplingParams(temperature=1e-3, top_p=0.9),
    ],
)
def test_a_whole_vocabulary_is_drawn_from_as_specified(
    host: HostSampler, params: SamplingParams
) -> None:
    for seed, scale in ((0, 0.01), (1, 1.0), (2, 4.0), (3, 40.0)):
        logits = scale * torch.randn(65_536, generator=torch.manual_seed(seed))
        for position in range(4):
            asked = replace(params, seed=seed)
            token = draw_one(host, logits.numpy(), asked, position)
            check(token, logits, asked, position)


def test_frequencies_are_those_of_the_distribution(host: HostSampler) -> None:
    logits = np.array([2.0, 1.0, 1.0, 0.5, 0.0, -1.0, -9.0], np.float32)
    params = SamplingParams(temperature=0.8, top_p=0.9)
    probs = torch.tensor(logits / 0.8).softmax(-1)
    expected = limit(probs[None], [params])[0].double().numpy()
    expected /= expected.sum()
    num_draws, seats = 20_000, 50
    for seat in range(seats):
        host.start(seat, replace(params, seed=seat))
    counts = np.zeros(len(logits))
    for position in range(num_draws // seats):
        rows = torch.from_numpy(np.repeat(logits[None], seats, 0))
        nothing = [None] * seats
        tokens = host.draw(
            rows, range(seats), [position] * seats,
            masks=nothing, penalties=nothing, is_sound=nothing,
        )  # fmt: skip
        counts += np.bincount(tokens, minlength=len(logits))
    kept = expected > 0
    assert counts[~kept].sum() == 0
    chi_square = ((counts - num_draws * expected)[kept] ** 2 / (num_draws * expected[kept])).sum()
    assert chi_square < 30  # six kept at most: one in 100,000


def test_a_row_draws_the_same_alone_and_among_others(host: HostSampler) -> None:
    logits = 3 * torch.randn(48, 1003, generator=torch.manual_seed(4))
    params = [
        SamplingParams(seed=s, top_p=(1.0, 0.8, 0.3)[s % 3], top_k=(0, 40)[s % 2], min_p=0.001)
        for s in range(48)
    ]
    for seat, p in enumerate(params):
        host.start(seat, p)
    nothing = [None] * 48
    together = logits.clone()
    seats, positions = list(range(48)), [s + 7 for s in range(48)]
    options = {"masks": nothing, "penalties": nothing, "is_sound": nothing}
    tokens = host.draw(together, seats, positions, **options)
    assert tokens == [draw_one(host, logits[s].numpy(), params[s], s + 7) for s in seats]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [0, 63, 64, 130, 299])
def test_a_row_that_is_not_finite_is_told(host: HostSampler, value: float, place: int) -> None:
    logits = np.zeros(300, np.float32)
    assert draw_one(host, logits, SamplingParams(temperature=0.0), 0) == 0
    logits[place] = value
    for temperature in (0.0, 1.0):
        assert draw_one(host, logits, SamplingParams(temperature=temperature), 0) == BAD_TOKEN


def test_a_constrained_row_that_was_not_finite_is_told_even_where_that_is_forbidden() -> None:
    sampler = Sampler(2, (1,), CPU, on_host=HostSampler(2, (1,)))
    for seat in range(2):
        sampler.start(seat, SamplingParams(temperature=0.0, banned_token_ids=(2,)))
    logits = torch.tensor([[0.0, 1.0, torch.nan, 3.0], [0.0, 9.0, 8.0, 3.0]])
    assert sampler.sample(logits, [0, 1], [0, 0]).tokens == (BAD_TOKEN, 3)


def test_zeros_of_both_signs_are_equal(host: HostSampler) -> None:
    logits = np.array([-1.0, -0.0, 0.0, -0.0], np.float32)
    assert draw_one(host, logits, SamplingParams(temperature=0.0), 0) == 1
    drawn = {draw_one(host, logits, SamplingParams(top_k=2), position) for position in range(60)}
    assert drawn == {1, 2, 3}


@given(seed=st.integers(0, 2**64 - 1), position=st.integers(0, 2**40))
def test_uniforms_are_those_of_philox(seed: int, position: int) -> None:
    assert kernel.uniform(np.uint64(seed), position) == uniform(seed, position)


def test_float64_and_other_devices_are_left_to_the_specification(host: HostSampler) -> None:
    logits = torch.zeros(2, 4)
    assert host.can_draw(logits)
    assert not host.can_draw(logits.double())
    assert not host.can_draw(logits.to("meta"))
    assert choose_host_sampler(1, torch.device("meta"), ()) is None
    assert choose_host_sampler(1, CPU, ()) is not None


@pytest.mark.parametrize("num_rows", [1, 7, 8, 13])
def test_draws_do_not_depend_on_how_many_threads_share_them(num_rows: int) -> None:
    """Each row has logits, a mask and penalties of its own: a mix-up is another token."""
    rng = np.random.default_rng(num_rows)
    size, seats = 1000, list(range(num_rows))[::-1]
    logits = rng.normal(0, 4, (num_rows, size)).astype(np.float32)
    masks = [
        rng.integers(0, 256, size // 8, np.uint8).tobytes() if i % 3 == 1 else None
        for i in range(num_rows)
    ]
    penalties = [
        (np.array([i, 50 + i]), np.array([3.0, -5.0], np.float32)) if i % 3 == 2 else None
        for i in range(num_rows)
    ]

    def drawn(num_threads: int) -> tuple[list[int], np.ndarray]:
        host = HostSampler(num_rows, (0,), num_threads)
        for seat in seats:
            top_p = (1.0, 0.9, 0.3)[seat % 3]
            host.start(seat, SamplingParams(temperature=seat % 4 / 2, top_p=top_p, seed=seat))
        rows = torch.from_numpy(logits.copy())
        options = {"masks": masks, "penalties": penalties, "is_sound": [None] * num_rows}
        return host.draw(rows, seats, range(num_rows), **options), rows.numpy()

    tokens, rows = drawn(1)
    for num_threads in (2, 3, 8):
        others = drawn(num_threads)
        assert others[0] == tokens
        assert np.array_equal(others[1], rows)
