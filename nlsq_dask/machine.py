"""What of its machine a process may use: in a container or a batch job, less than there is."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path

import psutil

__all__ = ["available_memory", "num_cpus", "total_memory"]

# Where Linux shows control groups, of its second version or, by controller, of its first
# (the kernel's documentation, admin-guide/cgroup-v2 and cgroup-v1).
_GROUPS = Path("/sys/fs/cgroup")
_OWN_GROUPS = Path("/proc/self/cgroup")


def num_cpus() -> int:
    """Processors that this process may use at a time."""
    has_affinity = hasattr(os, "sched_getaffinity")  # not on macOS
    allowed = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1
    return max(1, min([allowed, *map(math.ceil, _shares_of_processors())]))


def total_memory() -> int:
    """Bytes that this process may use, with all that others of its group use."""
    return min([psutil.virtual_memory().total, *(limit for _, limit in _memory_limits())])


def available_memory() -> int:
    """Bytes that are left."""
    left = [limit - _memory_in_use(group) for group, limit in _memory_limits()]
    return max(0, min([psutil.virtual_memory().available, *left]))


def _groups(controller: str) -> Iterator[Path]:
    """The group of this process and those around it, which limit it too."""
    for line in _lines(_OWN_GROUPS):
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        root = _GROUPS / controller if controllers else _GROUPS
        own = root / path.lstrip("/")
        yield own
        # A container may see its own group as the root, and its path as it is outside.
        yield from (around for around in own.parents if around.is_relative_to(root))


def _memory_limits() -> Iterator[tuple[Path, int]]:
    for group in _groups("memory"):
        for name in ("memory.max", "memory.limit_in_bytes"):
            for limit in _numbers(group / name):
                yield group, limit


def _memory_in_use(group: Path) -> int:
    """Without files that the system only keeps because there is room."""
    used = [*_numbers(group / "memory.current"), *_numbers(group / "memory.usage_in_bytes")]
    counts = dict(line.split() for line in _lines(group / "memory.stat"))
    return sum(used) - int(counts.get("total_inactive_file", counts.get("inactive_file", 0)))


def _shares_of_processors() -> Iterator[float]:
    for group in _groups("cpu"):
        quota = _numbers(group / "cpu.max") or [
            *_numbers(group / "cpu.cfs_quota_us"),
            *_numbers(group / "cpu.cfs_period_us"),
        ]
        if len(quota) == 2 and min(quota) > 0:
            yield quota[0] / quota[1]


def _numbers(path: Path) -> list[int]:
    """Those in a file; words, such as ``max`` for no limit, and absent files have none."""
    words = [word for line in _lines(path) for word in line.split()]
    return [int(word) for word in words if word.lstrip("-").isdigit()]


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:  # another system, or none of its groups are shown
        return []
