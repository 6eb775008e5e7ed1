"""The server's processes by the part they play, as the nemesis and its watcher name them.

Owns: how each is called, and finding them quickly. Knows nothing of what is done to them.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from phi_cluster.cluster.messages import ProcessId
from phi_cluster.cluster.processes import is_alive, process_id
from phi_cluster.cluster.runtime_dir import RUNTIME_DIR_VARIABLE

# How a command begins, and what plays this part. A process that is still being made has more behind its name.
ROLES = {
    "ray::EngineActor": "engine",
    "ray::ServeReplica": "replica",
    "ray::SessionActor": "session actor",
    "ray::Keeper": "keeper",
    "ray::Controller": "controller",
    "ray::WeightStore": "weight store",
    "ray::ServeController": "Serve controller",
    "ray::HAProxyManager": "proxy",
    "ray::ProxyActor": "fallback proxy",
}
HAPROXY = "HAProxy"


def role_of(command: str) -> str:
    """The part that a command line plays; "other" for the rest of Ray and for the server itself."""
    for beginning, role in ROLES.items():
        if command.startswith(beginning):
            return role
    program = command.split(" ", 1)[0].rpartition("/")[2]
    return HAPROXY if program.startswith("haproxy") else "idle worker" if command.startswith("ray::IDLE") else "other"


@dataclass(frozen=True)
class Victim:
    """A living process. `settled`: it is made, and an engine has also started."""

    process: ProcessId
    role: str
    command: str

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def settled(self) -> bool:
        # The name of an actor that is being called ends with the method's: engines are called only to start.
        return ("." if self.role == "engine" else ".__init__") not in self.command.split(" ", 1)[0]

    @property
    def lives(self) -> bool:
        return is_alive(self.process)

    def send(self, number: signal.Signals) -> bool:
        """False if it is dead already."""
        if not self.lives:
            return False
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)
            return True
        return False


class Census:
    """Counts a server's processes: those that inherited the name of its folder (not the command itself, which made it).

    What a process is called is read each time (an actor's name tells what it does), whose it is only once.
    """

    def __init__(self, runtime_dir: Path):
        self._mark = f"{RUNTIME_DIR_VARIABLE}={runtime_dir}".encode()
        self._ours: dict[int, tuple[ProcessId, bool]] = {}

    def take(self) -> list[Victim]:
        """All that live now."""
        found = []
        known = self._ours
        self._ours = {}
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            with contextlib.suppress(OSError):
                pid = int(entry.name)
                process = process_id(pid)
                before = known.get(pid)
                if before is not None and before[0] == process and before[1]:
                    ours = True
                else:
                    # Not remembered: a child that has not called exec yet looks like its parent.
                    ours = self._mark in (entry / "environ").read_bytes().split(b"\0")
                self._ours[pid] = process, ours
                if not ours or not is_alive(process):
                    continue
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
                found.append(Victim(process, role_of(command), command))
        return found


def count_roles(victims: Iterable[Victim]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for victim in victims:
        counts[victim.role] = counts.get(victim.role, 0) + 1
    return counts
