"""Admission: bad requests are refused by field, value and remedy; full queues say when."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from engine.admission import MAX_RETRY_S, MIN_RETRY_S, RECENT_S, ServiceRate, check_request
from engine.errors import ContextTooLong, InvalidRequest
from engine.types import EngineRequest, SamplingParams

GOOD = EngineRequest(request_id="r", prompt_ids=(0, 9))


def check(request: EngineRequest, max_context_len: int = 0) -> None:
    check_request(request, vocab_size=10, max_context_len=max_context_len)


@pytest.mark.parametrize(
    "sampling",
    [
        SamplingParams(),
        SamplingParams(temperature=0.0, top_p=0.0, max_tokens=1, seed=2**64 - 1),
        SamplingParams(presence_penalty=-3.0, repetition_penalty=9.0, penalty_decay=0.5),
        SamplingParams(stop=("é", ""), stop_token_ids=(), banned_token_ids=(9,)),
        SamplingParams(max_tokens=0),
        SamplingParams(min_p=1.0, min_tokens=256, bad_words=("é",), allowed_token_ids=(0, 1)),
    ],
)
def test_a_good_request_is_taken(sampling: SamplingParams) -> None:
    check(replace(GOOD, sampling=sampling, timeout_s=0.5))


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("max_tokens", -1, "max_tokens = -1: must be at least 0"),
        ("min_tokens", -1, "min_tokens = -1: must be from 0 to max_tokens = 256"),
        ("min_tokens", 257, "min_tokens = 257"),
        ("min_p", -0.1, "min_p = -0.1: must be from 0"),
        ("min_p", math.nan, "min_p = nan"),
        ("logit_bias", ((10, 1.0),), "logit_bias has 10"),
        ("logit_bias", ((1, math.inf),), "logit_bias of token 1 is inf"),
        ("logit_bias", ((1, 1.0), (1, 2.0)), "names a token twice"),
        ("allowed_token_ids", (10,), "allowed_token_ids has 10"),
        ("bad_words", ("ok", "\ud800"), "bad_words has '.*ud800'"),
        ("bad_words", ("",), "bad_words has an empty string"),
        ("num_top_logprobs", -1, "num_top_logprobs = -1"),
        ("candidate_token_ids", (-1,), "candidate_token_ids has -1"),
        ("temperature", -0.1, "temperature = -0.1"),
        ("temperature", math.nan, "temperature = nan"),
        ("temperature", math.inf, "temperature = inf"),
        ("top_p", 1.5, "top_p = 1.5: must be from 0 to 1"),
        ("top_p", math.nan, "top_p = nan"),
        ("top_k", -1, "top_k = -1"),
        ("seed", -1, "seed = -1"),
        ("seed", 2**64, "seed = 18446744073709551616"),
        ("presence_penalty", math.inf, "presence_penalty = inf: must be a finite number"),
        ("repetition_penalty", math.nan, "repetition_penalty = nan"),
        ("penalty_decay", -math.inf, "penalty_decay = -inf"),
        ("stop", ("fine", "\ud800"), "stop has '\\\\ud800'"),
        ("stop_token_ids", (0, 10), "stop_token_ids has 10: .* from 0 to 9"),
        ("banned_token_ids", (-1,), "banned_token_ids has -1"),
    ],
)
def test_bad_sampling_is_refused_by_name(field: str, value: object, words: str) -> None:
    sampling = SamplingParams(**{field: value})  # type: ignore[arg-type]
    with pytest.raises(InvalidRequest, match=words) as refused:
        check(replace(GOOD, sampling=sampling))
    assert refused.value.field == field


@pytest.mark.parametrize("prompt_ids", [(10,), (3, -1, 3)])
def test_token_ids_outside_the_vocabulary_are_refused(prompt_ids: tuple[int, ...]) -> None:
    with pytest.raises(InvalidRequest, match="token ids of this model go from 0 to 9") as refused:
        check(replace(GOOD, prompt_ids=prompt_ids))
    assert refused.value.field == "prompt_ids"


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="begin a document with token 0"):
        check(replace(GOOD, prompt_ids=()))


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("cache_salt", "\ud800", r"cache_salt = '\\ud800': a lone surrogate"),
        ("snapshot_hints", (0, 99), "snapshot_hints has 99: must be from 0 to"),
        ("snapshot_hints", (-1,), "snapshot_hints has -1"),
    ],
)
def test_bad_cache_fields_are_refused_by_name(field: str, value: object, words: str) -> None:
    with pytest.raises(InvalidRequest, match=words) as refused:
        check(replace(GOOD, **{field: value}))  # type: ignore[arg-type]
    assert refused.value.field == field


def test_hints_from_the_beginning_to_the_end_of_the_prompt_are_taken() -> None:
    num_prompt = len(GOOD.prompt_ids)
    check(replace(GOOD, snapshot_hints=(0, num_prompt), cache_salt="é"))


@pytest.mark.parametrize("timeout_s", [0.0, -1.0, math.nan, math.inf])
def test_a_deadline_must_be_a_positive_time(timeout_s: float) -> None:
    with pytest.raises(InvalidRequest, match=f"timeout_s = {timeout_s}") as refused:
        check(replace(GOOD, timeout_s=timeout_s))
    assert refused.value.field == "timeout_s"


def test_a_prompt_must_leave_room_for_one_token() -> None:
    check(replace(GOOD, prompt_ids=(1,) * 7), max_context_len=8)
    with pytest.raises(ContextTooLong, match="8 tokens, but max_context_len = 8"):
        check(replace(GOOD, prompt_ids=(1,) * 8), max_context_len=8)


def test_zero_means_no_limit_of_the_context() -> None:
    check(replace(GOOD, prompt_ids=(1,) * 100_000), max_context_len=0)


def test_retry_time_is_the_queue_at_the_recent_rate() -> None:
    rate = ServiceRate()
    for second in range(10):
        rate.count_end(100.0 + second)
    # Ten ends in the ten seconds since the first of them: one a second.
    assert rate.retry_after_s(num_waiting=7, now_s=110.0) == 7.0


def test_retry_time_has_bounds() -> None:
    rate = ServiceRate()
    assert rate.retry_after_s(num_waiting=1000, now_s=0.0) == MIN_RETRY_S
    rate.count_end(0.0)
    assert rate.retry_after_s(num_waiting=1000, now_s=10.0) == MAX_RETRY_S
    assert rate.retry_after_s(num_waiting=1, now_s=0.1) == MIN_RETRY_S


def test_an_old_rate_is_forgotten() -> None:
    rate = ServiceRate()
    rate.count_end(0.0)
    assert rate.retry_after_s(num_waiting=1000, now_s=RECENT_S + 1) == MIN_RETRY_S


@pytest.mark.parametrize(
    "sampling",
    [
        SamplingParams(allowed_token_ids=(3, 4), banned_token_ids=(3, 4)),
        SamplingParams(allowed_token_ids=(0,), min_tokens=1),
    ],
)
def test_rules_that_leave_no_token_at_all_are_refused(sampling: SamplingParams) -> None:
    with pytest.raises(InvalidRequest, match="nothing could be drawn") as refused:
        check(replace(GOOD, sampling=sampling))
    assert refused.value.field == "allowed_token_ids"


@pytest.mark.parametrize("scores_from", [-1, 100])
def test_scores_must_begin_within_the_prompt(scores_from: int) -> None:
    with pytest.raises(InvalidRequest, match=f"scores_from = {scores_from}") as refused:
        check(replace(GOOD, scores_from=scores_from))
    assert refused.value.field == "scores_from"
