"""The sampler against a dense numpy oracle of rapid-sampling's order, and against statistics."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.kernels.philox import philox4x32, uniform
from engine.penalties import Penalties
from engine.plan import BAD_TOKEN
from engine.sampler import CANDIDATES, Draws, Sampler, draw, limit
from engine.types import SamplingParams
from tests.engine.drawing import PATHS, draws_by

CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=PATHS, autouse=True)
def path(request: pytest.FixtureRequest) -> Iterator[None]:
    yield from draws_by(request.param, request.module)


def test_philox_gives_the_published_known_answers() -> None:
    ones = 0xFFFFFFFF
    assert philox4x32((0, 0, 0, 0), (0, 0)) == (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)
    assert philox4x32((ones,) * 4, (ones,) * 2) == (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)
    counter, key = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0)
    assert philox4x32(counter, key) == (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)


def test_uniforms_of_neighbouring_seeds_and_positions_are_flat_and_distinct() -> None:
    grid = np.array([[uniform(seed, p) for p in range(100)] for seed in range(100)])
    assert ((grid >= 0) & (grid < 1)).all()
    assert np.unique(grid).size > 9990
    counts, _ = np.histogram(grid, bins=20)
    assert abs(counts - 500).max() < 110  # five standard deviations
    assert uniform(2**64 - 1, 2**40) != uniform(2**64 - 1, 2**40 + 1)


def oracle_weights(logits: np.ndarray, penalties: np.ndarray, p: SamplingParams) -> np.ndarray:
    """Rapid-sampling by its definition, one row, float64."""
    x = (logits.astype(np.float64) - penalties) / p.temperature
    probs = np.exp(x - x.max())
    probs /= probs.sum()
    top_k = p.top_k if 0 < p.top_k < len(probs) else len(probs)
    threshold = 0.0
    for t in np.unique(probs)[::-1]:  # the largest t that satisfies one of both
        threshold = t
        if (probs >= t).sum() >= top_k or probs[probs >= t].sum() >= p.top_p:
            break
    above, equal = probs > threshold, probs == threshold
    share = (top_k - above.sum()) / equal.sum()
    if p.top_p < 1.0:
        share = min(share, (p.top_p - probs[above].sum()) / (threshold * equal.sum()))
    return np.where(above, probs, np.where(equal, threshold * np.clip(share, 0, 1), 0.0))


def oracle_pick(weights: np.ndarray, u: float) -> int:
    return int(np.searchsorted(np.cumsum(weights), u * weights.sum(), side="right"))


sampling = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.1, 0.5, 1.0, 1.7, 30.0]),
    top_k=st.sampled_from([0, 1, 2, 5, 17, 1000]),
    top_p=st.sampled_from([1.0, 0.999, 0.9, 0.5, 0.3, 0.01]),
    presence_penalty=st.sampled_from([0.0, 0.5, -0.3, 2.0]),
    repetition_penalty=st.sampled_from([0.0, 0.5, -0.1, 1.0]),
    penalty_decay=st.sampled_from([1.0, 0.996, 0.5, 0.0]),
    seed=st.integers(0, 2**64 - 1),
)


@given(
    params=st.lists(sampling, min_size=1, max_size=4),
    seed=st.integers(0, 2**31),
    levels=st.sampled_from([3, 10, 10_000]),
)
def test_every_draw_matches_the_dense_oracle(
    params: list[SamplingParams], seed: int, levels: int
) -> None:
    """A whole generation per row, with ties (few levels), penalties that decay, and batches."""
    rng = np.random.default_rng(seed)
    vocab_size, num_rows = 40, len(params)
    sampler = Sampler(num_rows, banned_ids=(), device=CPU)
    penalties = np.zeros((num_rows, vocab_size), dtype=np.float32)
    for seat, p in enumerate(params):
        sampler.start(seat, p)
    for position in range(1, 9):
        logits = rng.integers(0, levels, (num_rows, vocab_size)).astype(np.float32) * (6 / levels)
        tokens = sampler.sample(
            torch.from_numpy(logits.copy()), range(num_rows), [position] * num_rows
        ).tokens
        for row, (token, p) in enumerate(zip(tokens, params, strict=True)):
            if p.is_greedy:
                assert token == (logits[row] - penalties[row]).argmax()
            else:
                weights = oracle_weights(logits[row], penalties[row], p)
                u = uniform(p.seed, position)
                if token != oracle_pick(weights, u):  # float32 at a border of the cumulative mass
                    cdf = np.cumsum(weights) / weights.sum()
                    assert np.abs(cdf - u).min() < 1e-5
                    assert weights[token] > 0 or abs(weights.sum() - p.top_p) < 1e-5
            fresh = penalties[row, token] * np.float32(p.penalty_decay) == 0
            penalties[row] *= np.float32(p.penalty_decay)
            penalties[row, token] += p.presence_penalty if fresh else p.repetition_penalty


def test_kept_mass_is_exactly_top_p_and_kept_count_exactly_top_k() -> None:
    probs = torch.tensor([[0.4, 0.3, 0.2, 0.1], [0.25, 0.25, 0.25, 0.25], [0.4, 0.2, 0.2, 0.2]])
    params = [SamplingParams(top_p=0.6), SamplingParams(top_k=3), SamplingParams(top_k=2)]
    expected = torch.tensor(
        [[0.4, 0.2, 0, 0], [0.1875, 0.1875, 0.1875, 0.1875], [0.4, 0.2 / 3, 0.2 / 3, 0.2 / 3]]
    )
    assert torch.allclose(limit(probs, params), expected)


def test_a_nucleus_wider_than_the_candidates_is_still_exact() -> None:
    vocab_size = CANDIDATES * 8
    probs = torch.softmax(torch.randn(1, vocab_size, generator=torch.manual_seed(0)) * 0.1, -1)
    params = SamplingParams(top_p=0.9)
    kept = limit(probs, [params])
    assert abs(float(kept.sum()) - 0.9) < 1e-5
    assert (kept > 0).sum() > CANDIDATES


def test_frequencies_follow_the_limited_distribution() -> None:
    logits = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0])
    p = SamplingParams(temperature=0.8, top_p=0.9)
    weights = oracle_weights(logits.numpy(), np.zeros(5), p)
    num_draws = 20_000
    rows = logits.repeat(num_draws, 1)
    picks = draw(rows, [p] * num_draws, [uniform(5, i) for i in range(num_draws)])
    frequencies = np.bincount(picks, minlength=5) / num_draws
    assert np.abs(frequencies - weights / weights.sum()).max() < 0.015
    assert frequencies[weights == 0].sum() == 0


def test_a_draw_depends_on_neither_seat_nor_batch_nor_neighbours() -> None:
    logits = torch.randn(6, 300, generator=torch.manual_seed(1))
    params = [SamplingParams(seed=s, top_p=0.95, presence_penalty=0.3) for s in range(6)]
    alone = []
    for i, p in enumerate(params):
        sampler = Sampler(1, (), CPU)
        sampler.start(0, p)
        alone += sampler.sample(logits[i : i + 1].clone(), [0], [i + 3]).tokens
    together = Sampler(8, (), CPU)
    seats = [7, 2, 5, 0, 1, 3]
    for seat, p in zip(seats, params, strict=True):
        together.start(seat, p)
    assert together.sample(logits.clone(), seats, [i + 3 for i in range(6)]).tokens == tuple(alone)


def test_banned_ids_are_never_drawn_even_when_they_lead() -> None:
    sampler = Sampler(2, banned_ids=(3,), device=CPU)
    sampler.start(0, SamplingParams(temperature=0.0))
    sampler.start(1, SamplingParams(seed=1, banned_token_ids=(2,)))
    logits = torch.tensor([[0.0, 1.0, 2.0, 99.0]] * 2)
    for position in range(50):
        tokens = sampler.sample(logits.clone(), [0, 1], [position] * 2).tokens
        assert tokens[0] == 2
        assert tokens[1] in (0, 1)


def test_a_new_request_in_a_seat_inherits_no_penalties() -> None:
    sampler = Sampler(1, (), CPU)
    params = SamplingParams(temperature=0.0, presence_penalty=5.0)
    logits = torch.tensor([[1.0, 0.0]])
    sampler.start(0, params)
    assert sampler.sample(logits.clone(), [0], [1]).tokens == (0,)
    assert sampler.sample(logits.clone(), [0], [2]).tokens == (1,)
    sampler.start(0, params)
    assert sampler.sample(logits.clone(), [0], [1]).tokens == (0,)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_logits_that_are_not_finite_flag_their_row_only(value: float) -> None:
    sampler = Sampler(3, (), CPU)
    for seat in range(3):
        sampler.start(seat, SamplingParams(temperature=0.0 if seat else 1.0))
    logits = torch.tensor([[1.0, 5.0]] * 3)
    logits[1, 0] = value
    tokens = sampler.sample(logits, [0, 1, 2], [1, 1, 1]).tokens
    assert tokens[1] == BAD_TOKEN
    assert tokens[2] == 1


@pytest.mark.parametrize("decay", [1.0, 0.996, 0.5, 0.0])
@pytest.mark.parametrize("temperature", [0.0, 1.2])
def test_a_seat_that_is_told_its_past_equals_one_that_drew_it(
    decay: float, temperature: float
) -> None:
    params = SamplingParams(
        temperature=temperature, seed=3, top_p=0.9,
        presence_penalty=0.3, repetition_penalty=0.1, penalty_decay=decay,
    )  # fmt: skip
    logits = torch.randn(120, 1, 50, generator=torch.manual_seed(2))
    stayed, out = Sampler(1, (), CPU), list[int]()
    stayed.start(0, params)
    for position in range(80):
        out += stayed.sample(logits[position].clone(), [0], [position]).tokens
    assert len(set(out)) < len(out)
    back = Sampler(3, (), CPU)
    back.start(2, params, output_ids=out)
    for position in range(80, 120):
        left, right = logits[position].clone(), logits[position].clone()
        assert stayed.sample(left, [0], [position]) == back.sample(right, [2], [position])
        assert torch.equal(left, right)  # what was drawn from, penalties subtracted


def test_penalties_of_a_past_are_those_of_a_dense_vector_to_the_bit() -> None:
    params = SamplingParams(presence_penalty=0.37, repetition_penalty=0.11, penalty_decay=0.993)
    past = np.random.default_rng(4).integers(0, 400, 3000).tolist()
    dense = np.zeros(500, dtype=np.float32)
    for token in past:
        dense *= np.float32(0.993)
        dense[token] += np.float32(0.37 if dense[token] == 0 else 0.11)
    penalties = Penalties(params)
    penalties.update(past)
    logits = torch.zeros(500)
    penalties.apply(logits)
    assert np.array_equal(-logits.numpy(), dense)


def test_a_past_of_ten_thousand_tokens_takes_milliseconds() -> None:
    params = SamplingParams(presence_penalty=0.5, repetition_penalty=0.1, penalty_decay=0.996)
    past = np.random.default_rng(5).integers(0, 65536, 10_000).tolist()
    times = []
    for _ in range(3):
        begun = time.process_time()
        Sampler(1, (), CPU).start(0, params, past)
        times.append(time.process_time() - begun)
    assert min(times) < 0.15  # some 0.02 on an idle machine


@given(params=st.lists(sampling, min_size=1, max_size=5), seed=st.integers(0, 2**31))
def test_logprobs_are_those_of_the_logits_before_anything_was_done_to_them(
    params: list[SamplingParams], seed: int
) -> None:
    rng = np.random.default_rng(seed)
    asking = [bool(rng.integers(0, 2)) for _ in params]
    sampler = Sampler(len(params), banned_ids=(0, 3), device=CPU)
    for seat, (p, asks) in enumerate(zip(params, asking, strict=True)):
        sampler.start(seat, replace(p, has_logprobs=asks, banned_token_ids=(5,)))
    silent = Sampler(len(params), banned_ids=(0, 3), device=CPU)
    for seat, p in enumerate(params):
        silent.start(seat, replace(p, banned_token_ids=(5,)))
    seats = range(len(params))
    for position in range(4):
        logits = rng.normal(0, 8, (len(params), 60)).astype(np.float32)
        positions = [position] * len(params)
        draws = sampler.sample(torch.from_numpy(logits.copy()), seats, positions)
        unasked = silent.sample(torch.from_numpy(logits.copy()), seats, positions)
        assert unasked == Draws(draws.tokens)  # asking changes no draw
        if not any(asking):
            assert draws.logprobs == ()
            continue
        x = logits.astype(np.float64)
        expected = x - np.log(np.exp(x).sum(-1, keepdims=True))
        for row, logprob in enumerate(draws.logprobs):
            if asking[row]:
                assert abs(logprob - expected[row, draws.tokens[row]]) < 1e-5
            else:
                assert np.isnan(logprob)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_bad_row_has_no_logprob_and_spoils_no_other(value: float) -> None:
    sampler = Sampler(2, (), CPU)
    for seat in range(2):
        sampler.start(seat, SamplingParams(temperature=0.0, has_logprobs=True))
    logits = torch.zeros(2, 4)
    logits[0, 2] = value
    draws = sampler.sample(logits, [0, 1], [1, 1])
    assert draws.tokens == (BAD_TOKEN, 0)
    assert np.isnan(draws.logprobs[0])
    assert abs(draws.logprobs[1] - np.log(0.25)) < 1e-6
