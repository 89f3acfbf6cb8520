"""Scores of continuations: what an engine is asked for them, and what they come to.

The prompt is computed once. Its last row says how probable each choice's first token is; choices
of more tokens go on from the state that it leaves, a fork each. Knows no HTTP.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from engine.types import EngineRequest, OutputDelta, SamplingParams, TopLogprobs

# Nothing is drawn for its own sake: the engine reports the most probable token beside others.
FIRST_TOKEN = SamplingParams(
    temperature=0.0, max_tokens=1, stop_token_ids=(), has_logprobs=True, num_top_logprobs=1
)
OTHER_TOKENS = replace(FIRST_TOKEN, max_tokens=0)


@dataclass(frozen=True, slots=True)
class Score:
    """One logarithm per token of a choice, natural, of the model's own probabilities."""

    token_ids: tuple[int, ...]
    token_logprobs: tuple[float, ...]
    is_greedy: bool  # no other token would have been more probable at any place


def first_request(prompt: EngineRequest, choices: Sequence[tuple[int, ...]]) -> EngineRequest:
    """How probable the first token of each choice is."""
    first_ids = tuple(dict.fromkeys(ids[0] for ids in choices))
    return replace(prompt, sampling=replace(FIRST_TOKEN, candidate_token_ids=first_ids))


def other_request(prompt: EngineRequest, ids: tuple[int, ...], number: int) -> EngineRequest:
    """How probable the tokens of a choice after its first one are."""
    num_prompt = len(prompt.prompt_ids)
    return replace(
        prompt,
        request_id=f"{prompt.request_id}-{number}",
        prompt_ids=(*prompt.prompt_ids, *ids),
        sampling=OTHER_TOKENS,
        branch_at=num_prompt,
        scores_from=num_prompt + 1,
    )


def score_of(ids: tuple[int, ...], first: OutputDelta, others: OutputDelta | None) -> Score:
    """From the answers to the two; a choice of one token needs no second."""
    (top,) = first.tops
    logprobs = [dict(top)[ids[0]]]
    bests = [_best(top)]
    if others is not None:
        logprobs += others.prompt_logprobs
        bests += map(_best, others.prompt_tops)
    assert len(logprobs) == len(bests) == len(ids), f"{len(logprobs)} scores of {len(ids)} tokens"
    is_greedy = all(mine >= best for mine, best in zip(logprobs, bests, strict=True))
    return Score(ids, tuple(logprobs), is_greedy)


def _best(top: TopLogprobs) -> float:
    return max(logprob for _, logprob in top)
