"""What the device keeps of its seats, and how the sampler uses it, against the host's own.

`test_triton` runs this file interpreted.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import settings
from torch import Tensor

import engine.device_sampler
from engine import sampler as host
from engine.device_sampler import DeviceSampler, replayed
from engine.grammar import GrammarCompiler
from engine.penalties import Penalties
from engine.sampler import Draws, Sampler, choose_device_sampler
from engine.tokenizer import Tokenizer
from engine.types import SamplingParams
from tests.engine import test_constraints, test_grammar, test_sampler

CPU = torch.device("cpu")
# The letters first, so that a model of few tokens knows them.
TOKENIZER = Tokenizer({1 + place: bytes([(97 + place) % 256]) for place in range(256)})
PENALISED = SamplingParams(presence_penalty=0.4, repetition_penalty=0.15, penalty_decay=0.9)


@pytest.mark.parametrize("decay", [1.0, 0.9, 0.01, 0.0])
def test_penalties_are_those_of_the_host_and_of_a_replay(decay: float) -> None:
    """Greedy, of few tokens: all are drawn again and again, and scales fall below the least."""
    params = replace(PENALISED, temperature=0.0, penalty_decay=decay)
    sampler, penalties, out = DeviceSampler(1, 30, CPU, ()), Penalties(params), list[int]()
    sampler.start(0, params)
    logits = torch.randn(30, 1, 30, generator=torch.manual_seed(2)) * 0.3
    zero = torch.tensor([0])
    for step in logits:
        token = int(sampler.draw(step, zero, zero)[0])
        on_host = step[0].clone()
        penalties.apply(on_host)
        assert on_host[token] > on_host.max() - 1e-5
        out.append(token)
        penalties.update([token])
    got = sampler.arrays.penalties[0] * sampler.arrays.scales[0]
    expected = torch.zeros(30)
    penalties.apply(expected)
    assert torch.allclose(got, -expected, rtol=1e-5, atol=1e-30)
    assert len(set(out)) < len(out)
    back = DeviceSampler(3, 30, CPU, ())
    back.start(2, params, out)
    assert torch.equal(back.arrays.penalties[2], sampler.arrays.penalties[0])
    assert torch.equal(back.arrays.scales[2], sampler.arrays.scales[0])
    assert torch.equal(back.arrays.num_drawn[2], sampler.arrays.num_drawn[0])


@pytest.mark.parametrize("decay", [1.0, 0.9, 0.75, 0.5, 0.25, 0.0])
def test_first_and_further_draws_are_told_apart_as_on_the_host(decay: float) -> None:
    """After 2,000 draws of others: down to a half, what decays arrives at zero, above it never."""
    params = replace(PENALISED, penalty_decay=decay)
    past = [3, *[1, 2] * 1000, 3]
    (values, scale), penalties = replayed(params, past), Penalties(params)
    penalties.update(past)
    logits = torch.zeros(40)
    penalties.apply(logits)
    for token in (1, 2, 3):
        assert abs(values[token] * scale + logits[token]) < 1e-5


def test_a_sum_of_penalties_that_is_zero_counts_as_none() -> None:
    params = SamplingParams(temperature=0.0, presence_penalty=0.5, repetition_penalty=-0.5)
    sampler, zero = DeviceSampler(1, 40, CPU, ()), torch.tensor([0])
    sampler.start(0, params)
    logits, seen = torch.zeros(1, 40), []
    logits[0, 6] = 9.0
    for _ in range(4):
        sampler.draw(logits, zero, zero)
        seen.append(float(sampler.arrays.penalties[0, 6]))
    assert seen == [0.5, 0.0, 0.5, 0.0]


def test_who_takes_a_seat_inherits_nothing() -> None:
    sampler, zero = DeviceSampler(1, 40, CPU, ()), torch.tensor([0])
    rules = replace(PENALISED, allowed_token_ids=(1, 2), logit_bias=((1, 5.0),), min_tokens=3)
    sampler.start(0, replace(rules, temperature=0.0, presence_penalty=20.0))
    logits = torch.zeros(1, 40)
    logits[0, 1] = 1.0
    assert [int(sampler.draw(logits, zero, zero)[0]) for _ in range(2)] == [1, 2]
    sampler.start(0, SamplingParams(temperature=0.0, presence_penalty=1e-3, logit_bias=((9, 0.5),)))
    logits[0, 9] = 0.75
    assert int(sampler.draw(logits, zero, zero)[0]) == 9
    assert sampler.arrays.num_drawn.tolist() == [1]


def test_min_tokens_are_counted_on_the_device_and_from_the_past() -> None:
    sampler = DeviceSampler(2, 40, CPU, ())
    params = SamplingParams(temperature=0.0, min_tokens=2, stop_token_ids=(4, 5))
    sampler.start(0, params)
    sampler.start(1, params, output_ids=(7,))
    logits, pair = torch.arange(0, -40, -1.0).repeat(2, 1), torch.tensor([0, 1])
    logits[:, [4, 5]] = 9.0
    drawn_tokens = [sampler.draw(logits, pair, pair)[0].tolist() for _ in range(3)]
    assert drawn_tokens == [[0, 0], [0, 4], [4, 4]]


def test_batches_are_drawn_partly_here_and_partly_there() -> None:
    params = [
        SamplingParams(seed=1, top_p=0.9, has_logprobs=True),
        SamplingParams(seed=2, has_logprobs=True, num_top_logprobs=2),
        SamplingParams(seed=3, bad_words=("a",), presence_penalty=0.5),
        replace(PENALISED, seed=4),
    ]
    mixed = Sampler(4, (0,), CPU, TOKENIZER, on_device=DeviceSampler(4, 40, CPU, (0,)))
    alone = Sampler(4, (0,), CPU, TOKENIZER)
    for seat, p in enumerate(params):
        mixed.start(seat, p)
        alone.start(seat, p)
    logits = torch.randn(4, 4, 40, generator=torch.manual_seed(4))
    for position, step in enumerate(logits):
        order = [2, 0, 3, 1] if position % 2 else [0, 1, 2, 3]
        got = mixed.sample(step[order].clone(), order, [position] * 4)
        expected = alone.sample(step[order].clone(), order, [position] * 4)
        assert got.tokens == expected.tokens
        assert got.tops == expected.tops
        assert np.allclose(got.logprobs, expected.logprobs, atol=1e-5, equal_nan=True)


def test_choice_says_who_draws(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine.device_sampler, "DeviceSampler", lambda *args: args)
    gpu = torch.device("cuda", 0)
    with caplog.at_level(logging.INFO, logger=host.logger.name):
        assert choose_device_sampler(2, 40, CPU, (1,)) is None
        assert choose_device_sampler(2, 40, gpu, (1,)) == (2, 40, gpu, (1,))
    assert caplog.messages == [
        "sampler: host (device cpu)",
        "sampler: triton (host for bad_words and top_logprobs)",
    ]


class OnDevice(Sampler):
    """A sampler that has one on the device, for as many tokens as the first logits have."""

    def __init__(
        self,
        num_seats: int,
        banned_ids: Sequence[int],
        device: torch.device,
        tokenizer: Tokenizer | None = None,
        grammars: GrammarCompiler | None = None,
    ) -> None:
        super().__init__(num_seats, banned_ids, device, tokenizer, grammars)
        self._size, self._banned_ids = num_seats, banned_ids
        self._starts: list[tuple[int, SamplingParams, Sequence[int]]] = []

    def start(self, seat: int, params: SamplingParams, output_ids: Sequence[int] = ()) -> None:
        if self.on_device is None:
            self._starts.append((seat, params, output_ids))
        else:
            super().start(seat, params, output_ids)

    def sample(self, logits_RV: Tensor, seats: Sequence[int], positions: Sequence[int]) -> Draws:
        if self.on_device is None:
            self.on_device = DeviceSampler(self._size, logits_RV.shape[1], CPU, self._banned_ids)
            for start in self._starts:
                super().start(*start)
        return super().sample(logits_RV, seats, positions)


@pytest.fixture(scope="module", autouse=True)
def samplers_on_device() -> Iterator[None]:
    """In the tests below that are those of the host's sampler."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (test_constraints, test_grammar, test_sampler):
            patch.setattr(module, "Sampler", OnDevice)
        yield


few = settings(max_examples=2, deadline=None, derandomize=True)
test_every_draw_matches_the_dense_oracle = few(
    test_sampler.test_every_draw_matches_the_dense_oracle
)
test_every_draw_keeps_the_rules_of_its_request = few(
    test_constraints.test_every_draw_matches_the_dense_oracle
)
test_a_draw_depends_on_neither_seat_nor_batch_nor_neighbours = (
    test_sampler.test_a_draw_depends_on_neither_seat_nor_batch_nor_neighbours
)
test_a_bad_row_has_no_logprob_and_spoils_no_other = (
    test_sampler.test_a_bad_row_has_no_logprob_and_spoils_no_other
)
test_a_new_request_in_a_seat_inherits_no_penalties = (
    test_sampler.test_a_new_request_in_a_seat_inherits_no_penalties
)
test_no_token_is_drawn_where_everything_is_forbidden = (
    test_constraints.test_no_token_is_drawn_where_everything_is_forbidden
)
test_nothing_left_to_draw_is_told_and_draws_nothing = (
    test_grammar.test_nothing_left_to_draw_is_told_and_draws_nothing
)
