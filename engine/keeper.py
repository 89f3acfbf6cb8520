"""StateKeeper: what users do with states, on the event loop. An engine.client.States.

Copies between tiers are made by the plans of the engine, files by threads; this only waits.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from engine.errors import EngineDead, InvalidRequest, StateNotFound, StatesFull
from engine.plan import SlotRef
from engine.state.cache import StateCache
from engine.state.page import FrameCodec, Page, PageFile
from engine.state.store import StateStore
from engine.types import StateInfo, StateOptions

COPY_TIMEOUT_S = 30.0  # for a page on its way to the host, behind whatever the device is doing


class StateKeeper:
    """`wake` makes the engine plan; `num_promised` says how many states requests are to
    leave."""

    def __init__(
        self,
        store: StateStore,
        cache: StateCache,
        codec: FrameCodec | None,
        wake: Callable[[], None],
        num_promised: Callable[[], int],
    ) -> None:
        self._store = store
        self._cache = cache
        self._codec = codec
        self._wake = wake
        self._num_promised = num_promised
        self._changed = asyncio.Event()
        self._end: str | None = None
        self._num_imports = 0

    @property
    def num_imports(self) -> int:
        """Imports that have a frame to come into and are not filed yet."""
        return self._num_imports

    def changed(self) -> None:
        """A plan was committed or a job of the disk is done: pages may have moved."""
        self._changed.set()

    def stop(self, reason: str) -> None:
        """Nothing will change any more."""
        self._end = self._end or reason
        self._changed.set()

    async def wait_for_change(self) -> None:
        """Raises EngineDead when there will be none."""
        if self._end is not None:
            raise EngineDead(self._end)
        self._changed.clear()
        await self._changed.wait()

    def list(self, owner: str) -> list[StateInfo]:
        return [self._store.info(state) for state in self._store.owned_by(owner)]

    def get(self, owner: str, state_id: str) -> StateInfo:
        return self._store.info(self._store.find(owner, state_id))

    def fork(self, owner: str, state_id: str, options: StateOptions) -> StateInfo:
        state = self._store.fork(owner, state_id, options)
        self._wake()
        return self._store.info(state)

    def update(
        self,
        owner: str,
        state_id: str,
        *,
        label: str | None = None,
        is_pinned: bool | None = None,
        ttl_s: float | None = None,
    ) -> StateInfo:
        state = self._store.update(owner, state_id, label=label, is_pinned=is_pinned, ttl_s=ttl_s)
        self._wake()
        return self._store.info(state)

    def delete(self, owner: str, state_id: str) -> None:
        self._store.delete(owner, state_id)
        self._wake()

    async def export_file(self, owner: str, state_id: str) -> bytes:
        codec = self._codec_or_refusal()
        page = self._store.find(owner, state_id).page
        tiers = self._cache.tiers
        tiers.hold(page)  # it may be deleted meanwhile
        try:
            frame = await self._bring_to_host(page)
            with tiers.frame_held(page):
                file = PageFile(page.digest, page.num_tokens, page.has_logits)
                return await asyncio.to_thread(codec.encode, file, frame)
        finally:
            self._cache.let_go(page)
            self._wake()

    async def import_file(self, owner: str, data: bytes, options: StateOptions) -> StateInfo:
        codec = self._codec_or_refusal()
        self._store.check_room(self._num_promised() + self._num_imports)
        frame = self._cache.tiers.take_frame()
        if frame is None:
            raise StatesFull("host memory for states is full: try again, or raise host_state_mib")
        self._num_imports += 1
        work = asyncio.create_task(asyncio.to_thread(codec.decode, data, frame))
        try:
            file = await asyncio.shield(work)
        except BaseException:
            # If only the waiting was given up, the thread still writes the frame.
            work.add_done_callback(lambda done: self._give_back(done, frame))
            raise
        finally:
            self._num_imports -= 1
        if self._end is not None:  # it would never be saved
            self._cache.tiers.release_frame(frame)
            raise EngineDead(self._end)
        page = self._cache.add_page(file, frame)
        state = self._store.put(owner, page, options, None)
        self._wake()
        return self._store.info(state)

    async def _bring_to_host(self, page: Page) -> SlotRef:
        """Wait until the page is in a frame that nobody writes. Raises EngineError."""
        tiers = self._cache.tiers
        try:
            async with asyncio.timeout(COPY_TIMEOUT_S):
                while not tiers.is_settled(page):
                    if not page.exists:
                        raise StateNotFound("the file of this state is broken", "state")
                    if page.frame is None and page.slot is not None:
                        tiers.keep_safe(page)
                    elif page.frame is None:
                        tiers.fetch(page)
                    self._wake()
                    await self.wait_for_change()
        except TimeoutError:
            raise StatesFull("there is no room in host memory now: try again") from None
        assert page.frame is not None, "a settled page has no frame"
        return page.frame

    def _give_back(self, done: asyncio.Task[PageFile], frame: SlotRef) -> None:
        done.cancelled() or done.exception()  # it was told to whoever still waits
        self._cache.tiers.release_frame(frame)

    def _codec_or_refusal(self) -> FrameCodec:
        if self._end is not None:
            raise EngineDead(self._end)
        if self._codec is None or self._cache.tiers.frames is None:
            raise InvalidRequest("states need host memory: set host_state_mib", "state")
        return self._codec
