"""Whose turn it is: who gives way to somebody who waits. Knows no slots and no plans."""

from __future__ import annotations

from collections.abc import Iterable

from engine.sequence import Sequence


def choose_victim(
    running: Iterable[Sequence], first: Sequence, time_slice_tokens: int
) -> Sequence | None:
    """Who is to give way to the first in the line: the latest of those of the lowest priority, if
    that is lower; else who of the same priority has had the most of more than a time slice."""
    candidates = list(running)
    rank = first.request.priority
    lower = [seq for seq in candidates if seq.request.priority < rank]
    if lower:
        return min(lower, key=lambda seq: (seq.request.priority, -seq.seq_id))
    due = [
        seq
        for seq in candidates
        if seq.request.priority == rank and 0 < time_slice_tokens <= seq.num_slice_tokens
    ]
    return max(due, key=lambda seq: seq.num_slice_tokens, default=None)
