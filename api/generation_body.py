"""GenerationBody: the fields that both completion routes understand, and which go together.

Knows neither messages nor prompts; those are in api/schemas.py.
"""

from __future__ import annotations

import re

import msgspec

from api.errors import invalid
from api.sampling import Integer, integer
from api.states import StateFields
from api.structured import StructuredFields
from engine.types import StateOptions

MAX_NUM_CHOICES = 128
MAX_PRIORITY = 1000
# Everything else was said when the generation began.
ALLOWED_WITH_RESUME = frozenset({"model", "stream", "stream_options", "resume", "request_id"})
MAX_TIMEOUT_MS = 2**31 - 1
REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")


class StreamOptions(msgspec.Struct, kw_only=True):
    include_usage: bool | None = None


class GenerationBody(StructuredFields, kw_only=True):
    """What both completion routes understand; null = absent."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    cache_salt: str | None = None  # states are reused only among requests of the same salt
    n: Integer | None = None
    priority: Integer | None = None  # higher goes first, and may take the place of a lower one
    state: str | None = None  # id of a kept state to go on from
    initial_state: str | None = None  # name of a tuned state to begin with
    return_state: bool | StateFields | None = None  # keep the state at the end of the answer
    resumable: bool | None = None  # a graceful stop suspends it instead of ending it
    resume: str | None = None  # id of a suspended generation to go on with
    timeout_ms: Integer | None = None  # from when it is queued
    request_id: str | None = None  # the answer's id ends in it
    return_token_ids: bool | None = None
    candidate_token_texts: list[str] | None = None  # tokens to be told the log probability of

    @property
    def has_usage_chunk(self) -> bool:
        options = self.stream_options
        return options is not None and options.include_usage is True

    @property
    def rank(self) -> int:
        return integer("priority", self.priority or 0, -MAX_PRIORITY, MAX_PRIORITY)

    @property
    def num_choices(self) -> int:
        return integer("n", 1 if self.n is None else self.n, 1, MAX_NUM_CHOICES)

    @property
    def num_candidates(self) -> int:
        """Answers to compute to a prompt; the best `num_choices` of them are returned."""
        return self.num_choices

    @property
    def num_prompts(self) -> int:
        return 1

    @property
    def num_top_logprobs(self) -> int | None:
        """How many of the most probable tokens are told of at each token; None: no logprobs."""
        return None

    @property
    def echoes(self) -> bool:
        """The answer begins with the prompt."""
        return False

    @property
    def timeout_s(self) -> float | None:
        if self.timeout_ms is None:
            return None
        return integer("timeout_ms", self.timeout_ms, 1, MAX_TIMEOUT_MS) / 1000

    def keep_state(self, default_ttl_s: float) -> StateOptions | None:
        """How the state at the end is to be filed, where one is asked for."""
        asked = self.return_state
        if not asked:
            return None
        fields = StateFields() if asked is True else asked
        return fields.options(default_ttl_s)

    def check(self) -> None:
        """Raise ApiError 400 for fields that do not go together."""
        if self.stream_options is not None and not self.stream:
            raise invalid(
                "'stream_options' is only allowed with 'stream': true", param="stream_options"
            )
        if isinstance(self.return_state, StateFields):
            self.return_state.check_filing("return_state.")
        self._check_resume()
        if self.state is not None and self.initial_state is not None:
            raise invalid(
                "'initial_state' is what a text begins with, and 'state' is the middle of one; "
                "send one of them",
                "initial_state",
            )
        if self.num_prompts * self.num_candidates > 1:
            self._check_single()
        num_top_logprobs = self.num_top_logprobs
        if self.candidate_token_texts and num_top_logprobs is None:
            raise invalid(
                "'candidate_token_texts' goes with 'logprobs' only", "candidate_token_texts"
            )
        if self.request_id is not None and not REQUEST_ID.fullmatch(self.request_id):
            raise invalid(
                f"'request_id' = {self.request_id!r} must be 1 to 128 letters, digits or any of "
                ". _ : -",
                "request_id",
            )

    def _check_single(self) -> None:
        for name in ("return_state", "resumable"):
            if getattr(self, name):
                raise invalid(
                    f"{name!r} works for one answer, and "
                    f"{self.num_prompts * self.num_candidates} are asked for; send one prompt "
                    "without 'n' and 'best_of' (afterwards, POST /v1/states with 'response' and "
                    "'choice' keeps the state of any answer)",
                    name,
                )

    def _check_resume(self) -> None:
        if self.resume is None:
            return
        for name in self.__struct_fields__:
            # Clients that insist on a prompt send an empty one.
            is_given = getattr(self, name) not in (None, "", [])
            if is_given and name not in ALLOWED_WITH_RESUME:
                allowed = ", ".join(sorted(ALLOWED_WITH_RESUME))
                raise invalid(
                    f"{name!r} was settled when the generation began, and 'resume' only goes on "
                    f"with it; leave it out (it takes {allowed})",
                    name,
                )
