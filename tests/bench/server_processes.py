"""The processes of a server on this machine, and the CPU time that each kind of them used.

Owns: finding them through /proc, and what they are called. Knows nothing of HTTP or of what they were doing.
"""

from __future__ import annotations

import os
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path

from phi_cluster.cluster.runtime_dir import base_dir

_TICKS = os.sysconf("SC_CLK_TCK")
_KINDS = {
    "EngineActor": "engine",
    "ServeReplica": "replica",
    "SessionActor": "session actors",
    "Keeper": "keeper",
    "ray::Controller": "controller",
    "WeightStore": "weight store",
    "haproxy -db": "haproxy",
}
# What `ray` is made of.
_RAY_PARTS = {
    "gcs_server": "GCS",
    "raylet/raylet": "raylet",
    "log_monitor.py": "log monitor",
    "RuntimeEnvAgent": "runtime env agent",
    "runtime_env_agent": "runtime env agent",
    "DashboardAgent": "dashboard agent",
    "dashboard/agent": "dashboard agent",
    "dashboard/dashboard": "dashboard",
    "autoscaler/_private": "autoscaler",
    "ServeController": "Serve controller",
    "ProxyActor": "Serve proxy",
    "HAProxyManager": "HAProxy manager",
    "ray::IDLE": "idle worker",
    "growing_process.py": "planted leak",
}
# Only these are the server's: whoever talks to it is not.
CLIENT = "client"


def find_server() -> int:
    """The pid of the one `phi-cluster serve` that runs here. Raises SystemExit."""
    pids = [
        int(entry.name)
        for entry in Path("/proc").iterdir()
        if entry.name.isdigit() and any(base_dir().glob(f"phi-{entry.name}-*"))
    ]
    if len(pids) != 1:
        sys.exit(f"{len(pids)} servers run here: name one with --server-pid")
    return pids[0]


def runtime_dir_of(server_pid: int) -> Path:
    """The folder of a server (cluster/runtime_dir.py). Raises ValueError if there is not one."""
    [folder] = base_dir().glob(f"phi-{server_pid}-*")
    return folder


def server_processes(server_pid: int, name: Callable[[str], str] | None = None) -> dict[int, str]:
    """Pids of a server's processes, which inherit the name of its runtime folder, each with what `name` (`kind_of` if
    there is none) makes of its command."""
    name = name or kind_of
    mark = f"/phi-{server_pid}-".encode()
    found = {server_pid: "driver"}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            if mark not in (entry / "environ").read_bytes():
                continue
        except OSError:
            continue
        found.setdefault(int(entry.name), name(command))
    return found


def kind_of(command: str) -> str:
    """`ray::EngineActor` -> engine, and so on; the rest of Ray is one kind."""
    return next((kind for part, kind in _KINDS.items() if part in command), "ray")


def part_of(command: str) -> str:
    """As `kind_of`, with Ray's and Serve's processes by name."""
    kind = kind_of(command)
    return next((part for piece, part in _RAY_PARTS.items() if piece in command), kind) if kind == "ray" else kind


class CpuClock:
    """CPU seconds by kind since it was made; processes that came meanwhile count from their beginning."""

    def __init__(self, server_pid: int):
        self._server_pid = server_pid
        self._before = _read(server_processes(server_pid))

    def seconds(self) -> dict[str, float]:
        """User and system time of each kind, and of this process as CLIENT. What a process used that has ended
        meanwhile is lost."""
        total: dict[str, float] = defaultdict(float)
        for pid, (kind, seconds) in _read(server_processes(self._server_pid)).items():
            total[kind] += seconds - self._before.get(pid, (kind, 0.0))[1]
        return dict(total)


def per_thousand_tokens(seconds: Mapping[str, float], tokens: int) -> dict[str, float]:
    """Each kind's seconds for 1,000 tokens, largest first; kinds that used nothing are left out."""
    shares = {kind: round(value / tokens * 1000, 2) for kind, value in seconds.items()}
    return {kind: share for kind, share in sorted(shares.items(), key=lambda item: -item[1]) if share}


def overhead(seconds: Mapping[str, float]) -> float:
    """What the server used outside its engines, in engines' seconds."""
    outside = sum(value for kind, value in seconds.items() if kind not in ("engine", CLIENT))
    return outside / seconds["engine"]


def _read(processes: Mapping[int, str]) -> dict[int, tuple[str, float]]:
    """Kind and seconds so far of each process, and of this one."""
    found = {os.getpid(): (CLIENT, sum(os.times()[:2]))}
    for pid, kind in processes.items():
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        found[pid] = kind, (int(fields[11]) + int(fields[12])) / _TICKS
    return found
