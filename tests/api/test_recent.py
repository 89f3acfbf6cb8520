"""What is remembered of answers, and which tokens an answer has."""

from __future__ import annotations

from array import array

import pytest
from hypothesis import given
from hypothesis import strategies as st

from api.recent import RecentResponse, RecentResponses, emitted_ids
from engine.output import TextOutput
from engine.types import FinishReason, OutputDelta, SamplingParams
from tests.api.test_prompt import TOKENIZER


def response(num_tokens: int, owner: str = "me") -> RecentResponse:
    return RecentResponse(
        owner=owner,
        model_name="m",
        tokenizer_fingerprint="",
        token_ids=array("I", range(num_tokens)),
        state_id=None,
        initial_state=None,
        cache_salt="",
    )


def test_least_recently_used_are_forgotten():
    recent = RecentResponses(max_num_responses=2)
    for name in ("a", "b"):
        recent.add(name, [response(1)])
    assert recent.get("me", "a") is not None
    recent.add("c", [response(1)])
    assert recent.get("me", "b") is None
    assert recent.get("me", "a") is not None


def test_tokens_are_bounded_too():
    recent = RecentResponses(max_num_tokens=10)
    recent.add("a", [response(3), response(3)])
    recent.add("b", [response(5)])
    assert recent.get("me", "a") is None
    recent.add("c", [response(5)])
    assert recent.get("me", "b") is not None
    recent.add("huge", [response(11)])
    assert recent.get("me", "huge") is None
    recent.add("d", [response(10)])
    assert recent.get("me", "d") is not None


def test_others_see_nothing():
    recent = RecentResponses()
    recent.add("a", [response(1, "me")])
    assert recent.get("you", "a") is None


WRITTEN_IDS = [*(1 + byte for byte in b"ab\nUser:"), *range(257, TOKENIZER.vocab_size)]


@given(
    ids=st.lists(st.sampled_from(WRITTEN_IDS), min_size=1, max_size=20),
    stop_at=st.tuples(st.integers(0, 60), st.integers(1, 8)),
    other_stops=st.lists(st.text(alphabet="ab\n:", min_size=1, max_size=3), max_size=2),
    includes_stop=st.booleans(),
)
def test_emitted_tokens_spell_the_text_that_was_given(
    ids: list[int], stop_at: tuple[int, int], other_stops: list[str], includes_stop: bool
):
    """Against the engine's own output."""
    start, length = stop_at
    whole = TOKENIZER.decode(ids)
    stop = whole[start % len(whole) :][:length]
    output = TextOutput(TOKENIZER, (stop, *other_stops), includes_stop=includes_stop)
    text, drawn = "", []
    for token_id in ids:
        text += output.push(token_id)
        drawn.append(token_id)
        if output.matched_stop is not None:
            break
    assert output.matched_stop is not None
    answer = OutputDelta(
        text=text,
        token_ids=tuple(drawn),
        finish_reason=FinishReason.STOP,
        matched_stop=output.matched_stop,
        num_text_bytes=output.num_emitted_bytes,
    )
    emitted = emitted_ids(TOKENIZER, answer, SamplingParams(includes_stop=includes_stop))
    assert TOKENIZER.decode(emitted) == text
    num_same = max(len(emitted) - 8, 0)  # of a cut token come at most eight others
    assert list(emitted[:num_same]) == drawn[:num_same]


@pytest.mark.parametrize(
    ("reason", "expected"),
    [(FinishReason.STOP, (5, 6)), (FinishReason.LENGTH, (5, 6, 0))],
)
def test_stop_token_is_no_part_of_the_answer(reason: FinishReason, expected: tuple[int, ...]):
    answer = OutputDelta(token_ids=(5, 6, 0), finish_reason=reason, num_text_bytes=2)
    assert tuple(emitted_ids(TOKENIZER, answer, SamplingParams())) == expected


def test_an_answer_that_ended_without_a_stop_token_keeps_its_last_one():
    """Everything was forbidden: no token says so."""
    answer = OutputDelta(token_ids=(5, 6), finish_reason=FinishReason.STOP, num_text_bytes=2)
    assert tuple(emitted_ids(TOKENIZER, answer, SamplingParams())) == (5, 6)


def test_of_two_answers_with_one_id_the_later_one_is_known():
    recent = RecentResponses(max_num_tokens=10)
    recent.add("a", [response(4)])
    recent.add("a", [response(7, "you")])
    recent.add("a", [response(3)])
    assert [len(one.token_ids) for one in recent.get("me", "a") or []] == [3]
    assert [len(one.token_ids) for one in recent.get("you", "a") or []] == [7]
