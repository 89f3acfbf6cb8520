"""How many processors are ours: physical cores, less what a container's quota takes away."""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path("/")


def physical_cores(root: Path = ROOT) -> int:
    """Of those this process may run on, at least 1; two threads of one core count once.

    `root` is where /sys and /proc are looked for. What the system does not tell does not limit.
    """
    if hasattr(os, "sched_getaffinity"):
        allowed = os.sched_getaffinity(0)
    else:
        allowed = set(range(os.cpu_count() or 1))
    cores = {_siblings(root, cpu) for cpu in allowed}
    quota = _quota(root)
    return max(1, len(cores) if quota is None else min(len(cores), int(quota)))


def _siblings(root: Path, cpu: int) -> str:
    """The same for all threads of one core."""
    topology = root / f"sys/devices/system/cpu/cpu{cpu}/topology"
    return _read(topology / "thread_siblings_list") or str(cpu)


def _quota(root: Path) -> float | None:
    """Processors that the control groups of this process allow, the tightest of them."""
    found = []
    for line in (_read(root / "proc/self/cgroup") or "").splitlines():
        _, controllers, path = line.split(":", 2)
        names = controllers.split(",")
        if not controllers:
            for folder in _with_parents(root / "sys/fs/cgroup", path):
                quota, _, period = (_read(folder / "cpu.max") or "").partition(" ")
                found.append(_ratio(quota, period))
        elif "cpu" in names:
            for mounted in ("cpu", controllers):
                for folder in _with_parents(root / "sys/fs/cgroup" / mounted, path):
                    quota = _read(folder / "cpu.cfs_quota_us") or ""
                    found.append(_ratio(quota, _read(folder / "cpu.cfs_period_us") or ""))
    limits = [limit for limit in found if limit is not None]
    return min(limits) if limits else None


def _with_parents(mounted: Path, path: str) -> list[Path]:
    """The group and all above it: each may limit. In a container `path` may be the host's."""
    parts = [part for part in path.split("/") if part not in ("", "..")]
    return [mounted.joinpath(*parts[:count]) for count in range(len(parts) + 1)]


def _ratio(quota: str, period: str) -> float | None:
    """None for no limit, which is "max" in version 2 and -1 in version 1."""
    if not quota.isdigit() or not period.isdigit() or int(period) == 0:
        return None
    return int(quota) / int(period)


def _read(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:
        return None
