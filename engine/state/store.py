"""StateStore: the states that users hold, by id. Knows pages, not where they lie.

An id is 128 random bits: who has it and the owner's key may use the state. What is known of a
state beside its tensors goes into a record on disk, written after the page's file is there, so
that a record never promises what is not.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from secrets import token_urlsafe
from time import time

import msgspec

from engine.errors import InvalidRequest, StateNotFound, StatesFull
from engine.state.cache import StateCache
from engine.state.page import DeleteRecord, DiskJob, DiskResult, Page, WriteFile, WriteRecord
from engine.types import EngineRequest, StateInfo, StateOptions

logger = logging.getLogger(__name__)

ID_PREFIX = "state-"
ID_BYTES = 16
MAX_IDS = 100_000  # ids cost little, but not nothing
FORMAT = 1


@dataclass(slots=True)
class KeptState:
    state_id: str
    owner: str
    page: Page
    created_unix_s: float
    expires_unix_s: float | None
    label: str
    is_pinned: bool
    parent_id: str | None
    has_record: bool = False


@dataclass(frozen=True, slots=True)
class StateRecord:
    """What is on disk about a state, as JSON; `digest` in base64 names the file of its page."""

    format: int
    owner: str
    digest: bytes
    created_unix_s: float
    expires_unix_s: float | None
    label: str
    is_pinned: bool
    parent_id: str | None


class StateStore:
    """Every method sees only what has not expired. `capacity` counts different pages."""

    def __init__(
        self,
        cache: StateCache,
        *,
        page_bytes: int,
        capacity: int,
        has_disk: bool,
        tuned: Mapping[str, Page] | None = None,
        clock: Callable[[], float] = time,
    ) -> None:
        """`tuned`: initial states by name, which everybody may begin from."""
        self.capacity = capacity
        self._tuned = dict(tuned or {})
        self._cache = cache
        self._page_bytes = page_bytes
        self._has_disk = has_disk
        self._clock = clock
        self._states: dict[str, KeptState] = {}
        self._num_ids: dict[Page, int] = {}
        self._jobs: list[DiskJob] = []

    def __len__(self) -> int:
        return len(self._states)

    def check_room(self, num_coming: int) -> None:
        """Raise StatesFull unless `num_coming` states more, on their way, still leave room."""
        self.sweep()
        num_pages = len(self._num_ids)
        num_frames = self._cache.tiers.num_frames_available
        if num_pages + num_coming >= self.capacity:
            where = "disk_state_mib" if self._has_disk else "host_state_mib"
            raise StatesFull(
                f"{num_pages} states are kept and {num_coming} on their way, of {self.capacity}"
                f" that fit: delete some, or raise {where}"
            )
        if num_frames <= num_coming + 1:
            raise StatesFull(
                "host memory for states is full of what cannot leave it: try again, delete some"
                " states, or raise host_state_mib"
            )
        if len(self._states) + num_coming >= MAX_IDS:
            raise StatesFull(f"{MAX_IDS} state ids are in use: delete some")

    def put(
        self, owner: str, page: Page, options: StateOptions, parent_id: str | None
    ) -> KeptState:
        """File a page under a new id. The caller's hold on it goes over."""
        now = self._clock()
        state = KeptState(
            state_id=ID_PREFIX + token_urlsafe(ID_BYTES),
            owner=owner,
            page=page,
            created_unix_s=now,
            expires_unix_s=None if options.ttl_s is None else now + options.ttl_s,
            label=options.label,
            is_pinned=options.is_pinned,
            parent_id=parent_id,
        )
        self._add(state)
        self._record(state)
        return state

    def find(self, owner: str, state_id: str) -> KeptState:
        """Raises StateNotFound."""
        state = self._states.get(state_id)
        if state is not None and self._is_over(state):
            self._forget(state)
            state = None
        if state is None or state.owner != owner:
            raise StateNotFound(
                f"there is no state {state_id!r} for this API key; it may have expired or been"
                " deleted",
                "state",
            )
        return state

    def base_of(self, request: EngineRequest) -> Page | None:
        """The page that a prompt goes on from, by id or by name. Raises InvalidRequest."""
        if request.state_id is not None:
            return self.find(request.owner, request.state_id).page
        if request.initial_state is None:
            return None
        if request.initial_state not in self._tuned:
            raise InvalidRequest(
                f"initial_state = {request.initial_state!r} is not served here; there are:"
                f" {', '.join(self._tuned) or 'none'}",
                "initial_state",
            )
        return self._tuned[request.initial_state]

    def owned_by(self, owner: str) -> list[KeptState]:
        """Newest first."""
        self.sweep()
        found = [state for state in reversed(self._states.values()) if state.owner == owner]
        # Those found on a disk come in any order.
        return sorted(found, key=lambda state: state.created_unix_s, reverse=True)

    def fork(self, owner: str, state_id: str, options: StateOptions) -> KeptState:
        parent = self.find(owner, state_id)
        if len(self._states) >= MAX_IDS:
            raise StatesFull(f"{MAX_IDS} state ids are in use: delete some")
        self._cache.tiers.hold(parent.page)
        return self.put(owner, parent.page, options, parent.state_id)

    def update(
        self,
        owner: str,
        state_id: str,
        *,
        label: str | None = None,
        is_pinned: bool | None = None,
        ttl_s: float | None = None,
    ) -> KeptState:
        """Change what is given; a `ttl_s` of infinity takes the end away."""
        state = self.find(owner, state_id)
        if label is not None:
            state.label = label
        if is_pinned is not None:
            state.is_pinned = is_pinned
        if ttl_s is not None:
            is_endless = ttl_s == float("inf")
            state.expires_unix_s = None if is_endless else self._clock() + ttl_s
        state.has_record = False
        self._record(state)
        return state

    def delete(self, owner: str, state_id: str) -> None:
        self._forget(self.find(owner, state_id))

    def sweep(self) -> None:
        """Let go of what has expired."""
        for state in [state for state in self._states.values() if self._is_over(state)]:
            self._forget(state)

    def info(self, state: KeptState) -> StateInfo:
        return StateInfo(
            state_id=state.state_id,
            num_tokens=state.page.num_tokens,
            num_bytes=self._page_bytes,
            created_unix_s=state.created_unix_s,
            expires_unix_s=None if state.is_pinned else state.expires_unix_s,
            label=state.label,
            is_pinned=state.is_pinned,
            has_logits=state.page.has_logits,
            parent_id=state.parent_id,
            tier=state.page.tier,
        )

    # Disk

    def restore(self, records: Mapping[str, bytes]) -> None:
        """Take up the states of an earlier process, or of another replica, that are not known."""
        for name, data in records.items():
            if not name.startswith(ID_PREFIX) or name in self._states:
                continue
            state = self._parse(name, data)
            if state is None or self._is_over(state):
                self._jobs.append(DeleteRecord(name))
                continue
            self._cache.tiers.hold(state.page)
            self._add(state)

    def finish_job(self, result: DiskResult) -> None:
        """A page was written: records that have waited for it can be. What could not be written
        waits for the next page that is, or for `retry`."""
        job = result.job
        if isinstance(job, WriteRecord) and result.error is not None and job.name in self._states:
            self._states[job.name].has_record = False
        if isinstance(job, WriteFile) and result.error is None:
            self.retry()

    def retry(self) -> None:
        """Have written what is not, because of a full disk say; of pages one, after which comes
        the next."""
        for state in self._states.values():
            if not state.has_record:
                self._record(state)
        page = next((page for page in self._num_ids if not page.has_file), None)
        if page is not None and self._has_disk:
            self._cache.tiers.keep_safe(page)

    def take_jobs(self) -> list[DiskJob]:
        jobs, self._jobs = self._jobs, []
        return jobs

    @property
    def is_saved(self) -> bool:
        """Everything that can be on disk has been handed to its worker."""
        return not self._has_disk or all(state.has_record for state in self._states.values())

    def _add(self, state: KeptState) -> None:
        self._states[state.state_id] = state
        self._num_ids[state.page] = self._num_ids.get(state.page, 0) + 1

    def _forget(self, state: KeptState) -> None:
        """What a user has given up is not left lying about for others to begin from."""
        del self._states[state.state_id]
        if self._has_disk:  # also where an older record was to be replaced
            self._jobs.append(DeleteRecord(state.state_id))
        self._num_ids[state.page] -= 1
        if self._num_ids[state.page] == 0:
            del self._num_ids[state.page]
        self._cache.let_go(state.page, drops=True)

    def _is_over(self, state: KeptState) -> bool:
        if not state.page.exists:
            return True  # its file could not be read back
        is_due = state.expires_unix_s is not None and state.expires_unix_s <= self._clock()
        return is_due and not state.is_pinned

    def _record(self, state: KeptState) -> None:
        if not self._has_disk or not state.page.has_file:
            return
        state.has_record = True
        record = StateRecord(
            format=FORMAT,
            owner=state.owner,
            digest=state.page.digest,
            created_unix_s=state.created_unix_s,
            expires_unix_s=state.expires_unix_s,
            label=state.label,
            is_pinned=state.is_pinned,
            parent_id=state.parent_id,
        )
        self._jobs.append(WriteRecord(state.state_id, msgspec.json.encode(record)))

    def _parse(self, name: str, data: bytes) -> KeptState | None:
        """The state that a record describes; None, with a line in the log, if it is no use."""
        try:
            record = msgspec.json.decode(data, type=StateRecord)
        except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
            logger.warning("the record of %s is given up: %s", name, error)
            return None
        page = self._cache.index.get(record.digest)
        if record.format != FORMAT or page is None:
            logger.warning("the record of %s is given up: its page is not there", name)
            return None
        return KeptState(
            state_id=name,
            owner=record.owner,
            page=page,
            created_unix_s=record.created_unix_s,
            expires_unix_s=record.expires_unix_s,
            label=record.label,
            is_pinned=record.is_pinned,
            parent_id=record.parent_id,
            has_record=True,
        )
