"""RunningRequests: what is being answered, so that its owner can end it by its id.

Knows no route and no engine; `abort` is whatever ends the work of one HTTP request.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from api.errors import cancelled, invalid
from api.lifetime import Lifetime


class RunningRequest:
    """One HTTP request at work, under each of its ids."""

    def __init__(self, owner: str, ids: frozenset[str], abort: Callable[[], None]) -> None:
        self.owner = owner
        self.ids = ids
        self.is_cancelled = False
        self._abort = abort

    def cancel(self) -> None:
        self.is_cancelled = True
        self._abort()

    def check(self) -> None:
        """Raise ApiError where it was cancelled: for work that is nothing without its end."""
        if self.is_cancelled:
            raise cancelled()


class RunningRequests:
    """Ids may come twice, as clients choose X-Request-Id; then they name both."""

    def __init__(self) -> None:
        self._requests: set[RunningRequest] = set()

    def __len__(self) -> int:
        return len(self._requests)

    def check_new(self, owner: str, answer_id: str, request_id: str) -> None:
        """Raise ApiError 400 where an answer of that id, which the owner chose, is running."""
        if any(answer_id in one.ids for one in self._of(owner)):
            raise invalid(
                f"'request_id' = {request_id!r} is that of a request that is running", "request_id"
            )

    def enter(
        self, lifetime: Lifetime, abort: Callable[[], None], *more_ids: str | None
    ) -> RunningRequest:
        """Until the end of the lifetime `abort` may be called, at most once.

        It is known by the id of the HTTP request, and by others.
        """
        ids = frozenset(filter(None, (lifetime.request_id, *more_ids)))
        request = RunningRequest(lifetime.owner, ids, abort)
        self._requests.add(request)
        lifetime.on_end(lambda: self._requests.discard(request))
        return request

    def cancel(self, owner: str, ids: Iterable[str]) -> list[str]:
        """End those of an owner. Returns which of the ids were known, in their order."""
        found = []
        for wanted in dict.fromkeys(ids):
            named = [one for one in self._of(owner) if wanted in one.ids]
            if named:
                found.append(wanted)
            self._cancel(named)
        return found

    def cancel_all(self, owner: str) -> int:
        """End all of an owner's. Returns how many there were."""
        return self._cancel(self._of(owner))

    def _of(self, owner: str) -> list[RunningRequest]:
        return [one for one in self._requests if one.owner == owner]

    def _cancel(self, requests: Iterable[RunningRequest]) -> int:
        going = [one for one in requests if not one.is_cancelled]
        for one in going:
            one.cancel()
        return len(going)
