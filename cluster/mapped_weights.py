"""How much of the shared weights a process really has in its memory, and how much of that is a copy of its own.

Owns: finding the object store's mappings in `/proc/<pid>/smaps` (see proc(5)), and when that is looked at again. Knows
nothing of engines, Ray or what lies in the store.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

# How the kernel names the object store's memory; engines map it read-only (see model/flat_weights.py), so that what is
# writable there is other messages.
_STORE = "/dev/shm/plasma"
_SECONDS = 30.0


class Mapped(NamedTuple):
    """Bytes. `mapped`: pages of the shared weights that are in the process's page tables; `copied`: those of them that
    it does not share (any more), because it wrote to them."""

    mapped: int = 0
    copied: int = 0


def mapped_weights(smaps: str) -> Mapped:
    """Of a process, by the text of its `smaps`."""
    mapped = copied = 0
    for header, sizes in _mappings(smaps):
        fields = header.split(maxsplit=5)
        if len(fields) == 6 and fields[5].startswith(_STORE) and "w" not in fields[1]:
            mapped += sizes.get("Rss", 0)
            copied += sizes.get("Anonymous", 0) + sizes.get("Swap", 0)
    return Mapped(mapped, copied)


def _mappings(smaps: str) -> Iterator[tuple[str, dict[str, int]]]:
    """Each mapping's first line, and its sizes in bytes."""
    header, sizes = "", dict[str, int]()
    for line in smaps.splitlines():
        name, colon, value = line.partition(":")
        if colon and " " not in name:
            number = value.split()
            if number[-1:] == ["kB"]:
                sizes[name] = int(number[0]) * 1024
        else:
            if header:
                yield header, sizes
            header, sizes = line, {}
    if header:
        yield header, sizes


class MappedWeights:
    """Of the engine that serves; the kernel walks its page tables for it, so it is asked now and then only. `clock` is
    monotonic, in seconds."""

    def __init__(self, proc: Path = Path("/proc"), clock: Callable[[], float] = time.monotonic):
        self._proc = proc
        self._clock = clock
        self._seen = (0, 0.0, Mapped())

    async def of(self, pid: int) -> Mapped:
        """As of the last half minute; zeros for a process that is gone."""
        seen_pid, at, mapped = self._seen
        if pid != seen_pid or self._clock() - at > _SECONDS:
            mapped = await asyncio.to_thread(self._read, pid)
            self._seen = (pid, self._clock(), mapped)
        return mapped

    def _read(self, pid: int) -> Mapped:
        try:
            return mapped_weights((self._proc / str(pid) / "smaps").read_text())
        except OSError:
            return Mapped()
