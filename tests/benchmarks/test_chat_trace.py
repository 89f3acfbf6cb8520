"""The trace knows by itself what could be reused; the scheduler finds it."""

from __future__ import annotations

from benchmarks.chat_trace import Policy, TraceShape, hit_rate, make_trace

SHAPE = TraceShape(num_chats=12, num_system_prompts=3, system_len=100, answer_len=8)
EVERYTHING = Policy("everything", 1, has_branches=True, max_hints=1)


def shared_lengths(prompts: list[tuple[int, ...]], fed: list[tuple[int, ...]]) -> list[int]:
    """Of each prompt the longest beginning that was fed before, by comparing with all."""
    lengths = []
    for number, prompt in enumerate(prompts):
        longest = 0
        for text in fed[:number]:
            pairs = enumerate(zip(prompt, text, strict=False))
            longest = max(
                longest, next((i for i, (a, b) in pairs if a != b), min(len(prompt), len(text)))
            )
        lengths.append(longest)
    return lengths


def test_shared_tokens_are_those_that_were_fed_before() -> None:
    trace = make_trace(SHAPE)
    fed = [turn.prompt_ids + turn.answer_ids[:-1] for turn in trace]
    expected = shared_lengths([turn.prompt_ids for turn in trace], fed)
    assert [turn.num_shared_tokens for turn in trace] == expected
    assert sum(expected) > 0


def test_with_room_for_everything_every_shared_token_is_taken() -> None:
    trace = make_trace(SHAPE)
    num_shared = sum(turn.num_shared_tokens for turn in trace)
    num_prompt = sum(len(turn.prompt_ids) for turn in trace)
    assert hit_rate(trace, EVERYTHING, 4096, 0) == num_shared / num_prompt


def test_fewer_states_never_find_more() -> None:
    trace = make_trace(SHAPE)
    rates = [hit_rate(trace, EVERYTHING, num_slots, 0) for num_slots in (4096, 16, 5)]
    assert rates == sorted(rates, reverse=True)
    assert rates[0] > rates[-1]
