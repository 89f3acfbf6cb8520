"""An EngineCore whose kept states are lists of token ids in memory, and that can suspend.

The verbs of states are played here, so that HTTP is tested without the state tiers: a request
that goes on from a state is given to the core with all the tokens that the state stands for.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import count

from msgspec import structs

from engine.client import RequestStream, Resumed
from engine.core import EngineCore
from engine.errors import Draining, InvalidRequest, StateMismatch, StateNotFound, StatesFull
from engine.types import (
    EngineRequest,
    FinishReason,
    OutputDelta,
    StateInfo,
    StateOptions,
)

MAGIC = b"scripted state "
Ids = tuple[int, ...]


@dataclass
class Kept:
    owner: str
    ids: Ids
    info: StateInfo


class ScriptedStates:
    """The States protocol over token ids."""

    def __init__(self) -> None:
        self.kept: dict[str, Kept] = {}
        self.max_num_states = 1000
        self._numbers = count()

    def add(
        self, owner: str, ids: Ids, options: StateOptions, parent_id: str | None = None
    ) -> StateInfo:
        if len(self.kept) >= self.max_num_states:
            raise StatesFull("there is no room for another state: delete some")
        now_s = time.time()
        info = StateInfo(
            state_id=f"state-{next(self._numbers):032x}",
            num_tokens=len(ids),
            num_bytes=8,
            created_unix_s=now_s,
            expires_unix_s=None if options.ttl_s is None else now_s + options.ttl_s,
            label=options.label,
            is_pinned=options.is_pinned,
            has_logits=True,
            parent_id=parent_id,
            tier="device",
        )
        self.kept[info.state_id] = Kept(owner, ids, info)
        return info

    def find(self, owner: str, state_id: str) -> Kept:
        found = self.kept.get(state_id)
        if found is None or found.owner != owner:
            raise StateNotFound(f"there is no state {state_id!r}", "state_id")
        return found

    def list(self, owner: str) -> list[StateInfo]:
        return [kept.info for kept in reversed(self.kept.values()) if kept.owner == owner]

    def get(self, owner: str, state_id: str) -> StateInfo:
        return self.find(owner, state_id).info

    def fork(self, owner: str, state_id: str, options: StateOptions) -> StateInfo:
        return self.add(owner, self.find(owner, state_id).ids, options, state_id)

    def update(
        self,
        owner: str,
        state_id: str,
        *,
        label: str | None = None,
        is_pinned: bool | None = None,
        ttl_s: float | None = None,
    ) -> StateInfo:
        kept = self.find(owner, state_id)
        info = kept.info
        if label is not None:
            info = replace(info, label=label)
        if is_pinned is not None:
            info = replace(info, is_pinned=is_pinned)
        if ttl_s is not None:
            ends_s = None if ttl_s == float("inf") else time.time() + ttl_s
            info = replace(info, expires_unix_s=ends_s)
        kept.info = info
        return info

    def delete(self, owner: str, state_id: str) -> None:
        self.find(owner, state_id)
        del self.kept[state_id]

    async def export_file(self, owner: str, state_id: str) -> bytes:
        return MAGIC + json.dumps(self.find(owner, state_id).ids).encode()

    async def import_file(self, owner: str, data: bytes, options: StateOptions) -> StateInfo:
        if not data.startswith(MAGIC):
            raise StateMismatch("the file is no state of this model")
        return self.add(owner, tuple(json.loads(data[len(MAGIC) :])), options)


@dataclass
class Suspended:
    request: EngineRequest
    output_ids: Ids


@dataclass
class Disk:
    """What one replica leaves to the next."""

    states: ScriptedStates = field(default_factory=ScriptedStates)
    suspended: dict[str, Suspended] = field(default_factory=dict)


class ScriptedEngine(EngineCore):
    """See above. `requests` are all that were submitted, as they came."""

    def __init__(self, disk: Disk, *arguments: object, **keywords: object) -> None:
        super().__init__(*arguments, **keywords)
        self.disk = disk
        self.requests: list[EngineRequest] = []
        self.refuses_states = False  # as if there were no room for another
        self._suspendable: set[str] = set()
        self._is_suspending = False

    @property
    def states(self) -> ScriptedStates:
        return self.disk.states

    def rescan(self) -> None:
        """The disk is shared."""

    def submit(self, request: EngineRequest) -> RequestStream:
        if self.refuses_states and request.keep_state is not None:
            raise StatesFull("there is no room for another state: delete some")
        self.requests.append(request)
        base: Ids = ()
        if request.state_id is not None:
            base = self.states.find(request.owner, request.state_id).ids
        ids = (*base, *request.prompt_ids)
        if not ids:
            raise InvalidRequest("prompt_ids is empty", "prompt_ids")
        if request.sampling.max_tokens == 0 and request.keep_state is not None:
            return self._submit_prompt_only(request, base, ids)
        return self._submit_inner(request, base, ids, ())

    def _submit_part(self, request: EngineRequest) -> RequestStream:
        """Of a batch: with all the tokens that its state stands for, as above."""
        self.requests.append(request)
        if request.state_id is None:
            return super()._submit_part(request)
        base = self.states.find(request.owner, request.state_id).ids
        further = {
            name: value + len(base)
            for name in ("scores_from", "branch_at")
            if (value := getattr(request, name)) is not None
        }
        ids = (*base, *request.prompt_ids)
        stream = super()._submit_part(replace(request, prompt_ids=ids, state_id=None, **further))
        put, num_prompt = stream.put, len(request.prompt_ids)

        def put_translated(delta: OutputDelta) -> None:
            put(structs.replace(delta, num_prompt_tokens=num_prompt, num_state_tokens=len(base)))

        stream.put = put_translated  # type: ignore[method-assign]
        return stream

    def resume(self, resume_id: str, owner: str, request_id: str) -> RequestStream:
        found = self.disk.suspended.get(resume_id)
        if found is None or found.request.owner != owner:
            raise StateNotFound(f"nothing is suspended as {resume_id!r}", "resume_id")
        del self.disk.suspended[resume_id]
        request = replace(found.request, request_id=request_id)
        stream = self._submit_inner(request, (), request.prompt_ids, found.output_ids)
        stream.resumed = Resumed(request.memo, self.tokenizer.decode(found.output_ids))
        return stream

    async def drain(self, timeout_s: float, *, suspends: bool = False) -> bool:
        self._is_suspending = suspends
        for request_id in [*self._suspendable] if suspends else []:
            self.abort(request_id)
        return await super().drain(timeout_s)

    def _submit_prompt_only(self, request: EngineRequest, base: Ids, ids: Ids) -> RequestStream:
        if not self.snapshot().is_accepting:
            raise Draining("shutting down")
        assert request.keep_state is not None, "a prompt alone is computed for its state"
        state = self.states.add(request.owner, ids, request.keep_state, request.state_id)
        stream = RequestStream(request.request_id, lambda _: None)
        end = OutputDelta(
            finish_reason=FinishReason.LENGTH,
            num_prompt_tokens=len(request.prompt_ids),
            num_state_tokens=len(base),
            state=state,
        )
        asyncio.get_running_loop().call_soon(stream.put, end)
        return stream

    def _submit_inner(
        self, request: EngineRequest, base: Ids, ids: Ids, output_ids: Ids
    ) -> RequestStream:
        """The core knows neither states nor suspending; its deltas are translated."""
        sampling, scores_from = request.sampling, request.scores_from
        inner = replace(
            request,
            prompt_ids=(*ids, *output_ids),
            sampling=replace(sampling, max_tokens=sampling.max_tokens - len(output_ids)),
            scores_from=None if scores_from is None else len(base) + max(scores_from, 1),
            snapshot_hints=(),
            state_id=None,
            initial_state=None,
            keep_state=None,
            is_resumable=False,
        )
        stream = super().submit(inner)
        if request.is_resumable:
            self._suspendable.add(request.request_id)
        stream.put = self._translator(request, base, ids, output_ids, stream.put)  # type: ignore[method-assign]
        return stream

    def _translator(
        self,
        request: EngineRequest,
        base: Ids,
        ids: Ids,
        output_ids: Ids,
        put: Callable[[OutputDelta], None],
    ) -> Callable[[OutputDelta], None]:
        drawn = list(output_ids)

        def translate(delta: OutputDelta) -> None:
            drawn.extend(delta.token_ids)
            delta = structs.replace(
                delta,
                num_prompt_tokens=len(request.prompt_ids),
                num_state_tokens=len(base),
                num_output_tokens=len(output_ids) + delta.num_output_tokens,
            )
            if delta.finish_reason is not None:
                delta = self._end_of(request, ids, tuple(drawn), delta)
            put(delta)

        return translate

    def _end_of(
        self, request: EngineRequest, ids: Ids, drawn: Ids, delta: OutputDelta
    ) -> OutputDelta:
        self._suspendable.discard(request.request_id)
        if (
            delta.finish_reason is FinishReason.ABORT
            and request.is_resumable
            and self._is_suspending
        ):
            resume_id = f"resume-{request.request_id}"
            self.disk.suspended[resume_id] = Suspended(replace(request, prompt_ids=ids), drawn)
            return structs.replace(delta, finish_reason=FinishReason.SUSPENDED, resume_id=resume_id)
        keep = request.keep_state
        if keep is not None and delta.finish_reason in (FinishReason.STOP, FinishReason.LENGTH):
            state = self.states.add(request.owner, (*ids, *drawn), keep, request.state_id)
            return structs.replace(delta, state=state)
        return delta
