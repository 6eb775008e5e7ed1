"""All that a replica counts, in one registry that travels to the controller as snapshots and is summed there.

Owns: the registry. Knows nothing of what is counted.
"""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import CollectorRegistry

from phi_cluster.monitoring.engine_metrics import EngineMetrics
from phi_cluster.monitoring.forward_metrics import ForwardMetrics
from phi_cluster.monitoring.request_metrics import RequestMetrics
from phi_cluster.monitoring.session_metrics import JournalMetrics
from phi_cluster.monitoring.snapshots import FamilySnapshot, snapshot_of


class ReplicaMetrics:
    """`engine_recycle_reasons`: why an engine may be renewed."""

    def __init__(self, engine_recycle_reasons: Iterable[str] = ()) -> None:
        self.registry = CollectorRegistry()
        self.requests = RequestMetrics(self.registry)
        self.engines = EngineMetrics(self.registry, engine_recycle_reasons)
        self.journals = JournalMetrics(self.registry)
        self.forwards = ForwardMetrics(self.registry)

    def snapshot(self, num_running: int, num_elsewhere: int = 0) -> list[FamilySnapshot]:
        """All families with their samples, picklable; the engine runs so many sequences now, and so many replies are
        made by other replicas."""
        self.requests.on_running(num_running, num_elsewhere)
        return snapshot_of(self.registry.collect())
