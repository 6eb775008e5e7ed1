"""The private memory of a server's processes over time, by what they are.

Owns: the samples and the series made of them. Knows nothing of the load, of slopes and of plots.

Private memory is RssAnon + VmSwap: what nobody shares and the kernel cannot drop. Each process has a series of its own
(one that was replaced begins a new one); session actors, which come and go, have one of their mean.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from dataclasses import dataclass, field

from server_processes import part_of, server_processes

from phi_cluster.cluster.processes import private_bytes

SESSION_ACTORS = "session actors"


@dataclass
class MemorySamples:
    """`x` of a sample is whatever counts: recycles, or seconds."""

    server_pid: int
    # By part and pid: points (x, bytes).
    _points: dict[tuple[str, int], list[tuple[float, int]]] = field(default_factory=lambda: defaultdict(list))
    # By part: points (x, bytes of all its processes, their number).
    _sums: dict[str, list[tuple[float, int, int]]] = field(default_factory=lambda: defaultdict(list))

    def take(self, x: float) -> None:
        found: dict[str, list[int]] = defaultdict(list)
        for pid, part in server_processes(self.server_pid, part_of).items():
            try:
                nbytes = private_bytes(pid)
            except (ProcessLookupError, OSError):
                continue
            # A zombie, or one that has not become anything yet.
            if not nbytes:
                continue
            found[part].append(nbytes)
            if part != SESSION_ACTORS:
                self._points[part, pid].append((x, nbytes))
        for part, values in found.items():
            self._sums[part].append((x, sum(values), len(values)))
        if actors := found[SESSION_ACTORS]:
            self._points[SESSION_ACTORS, 0].append((x, round(statistics.fmean(actors))))

    def series(self, least: int) -> dict[str, list[tuple[float, int]]]:
        """Points by name, of what has at least so many of them. Of several processes of a part each has its pid in its
        name."""
        long = {place: points for place, points in self._points.items() if len(points) >= least}
        parts = [part for part, _ in long]
        return {
            part if parts.count(part) == 1 else f"{part} {pid}": points for (part, pid), points in sorted(long.items())
        }

    def totals(self) -> dict[str, list[tuple[float, int, int]]]:
        """By part: x, bytes of all its processes, and how many there were."""
        return dict(sorted(self._sums.items()))

    def sum_over_time(self, unit: float) -> list[tuple[float, float]]:
        """x, and the bytes of all processes together, in `unit`s."""
        sums: dict[float, float] = defaultdict(float)
        for points in self._sums.values():
            for x, nbytes, _ in points:
                sums[x] += nbytes / unit
        return sorted(sums.items())
