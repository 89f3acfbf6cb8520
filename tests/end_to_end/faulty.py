"""`python -m api` in which faults can be asked for, to see what becomes of the others.

A request asks by its seed (greedy answers do not depend on it): `seed_of(fault, position)` lets
the fault happen in the first row of the request that reaches that position in its text. The clock
on the wall is wrong by the seconds that stand in the file $FAULTY_CLOCK, as soon as they do.
Permissions of files hold for the server, also where it is root's.
"""

from __future__ import annotations

import ctypes
import enum
import os
import sys
import time
from pathlib import Path

BASE = 7_000_000
MAX_POSITION = 10_000
SLOW_S = 0.03
CAPABILITY_VERSION = 0x20080522  # of linux/capability.h


class Fault(enum.IntEnum):
    ERROR = 1  # the step raises
    MEMORY = 2  # likewise, for want of memory
    DEATH = 3  # the device thread is told to end
    LOGITS = 4  # the row's output is NaN
    STATE = 5  # and so is the state that it leaves
    SLOW = 6  # every step with such a row takes SLOW_S


def seed_of(fault: Fault, position: int = 0) -> int:
    return BASE + fault * MAX_POSITION + position


def _fault_of(seed: int) -> tuple[Fault, int] | None:
    number, position = divmod(seed - BASE, MAX_POSITION)
    return (Fault(number), position) if number in {*Fault} else None


def break_clock(path: Path) -> None:
    """Before anybody has a name for the right one."""
    right = time.time

    def wrong() -> float:
        text = path.read_text() if path.exists() else ""
        return right() + float(text or 0)

    time.time = wrong


def drop_capabilities() -> None:
    """Of this thread and all that it starts. Raises OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION, 0)
    none = (ctypes.c_uint32 * 6)()
    if libc.capset(header, none):
        raise OSError(ctypes.get_errno(), "capset")


def break_device() -> None:
    import torch

    from engine.executor import Read
    from engine.kernels.backend import Batch
    from engine.model.fused import FusedRWKV7
    from engine.model.rwkv7 import State
    from engine.plan import Row, StepPlan
    from engine.runner import ModelRunner

    faults: dict[int, tuple[Fault, int]] = {}  # by seat
    spoilt: dict[int, Fault] = {}  # by slot that is written; of this step
    issue, forward = ModelRunner.issue, FusedRWKV7.__call__

    def due(row: Row) -> Fault | None:
        fault, position = faults.get(row.seat, (None, 0))
        return fault if position < row.position + row.num_tokens else None

    def faulty_issue(self: ModelRunner, plan: StepPlan) -> Read:
        for start in plan.starts:
            found = _fault_of(start.sampling.seed)
            faults.pop(start.seat, None)
            if found is not None:
                faults[start.seat] = found
        spoilt.clear()
        if any(faults.get(row.seat, (None, 0))[0] is Fault.SLOW for row in plan.rows):
            time.sleep(SLOW_S)
        for row in plan.rows:
            match due(row):
                case Fault.ERROR:
                    raise RuntimeError("injected failure")
                case Fault.MEMORY:
                    raise MemoryError("injected want of memory")
                case Fault.DEATH:
                    raise SystemExit("injected death")
                case Fault.LOGITS | Fault.STATE as fault:
                    spoilt[row.dst.slot] = fault
        return issue(self, plan)

    def faulty_forward(
        self: FusedRWKV7, tokens_T: torch.Tensor, batch: Batch, state: State
    ) -> torch.Tensor:
        out = forward(self, tokens_T, batch, state)
        begin = 0
        for length, slot in zip(batch.lengths, batch.dst_slot.tolist(), strict=True):
            if slot in spoilt:
                out[begin : begin + length] = torch.nan
                if spoilt[slot] is Fault.STATE:
                    state.wkv[slot] = torch.nan
                    state.shift[slot] = torch.nan
            begin += length
        return out

    ModelRunner.issue = faulty_issue  # type: ignore[method-assign]
    FusedRWKV7.__call__ = faulty_forward  # type: ignore[method-assign]


if __name__ == "__main__":
    if "FAULTY_CLOCK" in os.environ:
        break_clock(Path(os.environ["FAULTY_CLOCK"]))
    drop_capabilities()
    break_device()
    from api.__main__ import leave, main

    leave(main(sys.argv[1:]))
