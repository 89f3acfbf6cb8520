"""PrefillOwners: who is computing which beginning of a prompt. Knows neither slots nor pages.

Prompts with a common beginning that arrive together compute it once: the first computes, the
others wait for the snapshot that it is asked to leave where they part from it.
"""

from __future__ import annotations

from engine.sequence import Awaited, Sequence, SequenceStatus


class PrefillOwners:
    """Links of the prompts of running sequences, each with one sequence that comes by there."""

    def __init__(self, paragraph_len: int) -> None:
        self._paragraph_len = paragraph_len
        self._owners: dict[bytes, Sequence] = {}

    def add(self, seq: Sequence) -> None:
        """A sequence begins; links that another is still to pass stay with that one."""
        for depth in range(seq.num_cached_tokens // self._paragraph_len + 1, len(seq.chain)):
            self._own(seq, seq.chain[depth], depth * self._paragraph_len)
        self._own(seq, seq.end_digest, seq.num_prompt_tokens)

    def remove(self, seq: Sequence) -> None:
        for digest in (*seq.chain, seq.end_digest):
            if self._owners.get(digest) is seq:
                del self._owners[digest]

    def ask(self, seq: Sequence, least: int) -> Awaited | None:
        """Who will pass the deepest boundary of this prompt, at `least` tokens or beyond.

        That one is asked to leave a snapshot there. The end of an equal prompt is best: nothing
        is left to compute then.
        """
        num_prompt, most = seq.num_prompt_tokens, seq.max_reused_tokens
        owner = self._owners.get(seq.end_digest) if most == num_prompt else None
        if owner is not None and _is_equal(owner, seq) and _may_leave(owner, num_prompt):
            owner.expects_end = True
            return Awaited(owner, num_prompt)
        first = -(-least // self._paragraph_len)
        if first >= len(seq.chain) or seq.chain[first] not in self._owners:
            return None  # most prompts: whoever owns a deeper link owns this one
        for depth in range(min(num_prompt - 1, most) // self._paragraph_len, 0, -1):
            boundary = depth * self._paragraph_len
            if boundary < least:
                break
            owner = self._owners.get(seq.chain[depth])
            if owner is not None and _may_leave(owner, boundary):
                owner.stops.add(boundary)
                return Awaited(owner, boundary)
        return None

    def _own(self, seq: Sequence, digest: bytes, num_tokens: int) -> None:
        owner = self._owners.get(digest)
        if owner is None or not _may_leave(owner, num_tokens):
            self._owners[digest] = seq

    def check(self, running: list[Sequence]) -> None:
        """Raise AssertionError if any invariant is broken."""
        gone = {seq.seq_id for seq in self._owners.values()} - {seq.seq_id for seq in running}
        assert not gone, f"sequences {gone} have ended and still own a beginning"


def is_awaiting(seq: Sequence) -> bool:
    """What the sequence waits to begin from is still to come."""
    return seq.awaited is not None and _may_leave(seq.awaited.owner, seq.awaited.num_tokens)


def _may_leave(owner: Sequence, num_tokens: int) -> bool:
    """The snapshot after `num_tokens` tokens of its prompt is still to come from this sequence."""
    is_ahead = num_tokens >= owner.num_planned
    is_left = any(frozen.num_tokens == num_tokens for frozen in owner.frozen)
    return owner.status is SequenceStatus.RUNNING and (is_ahead or is_left)


def _is_equal(owner: Sequence, seq: Sequence) -> bool:
    """The prompts are the same; else one's end is a boundary that the other comes by."""
    return owner.end_digest == seq.end_digest
