"""Plain data that crosses the engine's border. Knows neither torch nor HTTP.

Every object here is frozen: what one side hands over, the other side cannot change.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol

import msgspec

# Token ids with the natural logarithms of their probabilities.
TopLogprobs = tuple[tuple[int, float], ...]


class FinishReason(StrEnum):
    """Why a request ended. The first two reach OpenAI clients as they are."""

    STOP = "stop"  # a stop token, a stop string, or no token was left that might be drawn
    LENGTH = "length"  # max_tokens reached
    ABORT = "abort"  # client gone, or drained
    TIMEOUT = "timeout"  # EngineRequest.timeout_s is over
    SUSPENDED = "suspended"  # on disk; OutputDelta.resume_id goes on with it
    ERROR = "error"  # the engine failed the request; OutputDelta.error says how


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How tokens of one request are drawn, in rapid-sampling's order and meaning.

    `logit_bias`, penalties, then whatever may not be drawn is taken out, then temperature,
    softmax, `min_p`, then top-k and top-p together, of what `min_p` has left.
    `presence_penalty` is subtracted from the logit of a token generated once,
    `repetition_penalty` is added to that for each further time (additive, not the
    multiplicative one of other engines), and the sum decays by `penalty_decay` per
    generated token. Prompt tokens are never penalised.

    Log probabilities are those of the model itself, before all of this.
    """

    temperature: float = 1.0  # 0 = greedy
    top_k: int = 0  # 0 = off
    top_p: float = 1.0  # 0 = greedy, 1 = off
    min_p: float = 0.0  # tokens less probable than min_p times the most probable one are left out
    presence_penalty: float = 0.0
    repetition_penalty: float = 0.0
    penalty_decay: float = 1.0
    seed: int = 0  # draws depend on (seed, position) only, 0 <= seed < 2**64
    max_tokens: int = 256
    min_tokens: int = 0  # so many tokens are drawn before one may end the request
    stop: tuple[str, ...] = ()  # removed from the text
    stop_token_ids: tuple[int, ...] = (0,)  # end the request, give no text
    includes_stop: bool = False  # the stop string, or the stop token's text, stays in the text
    logit_bias: tuple[tuple[int, float], ...] = ()  # token ids, each at most once
    allowed_token_ids: tuple[int, ...] = ()  # only these are drawn; none = all
    banned_token_ids: tuple[int, ...] = ()
    # Texts that no run of drawn tokens spells, nor with a space in front: engine/constraints.py.
    bad_words: tuple[str, ...] = ()
    has_logprobs: bool = False  # report the model's log probability of every token drawn
    num_top_logprobs: int = 0  # and of so many of the most probable ones
    candidate_token_ids: tuple[int, ...] = ()  # and of these
    # What the text must match, as engine/grammar_text.py writes it. It ends with token 0, which
    # can be drawn where the grammar allows an end and nowhere else.
    grammar: str | None = None

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0.0 or self.top_p == 0.0 or self.top_k == 1

    @property
    def has_penalties(self) -> bool:
        return self.presence_penalty != 0.0 or self.repetition_penalty != 0.0

    @property
    def has_top_logprobs(self) -> bool:
        return self.num_top_logprobs > 0 or bool(self.candidate_token_ids)


@dataclass(frozen=True, slots=True, kw_only=True)
class StateOptions:
    """How a state that a user asked to keep is filed."""

    label: str = ""
    ttl_s: float | None = None  # from now; None = until it is deleted
    is_pinned: bool = False  # does not expire while it is


@dataclass(frozen=True, slots=True, kw_only=True)
class StateInfo:
    """A state that a user holds. Who has the id and the owner's key may use it."""

    state_id: str
    num_tokens: int  # of the whole text it stands for
    num_bytes: int
    created_unix_s: float
    expires_unix_s: float | None
    label: str
    is_pinned: bool
    has_logits: bool  # an empty prompt can go on from it
    parent_id: str | None  # what it was forked from or continued
    tier: str  # "device", "host" or "disk": the fastest place it lies in


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineRequest:
    """One token stream to compute.

    `prompt_ids` begins with token 0 where it begins a document; it goes on from `state_id` where
    that is given, and may then be empty if the state has logits. `max_tokens = 0` computes the
    prompt only: for its log probabilities, for `keep_state`, or for others to begin from.
    """

    request_id: str
    prompt_ids: tuple[int, ...]
    sampling: SamplingParams = field(default_factory=SamplingParams)
    priority: int = 0  # higher first among the waiting
    timeout_s: float | None = None  # from submission; then FinishReason.TIMEOUT
    cache_salt: str = ""  # states are reused only among requests of the same salt
    # Numbers of prompt tokens after which a snapshot is worth leaving: where messages begin.
    snapshot_hints: tuple[int, ...] = ()
    owner: str = ""  # whose states `state_id` is looked up among and `keep_state` is filed under
    state_id: str | None = None  # a state to go on from
    initial_state: str | None = None  # name of a tuned state that stands for the zero state
    keep_state: StateOptions | None = None  # file the state after the last emitted token
    is_resumable: bool = False  # a graceful stop writes it to disk instead of aborting it
    memo: str = ""  # for whoever submits it; who resumes it is given it back
    # The prompt tokens from this index on get log probabilities, with top ones as `sampling` says;
    # the first one of the prompt never has one. States are reused for what comes before them only.
    scores_from: int | None = None
    # A page of exactly so many prompt tokens is looked for too, wherever prompts are cut: siblings
    # that part there begin from the end of the prompt that they have in common.
    branch_at: int | None = None
    # The answer is the last prompt token's row of the model, after ln_out: with max_tokens = 0.
    returns_hidden: bool = False
    is_bound: bool = False  # while it waits, it is not handed over to another engine


# One is made for each token: a Struct, which is made four times as fast as a frozen dataclass.
class OutputDelta(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """What a request produced since its reader last looked.

    `text` is complete UTF-8 and never holds part of a stop string; it may be empty in the last
    delta, and in the one with the `prompt_logprobs`, which come together and before any token.
    Exactly one delta per request has a `finish_reason`, and it is the last.

    `token_ids` are those of which some byte is certain to be text, in the last delta also those
    that stopped it: `num_text_bytes` says where among the bytes of all tokens the text ends.
    """

    text: str = ""
    token_ids: tuple[int, ...] = ()
    finish_reason: FinishReason | None = None
    matched_stop: str | None = None  # the stop string that ended it
    num_prompt_tokens: int = 0
    num_output_tokens: int = 0  # so far, stop token included
    num_cached_tokens: int = 0  # of the prompt, taken from a snapshot
    error: str | None = None
    logprobs: tuple[float, ...] = ()  # one per token id, if the request asked for them
    # Per token id, if asked for: `num_top_logprobs`, the most probable first, then candidates.
    tops: tuple[TopLogprobs, ...] = ()
    # Of the prompt from `scores_from` on, if asked for, without its first token; and their tops.
    prompt_logprobs: tuple[float, ...] = ()
    prompt_tops: tuple[TopLogprobs, ...] = ()
    num_text_bytes: int = 0  # of all token ids so far; without what ended the request
    num_state_tokens: int = 0  # of the state that the prompt went on from
    state: StateInfo | None = None  # in the last delta: what `keep_state` filed
    resume_id: str | None = None  # in the last delta: what `resume` goes on with
    hidden: bytes = b""  # in the last delta: what `returns_hidden` asked for, native float32


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInfo:
    """What a replica serves, for the start-up line, /v1/models and /health."""

    model_name: str
    num_parameters: int
    device: str
    dtype: str
    state_dtype: str
    num_slots: int  # usable ones; the zero page is not counted
    page_bytes: int  # one state, all layers
    vocab_size: int
    fingerprint: str
    max_batch_size: int
    max_batch_tokens: int
    paragraph_len: int
    max_context_len: int
    initial_states: tuple[str, ...] = ()  # names of tuned states that requests may begin from
    num_frames: int = 0  # states in host memory
    num_files: int = 0  # states on disk at most


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveLimits:
    """The limits that can change between two steps, without a new replica."""

    decode_first: bool
    max_batch_tokens: int
    max_waiting: int
    max_context_len: int
    rejects_long_context: bool = True  # False: max_context_len is only reported
    time_slice_tokens: int = 0  # an answer gives way to the waiting after so many; 0 = never


@dataclass(frozen=True, slots=True, kw_only=True)
class StepStats:
    """One committed step."""

    duration_s: float
    num_decode_rows: int
    num_prefill_rows: int
    num_prefill_tokens: int
    inter_token_s: tuple[float, ...] = ()  # one per sequence that got a further token


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestStats:
    """One finished request. Times are seconds; None where the request never got so far."""

    finish_reason: FinishReason
    num_prompt_tokens: int
    num_cached_tokens: int
    num_output_tokens: int
    queue_s: float | None
    prefill_s: float | None
    time_to_first_token_s: float | None
    latency_s: float


class StatsSink(Protocol):
    """Where the engine sends its stats; api/metrics.py is the one that knows Prometheus."""

    def on_step(self, stats: StepStats) -> None: ...

    def on_request(self, stats: RequestStats) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheStats:
    """The prefix cache: counters since the replica began, and the snapshots it holds now."""

    num_queried_tokens: int = 0  # prompt tokens of the admitted sequences
    num_hit_tokens: int = 0  # those of them that were taken from a snapshot
    num_evictions: int = 0  # snapshots given up for room
    num_snapshots: int = 0  # findable ones, in whatever tier
    num_device_pages: int = 0  # snapshots, not those of running sequences
    num_host_pages: int = 0  # copies in host memory, swapped sequences included
    num_disk_pages: int = 0
    num_stores: int = 0  # pages copied from the device to the host
    num_loads: int = 0  # and back
    num_disk_writes: int = 0
    num_disk_reads: int = 0
    num_preemptions: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSnapshot:
    """Gauges, taken when somebody asks."""

    num_running: int
    num_waiting: int
    num_slots: int
    num_free_slots: int  # empty, or holding a snapshot that gives way to a new sequence
    cache: CacheStats = CacheStats()
    is_accepting: bool
    is_dead: bool
    seconds_since_commit: float | None  # None when nothing is in flight
    death: str | None = None  # why it is dead
