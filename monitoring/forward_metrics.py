"""What a replica counts of turns that other nodes have to do with.

Owns: this family. Implements forwarding.ForwardObserver. Knows nothing of how a turn gets to a node.
"""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter

_OUTCOMES = ("forwarded", "moved", "lost")


class ForwardMetrics:
    """All of them are there from the beginning, so that the first one is an increase."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._turns = Counter(
            "phi_forwarded_turns",
            "Turns that were run on another node than they came to (forwarded), whose session's memory was fetched "
            "from another node first (moved), and forwarded ones whose node was lost, so that they went on (lost).",
            ["outcome"],
            registry=registry,
        )
        for outcome in _OUTCOMES:
            self._turns.labels(outcome)

    def on_forward(self, outcome: str) -> None:
        """One of the above."""
        self._turns.labels(outcome).inc()
