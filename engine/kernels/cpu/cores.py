"""How many processors are ours."""

from __future__ import annotations

import os


def physical_cores() -> int:
    return len(os.sched_getaffinity(0))
