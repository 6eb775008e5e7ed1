"""What goes wrong in a run, and when: drawn from the seed.

Owns: the rates, and the counts of what was injected. Knows nothing of how a fault is carried out.
"""

from __future__ import annotations

from collections import Counter
from random import Random

from tests.simulation.loop import Process

# Calls of a hand-over are few: they get more than their share.
_DELICATE = frozenset(
    (
        "begin_hand_over",
        "activate",
        "complete_hand_over",
        "cancel_hand_over",
        "held",
        "actor_died",
        "withdraw",
        "abandon",
        "fork",
        "hibernate",
        "put_to_sleep",
    )
)
_FATES = ("lost", "unanswered", "before", "after", "caller")


class Faults:
    """Until `calm`, and never in a seed that is drawn to be a quiet one."""

    def __init__(self, rng: Random):
        self._rng = rng
        self.calm = False
        self.counts: Counter[str] = Counter()
        quiet = rng.random() < 0.1
        self.call_rate = 0.0 if quiet else rng.choice((0.0, 0.01, 0.03, 0.08))
        self.disk_rate = 0.0 if quiet else rng.choice((0.0, 0.0, 0.02, 0.06))
        self.leave_rate = rng.choice((0.0, 0.2, 0.5))
        # (when, whom), in seconds: of each kind at any time.
        self.kills: list[tuple[float, str]] = []
        self.stalls: list[tuple[float, str, float]] = []
        if not quiet:
            span = rng.choice((1.0, 2.0, 4.0))
            kinds = ("keeper", "actor", "actor", "engine", "engine", "replica")
            self.kills = [(rng.random() * span, rng.choice(kinds)) for _ in range(rng.choice((0, 1, 1, 2, 3, 5)))]
            if rng.random() < 0.15:
                self.stalls = [
                    (rng.random() * span, rng.choice(("keeper", "actor", "replica")), rng.choice((0.5, 3.0, 12.0)))
                ]

    def fate(self, target: Process, method: str) -> str:
        rate = self.call_rate * (4 if method in _DELICATE else 1)
        if self.calm or self._rng.random() >= rate:
            return ""
        fate = self._rng.choice(_FATES)
        self.counts[f"call {fate}"] += 1
        return fate

    def disk(self, process: Process, operation: str) -> str:
        if self.calm or self.disk_rate == 0 or not process.alive or self._rng.random() >= self.disk_rate:
            return ""
        fault = self._rng.choice(("before", "after", "full"))
        self.counts[f"disk {fault}"] += 1
        return fault
