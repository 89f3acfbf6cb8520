"""Log probabilities against float64 numpy, and those of a prompt against the model alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import engine.executor
from engine.logprobs import score
from engine.model.rwkv7 import RWKV7, Batch
from engine.plan import Row, Scores, Targets
from engine.sampler import Sampler
from engine.types import SamplingParams
from tests.engine.device import (
    CFG,
    CPU,
    GREEDY,
    decode,
    make_device,
    prefill,
    random_model,
    start,
)

VOCAB_SIZE = 30
ASKED = st.builds(
    SamplingParams,
    num_top_logprobs=st.integers(0, 40),
    candidate_token_ids=st.lists(st.integers(0, VOCAB_SIZE - 1), max_size=3).map(tuple),
)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    x = logits.astype(np.float64)
    x -= x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


@given(
    asked=st.lists(ASKED, min_size=1, max_size=4),
    seed=st.integers(0, 2**31),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
)
def test_scores_are_the_log_softmax_and_its_greatest_values(
    asked: list[SamplingParams], seed: int, dtype: torch.dtype
) -> None:
    rng = np.random.default_rng(seed)
    logits = torch.from_numpy(rng.normal(0, 6, (len(asked), VOCAB_SIZE))).to(dtype)
    tokens = rng.integers(0, VOCAB_SIZE, len(asked)).tolist()
    scores = score(logits, tokens, asked)
    expected = log_softmax(logits.double().numpy())
    tolerance = 1e-12 if dtype is torch.float64 else 1e-5
    for row, params in enumerate(asked):
        assert abs(scores.logprobs[row] - expected[row, tokens[row]]) < tolerance
        if not any(one.has_top_logprobs for one in asked):
            assert scores.tops == ()
            continue
        num_top = min(params.num_top_logprobs, VOCAB_SIZE)
        top, candidates = scores.tops[row][:num_top], scores.tops[row][num_top:]
        values = [value for _, value in top]
        assert values == sorted(values, reverse=True)
        assert np.allclose(values, np.sort(expected[row])[::-1][:num_top], atol=tolerance, rtol=0)
        assert tuple(token for token, _ in candidates) == params.candidate_token_ids
        for token, value in scores.tops[row]:
            assert abs(value - expected[row, token]) < tolerance
            assert token != tokens[row] or value == scores.logprobs[row], "differs from itself"


def test_whoever_does_not_ask_costs_and_learns_nothing() -> None:
    sampler = Sampler(3, (), CPU)
    sampler.start(0, GREEDY)
    sampler.start(1, replace(GREEDY, has_logprobs=True))
    sampler.start(2, replace(GREEDY, has_logprobs=True, num_top_logprobs=2))
    logits = torch.randn(3, VOCAB_SIZE, generator=torch.manual_seed(0))
    assert not any(sampler.sample(logits[:1].clone(), [0], [1])[1:])
    assert sampler.sample(logits[:2].clone(), [0, 1], [1, 1]).tops == ()
    draws = sampler.sample(logits.clone(), [0, 1, 2], [1, 1, 1])
    assert [len(top) for top in draws.tops] == [0, 0, 2]
    assert np.isnan(draws.logprobs[0])


def model_scores(model: RWKV7, tokens: Sequence[int]) -> Tensor:
    """Log probabilities [T, V] of what follows each token, by the model alone."""
    state, slots = model.new_state(1, CPU), torch.tensor([0])
    with torch.inference_mode():
        hidden = model(torch.tensor(list(tokens)), Batch((len(tokens),), slots, slots), state)
        logprobs: Tensor = model.head(hidden).log_softmax(-1)
    return logprobs


def scored(row: Row, prompt: Sequence[int]) -> Row:
    """The row is to score all it can say about the prompt."""
    assert row.num_tokens > 0
    begin = row.position
    return row._replace(targets=Targets(0, tuple(prompt[begin + 1 : begin + 1 + row.num_tokens])))


@pytest.mark.parametrize("part_len", [1, 3, 1000])
def test_rows_score_the_tokens_that_follow_theirs_in_plan_order(
    monkeypatch: pytest.MonkeyPatch, part_len: int
) -> None:
    monkeypatch.setattr(engine.executor, "SCORED_ROWS", part_len)
    device = make_device(random_model())
    rng = np.random.default_rng(0)
    a, b = (rng.integers(1, CFG.vocab_size, 11).tolist() for _ in range(2))
    asks = replace(GREEDY, num_top_logprobs=2, candidate_token_ids=(5,))
    one = device.run(
        scored(prefill(0, tuple(a[:7]), 1, sample=False), a),
        scored(prefill(1, tuple(b[:1]), 2, sample=False), b),
        prefill(2, (4, 5), 3),
        starts=(start(0, asks), start(1), start(2)),
    )
    two = device.run(
        scored(prefill(1, tuple(b[1:]), 2, position=1), b),
        decode(2, 2, 3, 3),
        scored(prefill(0, tuple(a[7:]), 1, position=7), a),
    )
    assert len(one.tokens) == 1
    assert len(two.tokens) == 3
    found = {"a": (one.scores[0], two.scores[1]), "b": (one.scores[1], two.scores[0])}
    for name, prompt in (("a", a), ("b", b)):
        expected = model_scores(device.model, prompt)
        logprobs = [value for part in found[name] for value in part.logprobs]
        assert len(logprobs) == len(prompt) - 1
        for place, value in enumerate(logprobs):
            assert abs(value - float(expected[place, prompt[place + 1]])) < 1e-12
    tops = [top for part in found["a"] for top in part.tops]
    for place, top in enumerate(tops):
        expected_a = model_scores(device.model, a)[place]
        assert [token for token, _ in top[:2]] == expected_a.topk(2).indices.tolist()
        assert abs(top[2][1] - float(expected_a[5])) < 1e-12
    assert [part.tops for part in found["b"]] == [(), ()]


def test_scores_begin_where_they_are_asked_for() -> None:
    device = make_device(random_model())
    prompt = (3, 9, 4, 7, 8)
    row = prefill(0, prompt, 1)._replace(targets=Targets(2, prompt[3:]))
    draws = device.run(row, starts=(start(0),))
    expected = model_scores(device.model, prompt)
    values = [float(expected[place, prompt[place + 1]]) for place in (2, 3)]
    assert draws.scores == (Scores(pytest.approx(values, abs=1e-12)),)


def test_scoring_changes_no_draw_and_no_state() -> None:
    prompt = (3, 9, 4, 7, 8)
    asks = replace(GREEDY, num_top_logprobs=3)
    plain, scoring = make_device(random_model()), make_device(random_model())
    row = prefill(0, prompt, 1)
    first = plain.run(row, starts=(start(0, asks),))
    second = scoring.run(scored(row, prompt), starts=(start(0, asks),))
    assert first.tokens == second.tokens
    assert torch.equal(plain.storage.state.wkv[1], scoring.storage.state.wkv[1])
