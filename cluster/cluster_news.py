"""The cluster as somebody watches it: what happens, and what there is just now.

Owns: the events of all processes in one row, who has gone silent, and the latest of each for the overview. Knows
nothing of Ray, of metrics' export, and of who watches.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from typing import Any

from phi_cluster.cluster.event_ring import EventRing
from phi_cluster.cluster.events import EventKind, EventLog
from phi_cluster.cluster.overview import ReplicaView, overview
from phi_cluster.cluster.processes import private_bytes
from phi_cluster.cluster.replica_report import GONE_AFTER_SECONDS, SILENT_AFTER_SECONDS, ReplicaReport
from phi_cluster.cluster.session.reports import KeeperReport
from phi_cluster.cluster.speed_history import SpeedHistory
from phi_cluster.cluster.watch_api import EventPage
from phi_cluster.monitoring.snapshots import FamilySnapshot

_LAST_SECONDS = 60.0


class ClusterNews:
    """For one event loop."""

    def __init__(self, weights_nbytes: int) -> None:
        self._weights_nbytes = weights_nbytes
        self._keepers: dict[str, KeeperReport] = {}
        # When each reported last (monotonic seconds), and what.
        self._replicas: dict[str, tuple[float, ReplicaReport]] = {}
        self._lost_replicas: set[str] = set()
        self._speeds = SpeedHistory()
        # What the controller itself notices, and all that happens.
        self._own = EventLog(time.time)
        self._own.add(EventKind.CONTROLLER_STARTED)
        self._ring = EventRing(time.time)
        self._started_at = time.monotonic()

    def add(self, kind: EventKind, reason: str = "") -> None:
        """Something that the controller itself has noticed."""
        self._own.add(kind, reason=reason)

    def take_keeper(self, report: KeeperReport) -> None:
        before = self._keepers.get(report.node_id)
        if before is not None and before.process != report.process:
            self._own.add(EventKind.KEEPER_REPLACED)
            self._ring.forget(_keeper_name(before))
        self._ring.take(_keeper_name(report), report.node_id, report.events)
        self._keepers[report.node_id] = report

    def take_replica(self, report: ReplicaReport) -> None:
        self._replicas[report.replica_id] = time.monotonic(), report
        self._ring.take(_replica_name(report.replica_id), report.node_id, report.events)

    def forget_node(self, node_id: str) -> None:
        """The node is dead."""
        if self._keepers.pop(node_id, None) is not None:
            self._own.add(EventKind.NODE_LOST, reason=node_id[:12])

    def look(self, here: str, snapshots: Iterable[list[FamilySnapshot]]) -> None:
        """Once a round: who is silent, how fast the cluster is by all that was ever counted, and what was noticed.
        `here`: the controller's node."""
        now = time.monotonic()
        for name in [name for name, (at, _) in self._replicas.items() if now - at > GONE_AFTER_SECONDS]:
            del self._replicas[name]
            self._lost_replicas.discard(name)
            self._ring.forget(_replica_name(name))
        silent = {name for name, (at, _) in self._replicas.items() if now - at > SILENT_AFTER_SECONDS}
        for name in silent - self._lost_replicas:
            self._own.add(EventKind.REPLICA_LOST, reason=name[:12])
        self._lost_replicas = silent
        self._speeds.take(time.time(), snapshots)
        self._ring.take("controller", here, self._own.after(self._ring.seen("controller")))

    def num_replicas(self, node_id: str | None = None) -> int:
        """Replicas that have reported lately: of a node, or of all."""
        now = time.monotonic()
        return sum(
            now - at <= SILENT_AFTER_SECONDS and node_id in (None, one.node_id) for at, one in self._replicas.values()
        )

    def events_of(self, node_id: str) -> int:
        """The last event that the node's keeper has told, by its own count; 0 of another keeper than before."""
        report = self._keepers.get(node_id)
        return 0 if report is None else self._ring.seen(_keeper_name(report))

    async def page(self, after: int | None, limit: int, tenant: str | None, wait_seconds: float) -> EventPage:
        """See watch_api.Watch."""
        return await self._ring.page(after, limit, tenant, wait_seconds)

    def close(self) -> None:
        """Whoever waits for events is told that no more will come."""
        self._ring.close()

    def overview(self) -> dict[str, Any]:
        """The cluster as it is, under the names of the HTTP API."""
        now = time.monotonic()
        return overview(
            time.time(),
            self._keepers.values(),
            [
                ReplicaView(one, now - at)
                for name, (at, one) in self._replicas.items()
                if name not in self._lost_replicas
            ],
            {
                "pid": os.getpid(),
                "age_seconds": round(now - self._started_at, 1),
                "private_bytes": private_bytes(),
            },
            self._weights_nbytes,
            self._speeds.speeds(_LAST_SECONDS),
            self._speeds.series(),
        )


def _keeper_name(report: KeeperReport) -> str:
    return f"keeper-{report.process.pid}-{report.process.start_ticks}"


def _replica_name(replica_id: str) -> str:
    return f"replica-{replica_id[:12]}"
