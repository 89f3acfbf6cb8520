"""Physical cores, on made-up trees of /sys and /proc."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from engine.kernels.cpu.cores import physical_cores


@pytest.fixture(autouse=True)
def _eight_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n")


def with_siblings(root: Path, *lists: str) -> Path:
    for cpu, siblings in enumerate(lists):
        topology = root / f"sys/devices/system/cpu/cpu{cpu}/topology"
        write(topology / "thread_siblings_list", siblings)
    return root


def test_threads_of_one_core_count_once(tmp_path: Path) -> None:
    assert physical_cores(with_siblings(tmp_path, *["0,4", "1,5", "2,6", "3,7"] * 2)) == 4


def test_only_processors_that_this_process_may_run_on_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_siblings(tmp_path, *["0-1"] * 2, *["2-3"] * 2, *["4-5"] * 2, *["6-7"] * 2)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {1, 2, 3})
    assert physical_cores(tmp_path) == 2


def test_without_topology_or_groups_every_processor_is_a_core(tmp_path: Path) -> None:
    assert physical_cores(tmp_path) == 8


def test_where_nothing_tells_of_affinity_all_processors_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    assert physical_cores(tmp_path) == 6
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert physical_cores(tmp_path) == 1


@pytest.mark.parametrize(
    ("text", "cores"),
    [
        *[("max 100000", 8), ("300000 100000", 3), ("250000 100000", 2), ("50000 100000", 1)],
        *[("1600000 100000", 8), ("", 8), ("nonsense", 8), ("100000 0", 8)],
    ],
)
def test_quota_of_version_2_limits(tmp_path: Path, text: str, cores: int) -> None:
    write(tmp_path / "proc/self/cgroup", "0::/")
    write(tmp_path / "sys/fs/cgroup/cpu.max", text)
    assert physical_cores(tmp_path) == cores


def test_quota_of_a_group_above_limits_too(tmp_path: Path) -> None:
    write(tmp_path / "proc/self/cgroup", "0::/system.slice/server.service")
    group = tmp_path / "sys/fs/cgroup/system.slice"
    write(group / "cpu.max", "200000 100000")
    write(group / "server.service/cpu.max", "400000 100000")
    assert physical_cores(tmp_path) == 2


@pytest.mark.parametrize(("quota", "cores"), [("-1", 8), ("400000", 4), ("150000", 1)])
@pytest.mark.parametrize("mounted", ["cpu", "cpu,cpuacct"])
@pytest.mark.parametrize("path", ["/docker/1234", ""])  # of the host, or of the container
def test_quota_of_version_1_limits(
    tmp_path: Path, quota: str, cores: int, mounted: str, path: str
) -> None:
    groups = ["5:memory:/docker/1234", "4:cpu,cpuacct:/docker/1234", "0::/"]
    write(tmp_path / "proc/self/cgroup", "\n".join(groups))
    folder = tmp_path / f"sys/fs/cgroup/{mounted}{path}"
    write(folder / "cpu.cfs_quota_us", quota)
    write(folder / "cpu.cfs_period_us", "100000")
    assert physical_cores(tmp_path) == cores


def test_this_machine_has_one() -> None:
    assert 1 <= physical_cores() <= 8
