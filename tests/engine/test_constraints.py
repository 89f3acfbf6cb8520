"""What a request forbids or favours, against a dense float64 oracle and against brute force."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.constraints import BadWords, Constraints
from engine.kernels.philox import uniform
from engine.plan import NO_TOKEN
from engine.sampler import Sampler
from engine.tokenizer import Tokenizer
from engine.types import SamplingParams
from tests.engine.drawing import PATHS, draws_by

CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=PATHS, autouse=True)
def path(request: pytest.FixtureRequest) -> Iterator[None]:
    yield from draws_by(request.param, request.module)


PIECES = [b"a", b"b", b" ", b"ab", b"ba", b" a", b"aa", b" ab", b"abb", b"a b", b"b b", b"bab"]
SINGLE = [bytes([byte]) for byte in range(256) if bytes([byte]) not in PIECES]
# The pieces first, so that a model of few tokens is one that only knows them.
TOKENIZER = Tokenizer(dict(enumerate([*PIECES, *SINGLE], start=1)))
VOCAB_SIZE = 1 + len(PIECES)
IDS = st.integers(0, VOCAB_SIZE - 1)
WORDS = st.text(alphabet="ab ", min_size=1, max_size=6)


def spells(tokens: Sequence[int]) -> bytes:
    return b"".join(map(TOKENIZER.token_bytes, tokens))


def forbidden_by_words(words: Sequence[str], past: Sequence[int]) -> set[int]:
    """By trying every token behind every run that the past ends with."""
    texts = {word.encode() for word in words} | {b" " + word.encode() for word in words}
    past = list(past)
    document = past[len(past) - past[::-1].index(0) :] if 0 in past else past
    runs = [document[begin:] for begin in range(len(document) + 1)]
    return {
        token for token in range(1, VOCAB_SIZE) for run in runs if spells([*run, token]) in texts
    }


def oracle_logits(logits: np.ndarray, p: SamplingParams, past: Sequence[int]) -> np.ndarray:
    """Bias, penalties, and -inf for whatever may not be drawn; float64."""
    x = logits.astype(np.float64)
    for token, bias in p.logit_bias:
        x[token] += bias
    penalties = np.zeros(len(x), dtype=np.float32)
    for token in past:
        penalties *= np.float32(p.penalty_decay)
        is_first = penalties[token] == 0
        penalties[token] += np.float32(p.presence_penalty if is_first else p.repetition_penalty)
    x -= penalties
    forbidden = set(p.banned_token_ids) | forbidden_by_words(p.bad_words, past)
    if p.allowed_token_ids:
        forbidden |= set(range(len(x))) - set(p.allowed_token_ids)
    if len(past) < p.min_tokens:
        forbidden |= set(p.stop_token_ids)
    x[list(forbidden)] = -np.inf
    return x


def oracle_weights(x: np.ndarray, p: SamplingParams) -> np.ndarray:
    """Temperature, softmax, min_p, then the threshold of top-k and top-p; float64."""
    x = x / p.temperature
    probs = np.exp(x - x.max())
    probs /= probs.sum()
    probs = np.where(probs >= p.min_p * probs.max(), probs, 0.0)
    probs /= probs.sum()
    top_k = p.top_k if 0 < p.top_k < len(probs) else len(probs)
    threshold = 0.0
    for threshold in np.unique(probs)[::-1]:
        reached = probs[probs >= threshold]
        if len(reached) >= top_k or reached.sum() >= p.top_p:
            break
    above, equal = probs > threshold, probs == threshold
    share = (top_k - above.sum()) / equal.sum()
    if p.top_p < 1.0:
        share = min(share, (p.top_p - probs[above].sum()) / (threshold * equal.sum()))
    return np.where(above, probs, np.where(equal, threshold * np.clip(share, 0, 1), 0.0))


requests = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.3, 1.0, 1.7]),
    top_k=st.sampled_from([0, 0, 1, 3]),
    top_p=st.sampled_from([1.0, 0.9, 0.5]),
    min_p=st.sampled_from([0.0, 0.05, 0.3, 1.0]),
    presence_penalty=st.sampled_from([0.0, 0.5]),
    repetition_penalty=st.sampled_from([0.0, 0.3]),
    penalty_decay=st.sampled_from([1.0, 0.5]),
    seed=st.integers(0, 2**64 - 1),
    min_tokens=st.sampled_from([0, 0, 2, 5]),
    stop_token_ids=st.sets(IDS, max_size=4).map(tuple),
    logit_bias=st.dictionaries(IDS, st.sampled_from([-100.0, -1.0, 2.5, 100.0]), max_size=4).map(
        lambda biases: tuple(biases.items())
    ),
    allowed_token_ids=st.just(()) | st.sets(IDS, min_size=3).map(tuple),
    banned_token_ids=st.sets(IDS, max_size=2).map(tuple),
    bad_words=st.lists(WORDS, max_size=4).map(tuple),
)


@given(params=st.lists(requests, min_size=1, max_size=3), seed=st.integers(0, 2**31))
def test_every_draw_matches_the_dense_oracle(params: list[SamplingParams], seed: int) -> None:
    """Whole generations side by side, each of which has its own rules."""
    rng = np.random.default_rng(seed)
    sampler = Sampler(len(params), (), CPU, TOKENIZER)
    pasts = [list[int]() for _ in params]
    for seat, p in enumerate(params):
        sampler.start(seat, p)
    for position in range(12):
        logits = rng.normal(0, 2, (len(params), VOCAB_SIZE)).astype(np.float32)
        seats = [seat for seat, past in enumerate(pasts) if past[-1:] != [NO_TOKEN]]
        drawn = sampler.sample(torch.from_numpy(logits[seats]), seats, [position] * len(seats))
        for seat, token in zip(seats, drawn.tokens, strict=True):
            p, past = params[seat], pasts[seat]
            x = oracle_logits(logits[seat], p, past)
            if np.isneginf(x).all():
                assert token == NO_TOKEN
            elif p.is_greedy:
                assert x[token] >= x.max() - 1e-5
            else:
                _assert_is_pick(oracle_weights(x, p), token, uniform(p.seed, position))
            past.append(token)


def _assert_is_pick(weights: np.ndarray, token: int, u: float) -> None:
    """The inverse cumulative mass at u, but for rounding where two tokens meet."""
    mass = np.cumsum(weights) / weights.sum()
    low = 0.0 if token == 0 else mass[token - 1]
    assert low - 1e-5 <= u <= mass[token] + 1e-5


@given(
    words=st.lists(WORDS, min_size=1, max_size=4),
    past=st.lists(IDS, max_size=10),
)
def test_forbidden_are_exactly_the_tokens_that_complete_a_word(
    words: list[str], past: list[int]
) -> None:
    bad = BadWords(words, TOKENIZER)
    for token in past:
        bad.update(token)
    found = {token for token in bad.whole | bad.completing() if token < VOCAB_SIZE}
    assert found == forbidden_by_words(words, past)


def test_a_word_is_found_in_every_split_and_with_a_space_in_front() -> None:
    bad = BadWords(["abb"], TOKENIZER)
    ids = {piece: number for number, piece in enumerate(PIECES, start=1)}
    assert {ids[b"abb"]} <= bad.whole
    bad.update(ids[b" a"])
    assert bad.completing() == set()
    bad.update(ids[b"b"])
    assert ids[b"b"] in bad.completing()


def test_part_of_a_longer_token_is_no_word() -> None:
    """As the documentation says: "ba" may be drawn as part of "bab", or of "ab" + "a"."""
    bad = BadWords(["ba"], TOKENIZER)
    ids = {piece: number for number, piece in enumerate(PIECES, start=1)}
    assert ids[b"bab"] not in bad.whole
    bad.update(ids[b"ab"])
    assert bad.completing() == set()


def test_a_word_does_not_reach_over_the_end_of_a_document() -> None:
    bad = BadWords(["ab"], TOKENIZER)
    bad.update(PIECES.index(b"a") + 1)
    assert bad.completing()
    bad.update(0)
    assert not bad.completing()


@given(params=requests, seed=st.integers(0, 2**31), num_before=st.integers(0, 10))
def test_a_seat_that_is_told_its_past_equals_one_that_drew_it(
    params: SamplingParams, seed: int, num_before: int
) -> None:
    rng = np.random.default_rng(seed)
    logits = torch.from_numpy(rng.normal(0, 2, (14, 1, VOCAB_SIZE)).astype(np.float32))
    stayed, out = Sampler(1, (), CPU, TOKENIZER), list[int]()
    stayed.start(0, params)
    for position in range(num_before):
        out += stayed.sample(logits[position].clone(), [0], [position]).tokens
    if NO_TOKEN in out:
        return
    back = Sampler(2, (), CPU, TOKENIZER)
    back.start(1, params, out)
    for position in range(num_before, 14):
        left, right = logits[position].clone(), logits[position].clone()
        assert stayed.sample(left, [0], [position]) == back.sample(right, [1], [position])
        assert torch.equal(left, right)


def test_no_token_is_drawn_where_everything_is_forbidden() -> None:
    sampler = Sampler(3, (), CPU, TOKENIZER)
    only = SamplingParams(allowed_token_ids=(1,), bad_words=("aa",))
    sampler.start(0, replace(only, temperature=0.0, has_logprobs=True, num_top_logprobs=1))
    sampler.start(1, replace(only, temperature=1.0, top_p=0.5))
    sampler.start(2, SamplingParams(temperature=0.0))
    logits = torch.zeros(3, VOCAB_SIZE)
    assert sampler.sample(logits.clone(), [0, 1, 2], [0] * 3).tokens == (1, 1, 0)
    draws = sampler.sample(logits.clone(), [0, 1, 2], [1] * 3)
    assert draws.tokens == (NO_TOKEN, NO_TOKEN, 0)
    assert np.isnan(draws.logprobs[0])
    assert draws.tops == ((), (), ())


@pytest.mark.parametrize("min_p", [0.1, 0.5])
def test_min_p_keeps_what_is_probable_enough_at_the_temperature(min_p: float) -> None:
    logits = torch.tensor([0.0, -1.0, -2.0, -3.0, -4.0])
    params = SamplingParams(temperature=2.0, min_p=min_p)
    sampler = Sampler(1, (), CPU)
    drawn = set()
    for seed in range(400):
        sampler.start(0, replace(params, seed=seed))
        drawn |= set(sampler.sample(logits[None].clone(), [0], [0]).tokens)
    ratios = np.exp(logits.numpy() / 2.0)
    assert drawn == set(np.flatnonzero(ratios >= min_p))


def test_requests_without_rules_have_none() -> None:
    assert Constraints.of(SamplingParams(presence_penalty=1.0, min_p=0.5), None, CPU) is None
