"""An engine in a process of its own, for what must survive the one before.

`python -m tests.engine.fresh_process` reads a Job from stdin and writes an Outcome, both as JSON.
"""

from __future__ import annotations

import asyncio
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

import anyio
import msgspec

from engine.types import EngineRequest, OutputDelta, StateInfo, StateOptions
from tests.engine.real_engines import opened, real_table

OWNER = "me"
PROJECT = Path(__file__).parents[2]


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What to do, in this order: import, resume, ask. Requests wait for the one before.

    A request whose `state_id` is empty goes on from the imported state.
    """

    model: str
    folder: str
    state_dir: str | None = None
    imported: bytes | None = None
    resume_ids: list[str] = field(default_factory=list)
    requests: list[EngineRequest] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    imported: StateInfo | None
    resumed: list[OutputDelta]
    answers: list[OutputDelta]
    states: list[StateInfo]


async def in_fresh_process(job: Job) -> Outcome:
    command = [sys.executable, "-m", "tests.engine.fresh_process"]
    done = await anyio.run_process(
        command, input=msgspec.json.encode(job), cwd=PROJECT, check=False
    )
    assert done.returncode == 0, done.stderr.decode()
    return msgspec.json.decode(done.stdout, type=Outcome)


async def run(job: Job) -> Outcome:
    state_dir = None if job.state_dir is None else Path(job.state_dir)
    table = real_table(job.model, Path(job.folder), state_dir=state_dir)
    async with opened(table) as core:
        imported = None
        if job.imported is not None:
            imported = await core.states.import_file(OWNER, job.imported, StateOptions())
        streams = [core.resume(name, OWNER, f"again-{name}") for name in job.resume_ids]
        resumed = list(await asyncio.gather(*(stream.collect() for stream in streams)))
        answers = []
        for request in job.requests:
            if request.state_id == "" and imported is not None:
                request = replace(request, state_id=imported.state_id)
            answers.append(await core.submit(request).collect())
        states = core.states.list(OWNER)
    return Outcome(imported=imported, resumed=resumed, answers=answers, states=states)


if __name__ == "__main__":
    outcome = asyncio.run(run(msgspec.json.decode(sys.stdin.buffer.read(), type=Job)))
    sys.stdout.buffer.write(msgspec.json.encode(outcome))
