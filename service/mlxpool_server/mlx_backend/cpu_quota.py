"""How many processors this process may use, which in a container is not how many there are."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

_CGROUPS = Path("/sys/fs/cgroup")


def usable_cpus(cgroups: Path = _CGROUPS, membership: Path = Path("/proc/self/cgroup")) -> int:
    """Return the processors of the affinity mask, or fewer (at least 1) where a quota is smaller.

    Linux only. Reads cgroup v2's cpu.max and v1's cpu.cfs_quota_us, for every enclosing group.
    """
    affinity = len(os.sched_getaffinity(0))
    quotas = [quota for folder in _folders(cgroups, membership) if (quota := _quota(folder))]
    # Rounded down: threads beyond the quota get the whole process throttled.
    return max(1, int(min([affinity, *quotas])))


def _folders(cgroups: Path, membership: Path) -> Iterator[Path]:
    # In a container the namespace's root is the container's own group.
    yield from (cgroups, cgroups / "cpu")
    with contextlib.suppress(OSError):
        for line in membership.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers == "" or "cpu" in controllers.split(","):
                root = cgroups / "cpu" if controllers else cgroups
                group = root / path.lstrip("/")
                yield from (folder for folder in (group, *group.parents) if root in folder.parents)


def _quota(folder: Path) -> float | None:
    """The processors a group may keep busy; None when it has no limit of its own."""
    with contextlib.suppress(OSError, ValueError):
        quota, period = (folder / "cpu.max").read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    with contextlib.suppress(OSError, ValueError):
        quota_us = int((folder / "cpu.cfs_quota_us").read_text())
        period_us = int((folder / "cpu.cfs_period_us").read_text())
        return quota_us / period_us if quota_us > 0 else None
    return None
