"""Who may come in: checks of a request, and when a refused one should try again.

Knows no HTTP; the server checks its own schema first, these checks protect the device and
Python users.
"""

from __future__ import annotations

import math
from collections import deque

from engine.errors import ContextTooLong, InvalidRequest
from engine.grammar import GrammarCompiler
from engine.tokenizer import END_OF_TEXT
from engine.types import EngineRequest, SamplingParams

NUM_RECENT = 64  # ends of requests that the service rate is taken from
RECENT_S = 30.0  # older ones say nothing about now
MIN_RETRY_S, MAX_RETRY_S = 1.0, 60.0


def check_request(
    request: EngineRequest, *, vocab_size: int, max_context_len: int, has_start: bool = False
) -> None:
    """Raise InvalidRequest naming field, value and remedy. With `has_start` the prompt goes on
    from a state that has logits and may be empty.

    `max_context_len` counts prompt and completion together, 0 means no limit; a prompt that
    leaves no room for one token of a completion raises ContextTooLong.
    """
    ids = request.prompt_ids
    if not ids and request.state_id is not None and not has_start:
        raise InvalidRequest(
            "prompt_ids is empty, and the state has no logits to go on with: send a token at least",
            "prompt_ids",
        )
    if not ids and not has_start:
        raise InvalidRequest("prompt_ids is empty: begin a document with token 0", "prompt_ids")
    if request.state_id is not None and request.initial_state is not None:
        raise InvalidRequest(
            f"initial_state = {request.initial_state!r} and state_id exclude each other: a state"
            " has begun already",
            "initial_state",
        )
    least = min(request.sampling.max_tokens, 1)
    if 0 < max_context_len < len(ids) + least:
        needs = " and the completion needs at least one" if least else ""
        raise ContextTooLong(
            f"the prompt has {len(ids)} tokens, but max_context_len = {max_context_len}{needs}:"
            " shorten the prompt",
            "prompt_ids",
        )
    timeout_s = request.timeout_s
    if timeout_s is not None and not 0 < timeout_s < math.inf:
        raise InvalidRequest(
            f"timeout_s = {timeout_s}: must be positive, or None for no deadline", "timeout_s"
        )
    _check_ids("prompt_ids", ids, vocab_size)
    _check_cache_fields(request)
    _check_hidden(request)
    if request.scores_from is not None and not 0 <= request.scores_from <= len(ids):
        raise InvalidRequest(
            f"scores_from = {request.scores_from}: must be from 0 to {len(ids)}, the tokens of the"
            " prompt",
            "scores_from",
        )
    _check_lengths(request.sampling)
    _check_sampling(request.sampling, vocab_size)
    _check_constraints(request.sampling, vocab_size)


def _check_lengths(sampling: SamplingParams) -> None:
    if sampling.max_tokens < 0:
        raise InvalidRequest(
            f"max_tokens = {sampling.max_tokens}: must be at least 0", "max_tokens"
        )
    if not 0 <= sampling.min_tokens <= sampling.max_tokens:
        raise InvalidRequest(
            f"min_tokens = {sampling.min_tokens}: must be from 0 to max_tokens ="
            f" {sampling.max_tokens}",
            "min_tokens",
        )


def check_grammar(sampling: SamplingParams, grammars: GrammarCompiler | None) -> None:
    """Raise InvalidRequest for one that cannot be followed. Compiles it if nobody has."""
    if sampling.grammar is None:
        return
    if grammars is None:
        raise InvalidRequest("this engine follows no grammars; leave it out", "grammar")
    if END_OF_TEXT not in sampling.stop_token_ids:
        raise InvalidRequest(
            f"stop_token_ids = {sampling.stop_token_ids}: a grammar ends with token 0, which must"
            " be among them; leave out ignore_eos",
            "stop_token_ids",
        )
    if sampling.min_tokens > 0:
        raise InvalidRequest(
            f"min_tokens = {sampling.min_tokens}: a grammar says itself where the text may end;"
            " leave it out",
            "min_tokens",
        )
    grammars.matcher(sampling.grammar)


def _check_hidden(request: EngineRequest) -> None:
    if not request.returns_hidden:
        return
    if not request.prompt_ids:
        raise InvalidRequest(
            "prompt_ids is empty: the row of a token is asked for, send one at least", "prompt_ids"
        )
    if request.sampling.max_tokens != 0 or request.keep_state or request.scores_from is not None:
        raise InvalidRequest(
            "returns_hidden asks for nothing but a row of the prompt: leave out keep_state and"
            " scores_from, and set max_tokens = 0",
            "returns_hidden",
        )


def _check_sampling(sampling: SamplingParams, vocab_size: int) -> None:
    if not 0 <= sampling.temperature < math.inf:
        raise InvalidRequest(
            f"temperature = {sampling.temperature}: must be 0 (greedy) or more", "temperature"
        )
    if not 0 <= sampling.top_p <= 1:
        raise InvalidRequest(f"top_p = {sampling.top_p}: must be from 0 to 1", "top_p")
    if not 0 <= sampling.min_p <= 1:
        raise InvalidRequest(f"min_p = {sampling.min_p}: must be from 0 (off) to 1", "min_p")
    if sampling.top_k < 0:
        raise InvalidRequest(f"top_k = {sampling.top_k}: must be 0 (off) or more", "top_k")
    if not 0 <= sampling.seed < 2**64:
        raise InvalidRequest(f"seed = {sampling.seed}: must be from 0 to 2**64 - 1", "seed")
    for name, value in (
        ("presence_penalty", sampling.presence_penalty),
        ("repetition_penalty", sampling.repetition_penalty),
        ("penalty_decay", sampling.penalty_decay),
    ):
        if not math.isfinite(value):
            raise InvalidRequest(f"{name} = {value}: must be a finite number", name)
    if sampling.num_top_logprobs < 0:
        raise InvalidRequest(
            f"num_top_logprobs = {sampling.num_top_logprobs}: must be 0 or more", "num_top_logprobs"
        )
    _check_ids("candidate_token_ids", sampling.candidate_token_ids, vocab_size)


def _check_constraints(sampling: SamplingParams, vocab_size: int) -> None:
    for name, texts in (("stop", sampling.stop), ("bad_words", sampling.bad_words)):
        for text in texts:
            if not _has_utf8(text):
                raise InvalidRequest(
                    f"{name} has {text!r}: a lone surrogate never occurs in text, remove it", name
                )
    if "" in sampling.bad_words:
        raise InvalidRequest("bad_words has an empty string: leave it out", "bad_words")
    _check_ids("stop_token_ids", sampling.stop_token_ids, vocab_size)
    _check_ids("banned_token_ids", sampling.banned_token_ids, vocab_size)
    _check_ids("allowed_token_ids", sampling.allowed_token_ids, vocab_size)
    biased = tuple(token_id for token_id, _ in sampling.logit_bias)
    _check_ids("logit_bias", biased, vocab_size)
    for token_id, bias in sampling.logit_bias:
        if not math.isfinite(bias):
            raise InvalidRequest(
                f"logit_bias of token {token_id} is {bias}: must be a finite number", "logit_bias"
            )
    if len(set(biased)) < len(biased):
        raise InvalidRequest("logit_bias names a token twice", "logit_bias")
    left = set(sampling.allowed_token_ids) - set(sampling.banned_token_ids)
    if sampling.min_tokens > 0:
        left -= set(sampling.stop_token_ids)
    if sampling.allowed_token_ids and not left:
        raise InvalidRequest(
            "allowed_token_ids has only tokens that are banned or may not come before min_tokens:"
            " nothing could be drawn",
            "allowed_token_ids",
        )


def _check_cache_fields(request: EngineRequest) -> None:
    if not _has_utf8(request.cache_salt):
        raise InvalidRequest(
            f"cache_salt = {request.cache_salt!r}: a lone surrogate has no UTF-8 form, remove it",
            "cache_salt",
        )
    num_prompt = len(request.prompt_ids)
    if request.branch_at is not None and not 0 <= request.branch_at <= num_prompt:
        raise InvalidRequest(
            f"branch_at = {request.branch_at}: must be from 0 to the prompt's {num_prompt} tokens",
            "branch_at",
        )
    for hint in request.snapshot_hints:
        if not 0 <= hint <= num_prompt:
            raise InvalidRequest(
                f"snapshot_hints has {hint}: must be from 0 to the prompt's {num_prompt} tokens",
                "snapshot_hints",
            )


def _has_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _check_ids(field: str, ids: tuple[int, ...], vocab_size: int) -> None:
    for wrong in (min(ids, default=0), max(ids, default=0)):
        if not 0 <= wrong < vocab_size:
            raise InvalidRequest(
                f"{field} has {wrong}: token ids of this model go from 0 to {vocab_size - 1}", field
            )


class ServiceRate:
    """How fast requests have been ending lately, to tell a refused client when to come back."""

    def __init__(self) -> None:
        self._ends_s: deque[float] = deque(maxlen=NUM_RECENT)  # perf_counter

    def count_end(self, now_s: float) -> None:
        self._ends_s.append(now_s)

    def retry_after_s(self, num_waiting: int, now_s: float) -> float:
        """Seconds until `num_waiting` requests will have left the queue at the recent rate.

        Between MIN_RETRY_S and MAX_RETRY_S; MIN_RETRY_S while nothing is known.
        """
        while self._ends_s and self._ends_s[0] < now_s - RECENT_S:
            self._ends_s.popleft()
        if not self._ends_s:
            return MIN_RETRY_S
        seconds_each = (now_s - self._ends_s[0]) / len(self._ends_s)
        return min(max(num_waiting * seconds_each, MIN_RETRY_S), MAX_RETRY_S)
