"""What `phi-cluster serve` shows while it starts: one line a phase, and bars for long work.

Owns: the looks. Knows nothing of what is being done.
"""

from __future__ import annotations

import sys
import time
from typing import TextIO

from phi_cluster.cluster.preflight import Machine
from phi_cluster.cluster.report import Report
from phi_cluster.model.model_cache import ProgressEvent

_BAR = 24


class TerminalReport(Report):
    """Bars are redrawn on a terminal; elsewhere each phase is one line when it is done."""

    def __init__(self, out: TextIO = sys.stdout):
        self._out = out
        self._live = out.isatty()
        self._stage = ""
        self._drawn_at = 0.0
        self._starting = False

    def checked(self, machine: Machine) -> None:
        memory = f"{machine.memory_nbytes / 2**30:.0f} GiB"
        self._line(f"checking     {machine.cores} cores, {machine.instructions}, {memory}, disk, ports         ok")

    def cleared(self, what: str) -> None:
        self._line(f"clearing     {what}")

    def noted(self, text: str) -> None:
        self._line(f"note         {text}")

    def progress(self, event: ProgressEvent) -> None:
        now = time.monotonic()
        done = event.done >= event.total > 0
        if event.stage != self._stage:
            self._stage, self._drawn_at = event.stage, 0.0
        if not done and (not self._live or now - self._drawn_at < 0.1):
            return
        self._drawn_at = now
        share = event.done / event.total if event.total else 0.0
        bar = "█" * round(share * _BAR)
        line = f"{event.stage:<12} {event.detail or ''}  {bar:<{_BAR}} {share:4.0%}"
        self._out.write(f"\r{line}\x1b[K" if self._live else line)
        if done or not self._live:
            self._out.write("\n")
        self._out.flush()

    def started(self, part: str, seconds: float) -> None:
        self._out.write(f"{' ' if self._starting else 'starting    '} {part} {seconds:.1f}s")
        self._starting = True
        self._out.flush()

    def ready(self) -> None:
        """Ends the line of what was started."""
        if self._starting:
            self._out.write("\n")
            self._starting = False

    def _line(self, text: str) -> None:
        self._out.write(f"{text}\n")
        self._out.flush()
