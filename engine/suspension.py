"""Suspension: generations that are written to disk at a graceful stop and go on after a restart.

What the model knows is a page. What else a generation is made of is its request and the tokens
it has drawn: the draws depend on seed and position, penalties and pending text on the tokens.
Both are made again from them, so the record holds no other state.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from secrets import token_bytes, token_urlsafe
from time import time

import msgspec

from engine.errors import StateNotFound
from engine.sequence import Sequence, SequenceStatus
from engine.state.cache import StateCache
from engine.state.page import (
    DeleteRecord,
    DiskJob,
    DiskResult,
    Page,
    WriteFile,
    WriteRecord,
)
from engine.types import EngineRequest, TopLogprobs

logger = logging.getLogger(__name__)

ID_PREFIX = "gen-"
ID_BYTES = 16
FORMAT = 1
KEPT_FOR_S = 7 * 86_400.0  # then nobody will come for it any more
PAGE_DIGEST_BYTES = 16


@dataclass(frozen=True, slots=True)
class SuspendedRecord:
    """A generation on disk, as JSON. Without a `page_digest` it had not begun."""

    format: int
    request: EngineRequest
    max_tokens: int
    page_digest: bytes | None
    base_digest: bytes
    num_base_tokens: int
    num_computed: int
    num_cached_tokens: int
    output_ids: list[int]
    logprobs: list[float]
    suspended_unix_s: float
    tops: list[TopLogprobs] = field(default_factory=list)
    prompt_logprobs: list[float] = field(default_factory=list)
    prompt_tops: list[TopLogprobs] = field(default_factory=list)


@dataclass(slots=True)
class _Leaving:
    """On its way. The record is written when its page is in a file."""

    seq: Sequence
    record: SuspendedRecord | None = None
    is_recorded: bool = False


@dataclass(slots=True)
class _Held:
    record: SuspendedRecord
    page: Page | None


class Suspensions:
    """Generations on their way to the disk, and those that wait there."""

    def __init__(self, cache: StateCache) -> None:
        self._cache = cache
        self._leaving: dict[str, _Leaving] = {}  # set aside; by id
        self._held: dict[str, _Held] = {}
        self._jobs: list[DiskJob] = []

    def begin(self, seq: Sequence) -> str:
        """Take a sequence that waits, or was swapped out, off to the disk. Returns its id."""
        resume_id = ID_PREFIX + token_urlsafe(ID_BYTES)
        if seq.parked is not None:
            if not seq.parked.digest:  # else it has a file from an earlier time
                seq.parked.digest = token_bytes(PAGE_DIGEST_BYTES)
            self._cache.tiers.keep_safe(seq.parked)
        self._leaving[resume_id] = _Leaving(seq)
        return resume_id

    def has(self, seq: Sequence) -> bool:
        return any(one.seq is seq for one in self._leaving.values())

    def settle(self) -> list[tuple[str, Sequence]]:
        """Ids and sequences that are on disk, page and record, by now."""
        done = []
        for resume_id, one in list(self._leaving.items()):
            if one.seq.is_finished:
                self._give_up(resume_id)
            elif one.is_recorded and one.record is not None:
                del self._leaving[resume_id]
                page, one.seq.parked = one.seq.parked, None  # held from here on
                self._held[resume_id] = _Held(one.record, page)
                done.append((resume_id, one.seq))
            elif one.record is None and _is_on_disk(one.seq):
                one.record = _record_of(one.seq)
                self._jobs.append(WriteRecord(resume_id, msgspec.json.encode(one.record)))
        return done

    def take_lost(self) -> list[Sequence]:
        """Those whose page was lost on its way; nothing is left to go on from."""
        return [
            self._give_up(resume_id)
            for resume_id, one in list(self._leaving.items())
            if one.seq.parked is not None and not one.seq.parked.exists
        ]

    def finish_job(self, result: DiskResult) -> Sequence | None:
        """A page or a record was written; or it was not, then the sequence that cannot leave."""
        for resume_id, one in self._leaving.items():
            page, job = one.seq.parked, result.job
            is_page = isinstance(job, WriteFile) and page and page.digest == job.file.digest
            is_record = isinstance(job, WriteRecord) and job.name == resume_id
            if result.error is not None and (is_page or is_record):
                return self._give_up(resume_id)
            one.is_recorded |= is_record
        return None

    def _give_up(self, resume_id: str) -> Sequence:
        one = self._leaving.pop(resume_id)
        if one.record is not None:
            self._jobs.append(DeleteRecord(resume_id))
        return one.seq

    def take(self, resume_id: str, owner: str, request_id: str, seq_id: int) -> Sequence:
        """The sequence to go on with, under a new request id. Raises StateNotFound."""
        held = self._held.get(resume_id)
        is_lost = held is not None and held.page is not None and not held.page.exists
        if held is None or is_lost or held.record.request.owner != owner:
            raise StateNotFound(
                f"there is no suspended generation {resume_id!r} for this API key; it may have"
                " been resumed already",
                "resume",
            )
        del self._held[resume_id]
        self._jobs.append(DeleteRecord(resume_id))
        return _sequence_of(held, request_id, seq_id)

    def restore(self, records: Mapping[str, bytes]) -> None:
        """Take up what an earlier process has suspended."""
        for name, data in records.items():
            if not name.startswith(ID_PREFIX) or name in self._held or name in self._leaving:
                continue
            try:
                record = msgspec.json.decode(data, type=SuspendedRecord)
            except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
                logger.warning("the suspended generation %s is given up: %s", name, error)
                self._jobs.append(DeleteRecord(name))
                continue
            page = self._cache.index.get(record.page_digest) if record.page_digest else None
            is_gone = record.page_digest is not None and page is None
            if is_gone or record.format != FORMAT or time() > record.suspended_unix_s + KEPT_FOR_S:
                logger.warning("the suspended generation %s is given up: too old or lost", name)
                self._jobs.append(DeleteRecord(name))
                continue
            if page is not None:
                self._cache.tiers.hold(page)
            self._held[name] = _Held(record, page)

    def take_jobs(self) -> list[DiskJob]:
        jobs, self._jobs = self._jobs, []
        return jobs


def _is_on_disk(seq: Sequence) -> bool:
    return seq.is_settled and (seq.parked is None or seq.parked.has_file)


def _record_of(seq: Sequence) -> SuspendedRecord:
    return SuspendedRecord(
        format=FORMAT,
        request=seq.request,
        max_tokens=seq.max_tokens,
        page_digest=None if seq.parked is None else seq.parked.digest,
        base_digest=b"" if seq.base is None else seq.base.digest,
        num_base_tokens=seq.num_base_tokens,
        num_computed=seq.num_computed,
        num_cached_tokens=seq.num_cached_tokens,
        output_ids=seq.output_ids,
        logprobs=seq.logprobs,
        suspended_unix_s=time(),
        tops=seq.tops,
        prompt_logprobs=seq.prompt_logprobs,
        prompt_tops=seq.prompt_tops,
    )


def _sequence_of(held: _Held, request_id: str, seq_id: int) -> Sequence:
    """As it was: swapped out, its state being in a page."""
    record = held.record
    request = replace(record.request, request_id=request_id)
    seq = Sequence(seq_id, request, record.max_tokens)
    if held.page is None:
        return seq
    if record.base_digest:
        # Only the name of what it once began from is needed, to find its snapshots.
        seq.base = Page(record.base_digest, record.num_base_tokens, num_holders=1)
        seq.num_base_tokens = record.num_base_tokens
    seq.status = SequenceStatus.SWAPPED
    seq.parked = held.page
    seq.num_planned = seq.num_computed = record.num_computed
    seq.num_cached_tokens = record.num_cached_tokens
    seq.output_ids = list(record.output_ids)
    seq.logprobs, seq.tops = list(record.logprobs), list(record.tops)
    seq.prompt_logprobs = list(record.prompt_logprobs)
    seq.prompt_tops = list(record.prompt_tops)
    return seq
