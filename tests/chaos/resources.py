"""What a server holds of the machine: processes, KV segments, descriptors, shared memory, files.

Owns: counting them, and saying what has grown between two counts. Knows nothing of why.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from tests.chaos.victims import Census, Victim

# Descriptors that a process may hold more than another one of its kind did at another moment: Ray's connections to
# its other processes are made when they are first used, and stay.
SPARE_DESCRIPTORS = 24
# Ray keeps workers for a while that did something for it.
SPARE_IDLE_WORKERS = 3
_SEGMENT = "/memfd:phi-kv"


@dataclass
class Resources:
    """`segments`: inodes of KV segments that anybody holds open. `sockets`: of ours, in the runtime folder. `stored`:
    names of journals. `shm`: files in /dev/shm."""

    processes: dict[str, int] = field(default_factory=dict)
    descriptors: dict[str, int] = field(default_factory=dict)
    segments: int = 0
    sockets: int = 0
    shm: list[str] = field(default_factory=list)
    stored: list[str] = field(default_factory=list)
    other_files: list[str] = field(default_factory=list)


@dataclass
class Alive:
    """Sessions that are there by right: journals, caches, and actors of their own."""

    journals: set[str] = field(default_factory=set)
    caches: int = 0
    actors: int = 0


def count(census: Census, runtime_dir: Path, state_dir: Path) -> Resources:
    """As of now."""
    victims = census.take()
    found = Resources()
    segments: set[int] = set()
    descriptors: Counter[str] = Counter()
    for victim in victims:
        descriptors[victim.role] += _descriptors(victim, segments)
    found.processes = dict(Counter(victim.role for victim in victims))
    found.descriptors = dict(descriptors)
    found.segments = len(segments)
    found.sockets = sum(_is_socket(path) for path in runtime_dir.iterdir())
    found.shm = sorted(_own_shm())
    files = sorted(path.relative_to(state_dir).as_posix() for path in state_dir.rglob("*") if path.is_file())
    found.stored = sorted({Path(name).name.split(".")[0] for name in files if name.startswith("sessions/")})
    found.other_files = [name for name in files if not name.startswith("sessions/")]
    return found


def leaks(before: Resources, after: Resources, alive: Alive) -> list[str]:
    """What there is more of than before, beyond what belongs to the sessions that are alive."""
    found = []
    for role in sorted({*before.processes, *after.processes}):
        had, has = before.processes.get(role, 0), after.processes.get(role, 0)
        if role == "session actor":
            # One stands ready, unless it has just been given away.
            had = max(had, 1)
        allowed = {"session actor": alive.actors, "idle worker": SPARE_IDLE_WORKERS}.get(role, 0)
        if has > had + allowed:
            found.append(f"{has} processes of kind {role}, {had} before, {allowed} more are allowed")
        elif has < had and role not in ("session actor", "idle worker", "other"):
            found.append(f"{has} processes of kind {role}, {had} before: one is missing")
        most = before.descriptors.get(role, 0) + SPARE_DESCRIPTORS * max(has, 1)
        if had and has <= had and after.descriptors.get(role, 0) > most:
            found.append(f"{after.descriptors[role]} descriptors of kind {role}, {before.descriptors[role]} before")
    if after.segments > before.segments + alive.caches:
        found.append(f"{after.segments} KV segments, {before.segments} before, {alive.caches} sessions have caches")
    if after.sockets > before.sockets:
        found.append(f"{after.sockets} sockets in the runtime folder, {before.sockets} before")
    if more := set(after.shm) - set(before.shm):
        found.append(f"files in /dev/shm: {sorted(more)[:5]}")
    if more := set(after.stored) - set(before.stored) - alive.journals:
        found.append(f"{len(more)} journals of sessions that are not: {sorted(more)[:5]}")
    if more := alive.journals - set(after.stored):
        found.append(f"{len(more)} journals are missing: {sorted(more)[:5]}")
    if more := set(after.other_files) - set(before.other_files):
        found.append(f"files in the state folder: {sorted(more)[:5]}")
    return found


def _descriptors(victim: Victim, segments: set[int]) -> int:
    number = 0
    with contextlib.suppress(OSError):
        for link in Path(f"/proc/{victim.pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                target = os.readlink(link)
                if target.startswith(_SEGMENT):
                    segments.add(link.stat().st_ino)
                # Ray's log monitor keeps the logs of dead workers open, up to 200 of them.
                elif "/logs/" not in target:
                    number += 1
    return number


def _is_socket(path: Path) -> bool:
    with contextlib.suppress(OSError):
        return stat.S_ISSOCK(path.lstat().st_mode)
    return False


def _own_shm() -> list[str]:
    found = []
    for path in Path("/dev/shm").iterdir():
        with contextlib.suppress(OSError):
            if path.stat().st_uid == os.getuid():
                found.append(path.name)
    return found
