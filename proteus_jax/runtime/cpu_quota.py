"""Counts the cores that a process may use, by its affinity and the limits of its container."""

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

CGROUPS, MEMBERSHIP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def cores() -> int:
    """Cores that this process may use: by its affinity, and by the quota of its container."""
    count = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        count = len(os.sched_getaffinity(0))
    return max(1, min([count, *map(round, _quotas())]))


def _quotas() -> Iterator[float]:
    """Cores that each cgroup around this process allows, where it sets a limit."""
    with contextlib.suppress(OSError):
        for line in MEMBERSHIP.read_text(encoding="utf-8").splitlines():
            _, controllers, group = line.split(":", 2)
            if controllers == "":
                yield from _each_quota(CGROUPS, group, _quota_of_the_second_version)
            elif "cpu" in controllers.split(","):
                yield from _each_quota(CGROUPS / "cpu", group, _quota_of_the_first_version)


def _each_quota(root: Path, group: str, read: Callable[[Path], float]) -> Iterator[float]:
    folder = root / group.strip("/")
    # Inside a container the group's own name may lead nowhere: its files lie at the root.
    for place in (folder, *folder.parents):
        if place.is_relative_to(root):
            with contextlib.suppress(OSError, ValueError, ZeroDivisionError):
                quota = read(place)
                if quota > 0:
                    yield quota


def _quota_of_the_second_version(group: Path) -> float:
    quota, period = (group / "cpu.max").read_text(encoding="utf-8").split()
    return int(quota) / int(period)


def _quota_of_the_first_version(group: Path) -> float:
    quota, period = (
        int((group / f"cpu.cfs_{name}_us").read_text(encoding="utf-8"))
        for name in ("quota", "period")
    )
    return quota / period
