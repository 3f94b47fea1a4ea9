from __future__ import annotations

import os
from pathlib import Path

import pytest

from mlxpool_server.mlx_backend.cpu_quota import usable_cpus

pytestmark = pytest.mark.skipif(
    not hasattr(os, "sched_getaffinity"), reason="control groups are Linux's"
)


@pytest.fixture(autouse=True)
def eight_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: set(range(8)))


def cgroup(folder: Path, **files: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_text(content)
    return folder


def membership(tmp_path: Path, line: str) -> Path:
    file = tmp_path / "membership"
    file.write_text(line + "\n")
    return file


def test_no_limit_leaves_the_affinity_mask(tmp_path: Path) -> None:
    """Without any quota, every processor of the affinity mask counts."""
    groups = cgroup(tmp_path / "cgroup", cpu__max="max 100000\n")
    assert usable_cpus(groups, tmp_path / "none") == 8


def test_container_quota_counts_rounded_down(tmp_path: Path) -> None:
    """A container limited to 2.5 processors uses 2."""
    groups = cgroup(tmp_path / "cgroup", cpu__max="250000 100000\n")
    assert usable_cpus(groups, tmp_path / "none") == 2


def test_less_than_one_cpu_is_one(tmp_path: Path) -> None:
    """Half a processor still runs one thread."""
    groups = cgroup(tmp_path / "cgroup", cpu__max="50000 100000\n")
    assert usable_cpus(groups, tmp_path / "none") == 1


def test_smallest_enclosing_quota_wins(tmp_path: Path) -> None:
    """A service under a limited slice gets the slice's limit."""
    groups = cgroup(tmp_path / "cgroup")
    cgroup(groups / "web.slice", cpu__max="300000 100000\n")
    cgroup(groups / "web.slice" / "mlxpool.service", cpu__max="max 100000\n")
    line = "0::/web.slice/mlxpool.service"
    assert usable_cpus(groups, membership(tmp_path, line)) == 3


def test_version_one_quota(tmp_path: Path) -> None:
    """The quota of control groups version 1 counts, -1 meaning none."""
    groups = tmp_path / "cgroup"
    cgroup(groups / "cpu", cpu__cfs_quota_us="-1\n", cpu__cfs_period_us="100000\n")
    cgroup(groups / "cpu" / "job", cpu__cfs_quota_us="400000\n", cpu__cfs_period_us="100000\n")
    assert usable_cpus(groups, membership(tmp_path, "4:cpu,cpuacct:/job")) == 4
