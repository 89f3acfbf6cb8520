"""RecentResponses: what the latest answers were made of, so that a state can be made of one.

In memory and bounded: an answer that is too old is gone, and so are all after a restart.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from engine.output import first_bytes
from engine.tokenizer import Tokenizer
from engine.types import EngineRequest, FinishReason, OutputDelta, SamplingParams

MAX_NUM_RESPONSES = 1000
MAX_NUM_TOKENS = 4_000_000  # 16 MB


@dataclass(frozen=True, slots=True, kw_only=True)
class RecentResponse:
    """One choice of an answer: the tokens up to its end, and what they went on from."""

    owner: str
    model_name: str
    tokenizer_fingerprint: str  # what the ids mean
    token_ids: array[int]  # of the prompt and the answer
    state_id: str | None
    initial_state: str | None
    cache_salt: str


class RecentResponses:
    """The least recently used ones go first. An answer has one or more choices."""

    def __init__(
        self, max_num_responses: int = MAX_NUM_RESPONSES, max_num_tokens: int = MAX_NUM_TOKENS
    ) -> None:
        self._max_num_responses = max_num_responses
        self._max_num_tokens = max_num_tokens
        self._responses: OrderedDict[tuple[str, str], list[RecentResponse]] = OrderedDict()
        self._num_tokens = 0

    def add(self, answer_id: str, choices: list[RecentResponse]) -> None:
        """Of two answers that their owner has given the same id, the later one is known."""
        key = choices[0].owner, answer_id
        self._num_tokens -= _num_tokens(self._responses.pop(key, []))
        self._responses[key] = choices
        self._num_tokens += _num_tokens(choices)
        while (
            len(self._responses) > self._max_num_responses
            or self._num_tokens > self._max_num_tokens
        ):
            _, oldest = self._responses.popitem(last=False)
            self._num_tokens -= _num_tokens(oldest)

    def get(self, owner: str, answer_id: str) -> list[RecentResponse] | None:
        """None where there is none of that id for this owner."""
        choices = self._responses.get((owner, answer_id))
        if choices is not None:
            self._responses.move_to_end((owner, answer_id))
        return choices


def recent_response(
    request: EngineRequest, model_name: str, tokenizer: Tokenizer, answer: OutputDelta
) -> RecentResponse:
    """`answer` is the last delta, with the token ids of the whole answer."""
    emitted = emitted_ids(tokenizer, answer, request.sampling)
    return RecentResponse(
        owner=request.owner,
        model_name=model_name,
        tokenizer_fingerprint=tokenizer.fingerprint,
        token_ids=array("I", [*request.prompt_ids, *emitted]),
        state_id=request.state_id,
        initial_state=request.initial_state,
        cache_salt=request.cache_salt,
    )


def emitted_ids(
    tokenizer: Tokenizer, answer: OutputDelta, sampling: SamplingParams
) -> Sequence[int]:
    """The tokens of the text that a client was given: without what ended it.

    A token that is cut by the stop string is replaced by tokens of what is left of it.
    """
    ids = answer.token_ids
    if answer.matched_stop is not None:
        return first_bytes(tokenizer, ids, answer.num_text_bytes)
    if answer.finish_reason is not FinishReason.STOP or sampling.includes_stop:
        return ids
    return ids[:-1] if ids and ids[-1] in sampling.stop_token_ids else ids


def _num_tokens(choices: Sequence[RecentResponse]) -> int:
    return sum(len(choice.token_ids) for choice in choices)
