"""Components that were lost and replaced, as whoever replaces them counts it.

Owns: these two families, for every component. Knows nothing of how a loss is noticed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from prometheus_client import CollectorRegistry, Counter, Histogram

from phi_cluster.monitoring.snapshots import RaisedCounter

_PAUSE_BUCKETS = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)


class RecoveryMetrics:
    """`components` maps each that is counted here to the ways in which it may be lost: those series are there from the
    beginning, or nobody could see the first loss as an increase."""

    def __init__(self, registry: CollectorRegistry, components: Mapping[str, Sequence[str]]):
        self._recoveries = Counter(
            "phi_recoveries",
            "Components that were lost and replaced, by what was wrong (death, hang, fault).",
            ["component", "reason"],
            registry=registry,
        )
        self._seconds = Histogram(
            "phi_recovery_seconds",
            "From the moment at which a component's loss was noticed until another one served.",
            ["component"],
            buckets=_PAUSE_BUCKETS,
            registry=registry,
        )
        self._totals = RaisedCounter(self._recoveries)
        for component, reasons in components.items():
            self._seconds.labels(component)
            for reason in reasons:
                self._recoveries.labels(component, reason)

    def lost(self, component: str, reason: str) -> None:
        """One more."""
        self._recoveries.labels(component, reason).inc()

    def have_lost(self, component: str, counts: Mapping[str, int]) -> None:
        """So many so far, by reason, counted elsewhere."""
        for reason, total in counts.items():
            self._totals.to(total, component, reason)

    def recovered(self, component: str, seconds: float) -> None:
        """Another one serves, after so long a pause."""
        self._seconds.labels(component).observe(seconds)
