"""Whose private memory has grown too much since it had settled: what leaks must not live for ever.

Owns: the comparison. Pure: it gets numbers; the controller asks it about keepers and itself, and renews them. (Engines
and session actors have policies of their own.) Knows nothing of how processes are measured or ended.
"""

from __future__ import annotations

from collections.abc import Hashable

# A process has settled when it has been seen for so long: it fills caches and allocators first.
_SETTLE_SECONDS = 60.0


class GrowthWatch:
    """`limit` in bytes; None: nobody grows too much. `process` is whatever tells one process from its successor."""

    def __init__(self, limit: int | None):
        self._limit = limit
        # By place: who is there, since when it has been seen, and what it took when it had settled.
        self._seen: dict[str, tuple[Hashable, float, int | None]] = {}

    def exceeds(self, place: str, process: Hashable, nbytes: int, now: float) -> bool:
        """Whether the process that holds this place takes more than `limit` beyond what it took at first."""
        before = self._seen.get(place)
        if before is None or before[0] != process:
            self._seen[place] = (process, now, None)
            return False
        _, since, baseline = before
        if baseline is None:
            if now - since >= _SETTLE_SECONDS:
                self._seen[place] = (process, since, nbytes)
            return False
        return self._limit is not None and nbytes - baseline > self._limit
