"""A peer's process, seen from the benchmark.

Owns: starting it, asking it (see peer.py for the lines), how much of the machine others used meanwhile, and ending it.
Knows nothing of what is measured.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_TICKS = os.sysconf("SC_CLK_TCK")
_BENCH = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Answer:
    """What a method returned; `others` is how many cores other processes (and the hypervisor) used meanwhile, to be
    believed only over some tenths of a second."""

    result: Any
    others: float


class PeerProcess:
    """`module` (peers.llama_cpp) run by `python` with `arguments`. Raises MissingPeer-like RuntimeError in one line if
    it does not come up; its output goes to `log`."""

    def __init__(self, name: str, python: str, module: str, arguments: list[str], log: Path):
        self.name = name
        self._log = log.open("ab")
        try:
            self._process = subprocess.Popen(
                [python, "-m", module, *arguments],
                cwd=_BENCH,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._log,
                text=True,
                bufsize=1,
            )
        except OSError as error:
            self._log.close()
            raise RuntimeError(f"{python}: {error.strerror}") from None
        try:
            first = self._receive()
            if "missing" in first:
                raise RuntimeError(first["missing"])
        except BaseException:
            self.close()
            raise
        self.description: str = first["ready"]

    def ask(self, method: str, **arguments: Any) -> Answer:
        """Calls a method of the peer. Raises RuntimeError with the peer's own words, or if it has died."""
        assert self._process.stdin is not None
        if (status := self._process.poll()) is not None:
            raise RuntimeError(f"{self.name}'s process has ended with {status}; see {self._log.name}")
        idle, own, wall = _idle_seconds(), self._cpu_seconds(), time.monotonic()
        self._process.stdin.write(json.dumps({"do": method, **arguments}) + "\n")
        answer = self._receive()
        wall = time.monotonic() - wall
        cores = len(os.sched_getaffinity(0))
        busy = cores - (_idle_seconds() - idle) / wall
        others = max(0.0, busy - (self._cpu_seconds() - own) / wall)
        if "error" in answer:
            raise RuntimeError(f"{self.name}: {answer['error']}")
        return Answer(answer["result"], others)

    def close(self) -> None:
        """Ends it; a peer that does not end by itself is killed."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._log.close()

    def _receive(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name}'s process ended with {self._process.wait()}; see {self._log.name}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _cpu_seconds(self) -> float:
        """Of the process and all its threads."""
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / _TICKS


def wait_until_quiet(max_others: float, patience: float, window: float = 0.5) -> None:
    """Returns when all processes use less than `max_others` cores for `window` seconds, or after `patience` seconds."""
    cores, deadline = len(os.sched_getaffinity(0)), time.monotonic() + patience
    while time.monotonic() < deadline:
        idle, begin = _idle_seconds(), time.monotonic()
        time.sleep(window)
        if cores - (_idle_seconds() - idle) / (time.monotonic() - begin) <= max_others:
            return


def _idle_seconds() -> float:
    """Core-seconds in which this machine had nothing to do (waiting for disks counts)."""
    fields = Path("/proc/stat").read_text().splitlines()[0].split()[1:]
    return (int(fields[3]) + int(fields[4])) / _TICKS
