"""Response: the answer of one request in the making: its text, mailbox and times.

Knows how tokens become deltas; when they are drawn and when the request ends is decided by
the scheduler and the core.
"""

from __future__ import annotations

from engine.client import RequestStream
from engine.output import TextOutput
from engine.sequence import Sequence
from engine.tokenizer import Tokenizer
from engine.types import FinishReason, OutputDelta, RequestStats


class Response:
    """Times are perf_counter seconds and are passed in, so that one step has one time."""

    def __init__(self, seq: Sequence, stream: RequestStream, tokenizer: Tokenizer) -> None:
        self.seq = seq
        self.stream = stream
        self._output = TextOutput(tokenizer, seq.request.sampling.stop)
        self._held_ids: list[int] = []  # tokens whose text cannot be shown yet
        self._first_token_s: float | None = None
        self._last_token_s: float | None = None

    @property
    def request_id(self) -> str:
        return self.seq.request.request_id

    @property
    def has_matched_stop(self) -> bool:
        """A stop string was found: the request is to end here."""
        return self._output.matched_stop is not None

    def add_token(self, token_id: int, now_s: float) -> float | None:
        """Take a drawn token; deliver text as far as it is safe to show.

        Returns the seconds since the token before, None for the first one.
        """
        gap_s = None if self._last_token_s is None else now_s - self._last_token_s
        self._last_token_s = now_s
        if self._first_token_s is None:
            self._first_token_s = now_s
        self._held_ids.append(token_id)
        if token_id not in self.seq.request.sampling.stop_token_ids:
            self._put(self._output.push(token_id))
        return gap_s

    def finish(self, now_s: float) -> RequestStats:
        """Deliver the last delta of a finished sequence."""
        reason = self.seq.finish_reason
        assert reason is not None, f"{self.request_id} is not finished"
        text = ""
        if self.has_matched_stop:
            reason = FinishReason.STOP  # also when that token was the last of max_tokens
        else:
            text = self._output.finish()
        self._put(text, reason)
        return self._stats(reason, now_s)

    def _put(self, text: str, reason: FinishReason | None = None) -> None:
        if not text and reason is None:
            return
        seq = self.seq
        delta = OutputDelta(
            text=text,
            token_ids=tuple(self._held_ids),
            finish_reason=reason,
            matched_stop=None if reason is None else self._output.matched_stop,
            num_prompt_tokens=seq.num_prompt_tokens,
            num_output_tokens=len(seq.output_ids),
            num_cached_tokens=seq.num_cached_tokens,
            error=seq.error if reason is FinishReason.ERROR else None,
        )
        self._held_ids.clear()
        self.stream.put(delta)

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
