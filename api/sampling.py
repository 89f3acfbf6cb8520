"""Sampling fields of a request body -> SamplingParams. Ranges are those of rwkv-rs.

Two differences to it: `temperature = 0` is accepted and greedy, and a missing seed is drawn
here, since the engine's draws depend on (seed, position) alone.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Mapping, Sequence
from typing import ClassVar

import msgspec

from api.errors import invalid
from engine.tokenizer import END_OF_TEXT
from engine.types import SamplingParams

DEFAULT_MAX_TOKENS = 256
MAX_MAX_TOKENS = 2**31 - 1
MIN_TEMPERATURE, MAX_TEMPERATURE = 0.001, 1000.0
MAX_NUM_STOPS = 16
MAX_STOP_CHARS = 1024
MAX_NUM_STOP_TOKENS = 1024
MAX_NUM_BAD_WORDS = 128
MAX_BAD_WORD_CHARS = 256
MAX_NUM_IDS = 262_144  # more than a vocabulary has
MAX_TOKEN_ID = 2**31 - 1
MAX_BIAS = 100.0

Integer = int | float  # JSON Schema counts 1.0 as an integer
Number = int | float


class SamplingFields(msgspec.Struct, kw_only=True):
    """The fields that `/v1/chat/completions` and `/v1/completions` share; null = absent."""

    LEAST_MAX_TOKENS: ClassVar[int] = 1

    max_tokens: Integer | None = None
    max_completion_tokens: Integer | None = None
    temperature: Number | None = None
    top_k: Integer | None = None
    top_p: Number | None = None
    presence_penalty: Number | None = None
    repetition_penalty: Number | None = None
    frequency_penalty: Number | None = None
    penalty_decay: Number | None = None
    stop: str | list[str] | None = None
    seed: Integer | None = None
    min_p: Number | None = None
    min_tokens: Integer | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    include_stop_str_in_output: bool | None = None
    logit_bias: dict[str, Number] | None = None
    allowed_token_ids: list[int] | None = None
    bad_words: list[str] | None = None

    def to_params(self, default_stop: Sequence[str] = ()) -> SamplingParams:
        """Checked parameters. Raises ApiError 400 with the field's name as `param`.

        `default_stop` ends a turn as token 0 ends a document, so `ignore_eos` is about both.
        """
        default = () if self.ignore_eos else tuple(default_stop)
        stop = default if self.stop is None else _stop(self.stop)
        seed = None if self.seed is None else integer("seed", self.seed, -(2**63), 2**64 - 1)
        max_tokens = self._max_tokens()
        return SamplingParams(
            temperature=_temperature(self.temperature),
            top_k=integer("top_k", self.top_k or 0, 0, 2**31 - 1, "0 turns it off"),
            top_p=_share("top_p", self.top_p, 1.0, "0 (greedy) to 1 (off)"),
            min_p=_share("min_p", self.min_p, 0.0, "0 (off) to 1"),
            presence_penalty=_finite("presence_penalty", self.presence_penalty, 0.0),
            repetition_penalty=self._repetition_penalty(),
            penalty_decay=_finite("penalty_decay", self.penalty_decay, 1.0),
            seed=secrets.randbits(63) if seed is None else seed % 2**64,
            max_tokens=max_tokens,
            min_tokens=integer(
                "min_tokens", self.min_tokens or 0, 0, max_tokens, "not more than 'max_tokens'"
            ),
            stop=stop,
            stop_token_ids=self._stop_token_ids(),
            includes_stop=self.include_stop_str_in_output or False,
            logit_bias=_logit_bias(self.logit_bias or {}),
            allowed_token_ids=self._allowed_token_ids(),
            bad_words=_bad_words(self.bad_words or []),
        )

    def _stop_token_ids(self) -> tuple[int, ...]:
        """Those given are in addition to the end of the document."""
        given = self.stop_token_ids or []
        if len(given) > MAX_NUM_STOP_TOKENS:
            raise invalid(
                f"'stop_token_ids' has {len(given)} tokens, at most {MAX_NUM_STOP_TOKENS} are "
                "supported",
                "stop_token_ids",
            )
        _check_ids("stop_token_ids", given)
        always = () if self.ignore_eos else (END_OF_TEXT,)
        return tuple(dict.fromkeys((*always, *given)))

    def _allowed_token_ids(self) -> tuple[int, ...]:
        given = self.allowed_token_ids
        if given is None:
            return ()
        if not 0 < len(given) <= MAX_NUM_IDS:
            raise invalid(
                f"'allowed_token_ids' has {len(given)} tokens, must have from 1 to {MAX_NUM_IDS}; "
                "leave it out to allow all",
                "allowed_token_ids",
            )
        _check_ids("allowed_token_ids", given)
        return tuple(dict.fromkeys(given))

    def _max_tokens(self) -> int:
        either = _alias(
            ("max_tokens", self.max_tokens), ("max_completion_tokens", self.max_completion_tokens)
        )
        name, value = either or ("max_tokens", DEFAULT_MAX_TOKENS)
        return integer(name, value, self.LEAST_MAX_TOKENS, MAX_MAX_TOKENS)

    def _repetition_penalty(self) -> float:
        """RWKV's is additive per further use of a token, which OpenAI calls frequency_penalty."""
        either = _alias(
            ("repetition_penalty", self.repetition_penalty),
            ("frequency_penalty", self.frequency_penalty),
        )
        name, value = either or ("repetition_penalty", 0.0)
        return _finite(name, value, 0.0)


def integer(name: str, value: Integer, low: int, high: int, hint: str = "") -> int:
    """`value` as an int within [low, high]; 3.0 counts as 3."""
    if not math.isfinite(value) or value != int(value) or not low <= value <= high:
        tail = f" ({hint})" if hint else ""
        raise invalid(
            f"{name!r} = {value} must be an integer from {low} to {high}{tail}", param=name
        )
    return int(value)


def _alias(
    first: tuple[str, Number | None], second: tuple[str, Number | None]
) -> tuple[str, Number] | None:
    """The one of two names for the same thing that was given."""
    (name, value), (other_name, other_value) = first, second
    if value is None:
        return None if other_value is None else (other_name, other_value)
    if other_value is not None and other_value != value:
        raise invalid(
            f"{name!r} = {value} and {other_name!r} = {other_value} mean the same here "
            "and differ; send one of them",
            param=other_name,
        )
    return name, value


def _finite(name: str, value: Number | None, default: float) -> float:
    if value is None:
        return default
    if not math.isfinite(value):
        raise invalid(f"{name!r} = {value} must be a finite number", param=name)
    return float(value)


def _temperature(value: Number | None) -> float:
    value = _finite("temperature", value, 1.0)
    if value != 0.0 and not MIN_TEMPERATURE <= value <= MAX_TEMPERATURE:
        raise invalid(
            f"'temperature' = {value} must be 0 (greedy) or from {MIN_TEMPERATURE} "
            f"to {MAX_TEMPERATURE:g}",
            param="temperature",
        )
    return value


def _share(name: str, value: Number | None, default: float, accepted: str) -> float:
    value = _finite(name, value, default)
    if not 0.0 <= value <= 1.0:
        raise invalid(f"{name!r} = {value} must be from {accepted}", param=name)
    return value


def _check_ids(name: str, ids: Sequence[int]) -> None:
    for wrong in (min(ids, default=0), max(ids, default=0)):
        if not 0 <= wrong <= MAX_TOKEN_ID:
            raise invalid(f"{name!r} has the token id {wrong}, which no vocabulary has", name)


def _logit_bias(given: Mapping[str, Number]) -> tuple[tuple[int, float], ...]:
    """JSON has no integers for keys: {"17": -5}."""
    if len(given) > MAX_NUM_IDS:
        raise invalid(f"'logit_bias' has {len(given)} tokens, at most {MAX_NUM_IDS}", "logit_bias")
    biases = []
    for key, bias in given.items():
        if not (key.isascii() and key.isdecimal()) or len(key) > 10 or key != str(int(key)):
            raise invalid(
                f"'logit_bias' has the key {key!r}, must be a token id like \"17\"", "logit_bias"
            )
        if not -MAX_BIAS <= bias <= MAX_BIAS:
            raise invalid(
                f"'logit_bias' of token {key} = {bias} must be from {-MAX_BIAS:g} to {MAX_BIAS:g}",
                "logit_bias",
            )
        biases.append((int(key), float(bias)))
    _check_ids("logit_bias", [token_id for token_id, _ in biases])
    return tuple(biases)


def _bad_words(words: Sequence[str]) -> tuple[str, ...]:
    if len(words) > MAX_NUM_BAD_WORDS:
        raise invalid(
            f"'bad_words' has {len(words)} words, at most {MAX_NUM_BAD_WORDS} are supported",
            "bad_words",
        )
    for word in words:
        if not 0 < len(word) <= MAX_BAD_WORD_CHARS:
            raise invalid(
                f"'bad_words' has a word of {len(word)} characters, must have from 1 to "
                f"{MAX_BAD_WORD_CHARS}",
                "bad_words",
            )
    return tuple(dict.fromkeys(words))


def _stop(stop: str | list[str]) -> tuple[str, ...]:
    stops = (stop,) if isinstance(stop, str) else tuple(stop)
    if len(stops) > MAX_NUM_STOPS:
        raise invalid(
            f"'stop' has {len(stops)} strings, at most {MAX_NUM_STOPS} are supported", param="stop"
        )
    for text in stops:
        if not text:
            raise invalid("'stop' must not contain an empty string; leave it out", param="stop")
        if len(text) > MAX_STOP_CHARS:
            raise invalid(
                f"'stop' has a string of {len(text)} characters, at most {MAX_STOP_CHARS} are "
                "supported",
                param="stop",
            )
    return stops
