"""Response: the answer of one request in the making: its text, mailbox and times.

Knows how tokens become deltas; when they are drawn and when the request ends is decided by
the scheduler and the core.
"""

from __future__ import annotations

from dataclasses import replace

from engine.client import RequestStream
from engine.output import TextOutput, first_bytes
from engine.sequence import Sequence
from engine.state.page import Page
from engine.tokenizer import Tokenizer
from engine.types import (
    EngineRequest,
    FinishReason,
    OutputDelta,
    RequestStats,
    SamplingParams,
    StateInfo,
)


class Response:
    """Times are perf_counter seconds and are passed in, so that one step has one time."""

    def __init__(self, seq: Sequence, stream: RequestStream, tokenizer: Tokenizer) -> None:
        self.seq = seq
        self.stream = stream
        sampling = seq.request.sampling
        self._output = TextOutput(
            tokenizer,
            sampling.stop,
            min_tokens=sampling.min_tokens,
            includes_stop=sampling.includes_stop,
        )
        self._token_bytes = tokenizer.token_bytes
        self._num_shown = 0  # tokens that were handed over
        self._num_earlier_bytes = 0  # of the tokens that were, before it was suspended
        self._has_shown_prompt = False  # its log probabilities
        self.base: Page | None = None  # held: what the state to keep goes on from
        self.seal: Sequence | None = None  # computes the state to keep, after the answer
        self.state: StateInfo | None = None  # what was kept
        self._first_token_s: float | None = None
        self._last_token_s: float | None = None

    @property
    def request_id(self) -> str:
        return self.seq.request.request_id

    @property
    def has_matched_stop(self) -> bool:
        """A stop string was found: the request is to end here."""
        return self._output.matched_stop is not None

    def replay(self) -> str:
        """Be where a suspended answer was; the text that was delivered then."""
        text = "".join(map(self._push, self.seq.output_ids))
        self._num_shown = len(self.seq.output_ids) - self._num_uncertain()
        shown = self.seq.output_ids[: self._num_shown]
        self._num_earlier_bytes = sum(len(self._token_bytes(token_id)) for token_id in shown)
        self._has_shown_prompt = bool(self.seq.output_ids)
        return text

    def seal_request(self, tokenizer: Tokenizer) -> EngineRequest:
        """What computes the state after the last emitted token: a prompt without an answer."""
        request = self.seq.request
        ids = (*request.prompt_ids, *self._kept_ids(tokenizer))
        sampling = SamplingParams(temperature=0.0, max_tokens=0)
        return replace(
            request, prompt_ids=ids, sampling=sampling, snapshot_hints=(), scores_from=None
        )

    def add_token(self, token_id: int, now_s: float) -> float | None:
        """Take a drawn token; deliver text as far as it is safe to show.

        Returns the seconds since the token before, None for the first one.
        """
        gap_s = None if self._last_token_s is None else now_s - self._last_token_s
        self._last_token_s = now_s
        if self._first_token_s is None:
            self._first_token_s = now_s
        self._put(self._push(token_id))
        return gap_s

    def finish(
        self, now_s: float, error: str | None = None, resume_id: str | None = None
    ) -> RequestStats:
        """Deliver the last delta of a finished sequence.

        With `error` it fails after all; with `resume_id` it was suspended, and text that waits
        for more is not given out: it comes when the answer goes on.
        """
        reason = self.seq.finish_reason
        assert reason is not None, f"{self.request_id} is not finished"
        text = ""
        if self.has_matched_stop:
            if reason is not FinishReason.ABORT:  # of the state that was to be kept
                reason = FinishReason.STOP  # also when that token was the last of max_tokens
        elif resume_id is None:
            text = self._output.finish()
        if error is not None:
            reason, self.seq.error = FinishReason.ERROR, error
        self._put(text, reason, resume_id)
        return self._stats(reason, now_s)

    def _push(self, token_id: int) -> str:
        """The text that becomes certain with a token."""
        sampling = self.seq.request.sampling
        if token_id in sampling.stop_token_ids and not sampling.includes_stop:
            return ""
        return self._output.push(token_id)

    def _put(
        self, text: str, reason: FinishReason | None = None, resume_id: str | None = None
    ) -> None:
        seq = self.seq
        has_prompt = bool(seq.prompt_logprobs) and seq.num_computed >= seq.num_prompt_tokens
        has_news = has_prompt and not self._has_shown_prompt
        if not text and reason is None and not has_news:
            return
        is_waiting = reason is None or resume_id is not None
        end = len(seq.output_ids) - (self._num_uncertain() if is_waiting else 0)
        shown = slice(self._num_shown, end)
        num_text_bytes = self._output.num_emitted_bytes - self._num_earlier_bytes
        delta = OutputDelta(
            text=text,
            token_ids=tuple(seq.output_ids[shown]),
            finish_reason=reason,
            matched_stop=None if reason is None else self._output.matched_stop,
            num_prompt_tokens=seq.num_prompt_tokens,
            num_output_tokens=len(seq.output_ids),
            num_cached_tokens=seq.num_cached_tokens,
            error=seq.error if reason is FinishReason.ERROR else None,
            logprobs=tuple(seq.logprobs[shown]) if seq.logprobs else (),
            tops=tuple(seq.tops[shown]) if seq.tops else (),
            prompt_logprobs=tuple(seq.prompt_logprobs) if has_news else (),
            prompt_tops=tuple(seq.prompt_tops) if has_news else (),
            num_text_bytes=max(num_text_bytes, 0),
            num_state_tokens=seq.num_base_tokens,
            state=None if reason is None else self.state,
            resume_id=resume_id,
            hidden=b"" if reason is None else seq.hidden,
        )
        self._num_shown = end
        self._has_shown_prompt = self._has_shown_prompt or has_news
        self.stream.put(delta)

    def _num_uncertain(self) -> int:
        """The newest tokens of which every byte may turn out to belong to a stop string."""
        num_bytes, num_tokens = self._output.num_held_bytes, 0
        if num_bytes == 0:  # nearly always: this runs for each token
            return 0
        for token_id in reversed(self.seq.output_ids):
            if num_bytes <= 0:
                break
            num_bytes -= len(self._token_bytes(token_id))
            num_tokens += num_bytes >= 0
        return num_tokens

    def _stats(self, reason: FinishReason, now_s: float) -> RequestStats:
        submitted_s = self.stream.submitted_s
        admitted_s, first_s = self.seq.admitted_s, self._first_token_s
        return RequestStats(
            finish_reason=reason,
            num_prompt_tokens=self.seq.num_prompt_tokens,
            num_cached_tokens=self.seq.num_cached_tokens,
            num_output_tokens=len(self.seq.output_ids),
            queue_s=None if admitted_s is None else admitted_s - submitted_s,
            prefill_s=None if admitted_s is None or first_s is None else first_s - admitted_s,
            time_to_first_token_s=None if first_s is None else first_s - submitted_s,
            latency_s=now_s - submitted_s,
        )

    def _kept_ids(self, tokenizer: Tokenizer) -> list[int]:
        """The tokens whose text was emitted."""
        sampling = self.seq.request.sampling
        ids = list(self.seq.output_ids)
        if self.has_matched_stop:
            return first_bytes(tokenizer, ids, self._output.num_emitted_bytes)
        if ids and ids[-1] in sampling.stop_token_ids and not sampling.includes_stop:
            ids.pop()
        return ids
