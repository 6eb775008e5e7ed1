"""What the cgroups that this process lives in allow it: its own, and all above it.

Owns: finding their files (v2, or v1's memory and cpu controllers) and reading them. Knows nothing of what the limits
are for. See cgroups(7); the kernel's cgroup-v2.rst and cgroup-v1/memory.rst.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

PROC = Path("/proc")
CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class MemoryLimit:
    """Bytes. What `used_nbytes` counts could not be given back at once."""

    limit_nbytes: int
    used_nbytes: int


def memory_limits(proc: Path = PROC, cgroup: Path = CGROUP) -> list[MemoryLimit]:
    """Of each cgroup that sets one; a process is killed for the first one that is reached, whichever it is."""
    return [
        *_limits(proc, cgroup, "", "memory.max", "memory.current"),
        *_limits(proc, cgroup, "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ]


def cpu_quota(proc: Path = PROC, cgroup: Path = CGROUP) -> float | None:
    """Cores that may be used at once, on average; None: no limit."""
    quotas = []
    for folder in _folders(proc, cgroup, ""):
        try:
            quota, period = (folder / "cpu.max").read_text().split()
            quotas.append(int(quota) / int(period))
        except (OSError, ValueError, ZeroDivisionError):
            # None is set ("max"), or there is no such controller.
            continue
    for folder in _folders(proc, cgroup, "cpu"):
        us, period_us = _read_number(folder / "cpu.cfs_quota_us"), _read_number(folder / "cpu.cfs_period_us")
        # -1 for no limit.
        if us is not None and us > 0 and period_us:
            quotas.append(us / period_us)
    return min(quotas, default=None)


def _limits(proc: Path, cgroup: Path, controller: str, limit_name: str, used_name: str) -> Iterator[MemoryLimit]:
    for folder in _folders(proc, cgroup, controller):
        limit = _read_number(folder / limit_name)
        if limit is not None:
            # File pages that nobody used lately count as used, but are given back at once where memory is needed.
            used = (_read_number(folder / used_name) or 0) - _reclaimable(folder / "memory.stat")
            yield MemoryLimit(limit, max(used, 0))


def _folders(proc: Path, cgroup: Path, controller: str) -> Iterator[Path]:
    """Of this process's cgroup and all above it, for a controller of v1 ("" for v2), innermost first.

    In a container the paths may be the host's, which are not there: what is mounted is the container's own.
    """
    root, path = cgroup / controller, PurePosixPath("/")
    try:
        for line in (proc / "self" / "cgroup").read_text().splitlines():
            _, controllers, name = line.split(":", 2)
            if controller in controllers.split(","):
                path = PurePosixPath(name)
    except (OSError, ValueError):
        pass
    for part in (path, *path.parents):
        folder = root / part.relative_to("/")
        if folder.is_dir():
            yield folder


def _reclaimable(path: Path) -> int:
    """`inactive_file` of a memory.stat, in bytes; v1 has it for the cgroups below too."""
    try:
        fields = dict(line.split() for line in path.read_text().splitlines())
        return int(fields.get("total_inactive_file", fields.get("inactive_file", 0)))
    except (OSError, ValueError):
        return 0


def _read_number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None
