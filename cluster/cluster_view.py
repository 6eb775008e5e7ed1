"""The cluster as the controller exports it: what keepers and replicas have told, as metrics.

Owns: the latest of each, the sums of all that there were, and what a controller leaves to its successor, so that no
counter goes back when one dies. Knows nothing of Ray, of who asks for metrics, or of what is decided by them.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import NamedTuple

import msgpack
from prometheus_client import CollectorRegistry
from prometheus_client.core import Metric

from phi_cluster.cluster.messages import ProcessId
from phi_cluster.cluster.processes import private_bytes
from phi_cluster.cluster.replica_report import GONE_AFTER_SECONDS, SILENT_AFTER_SECONDS, ReplicaReport
from phi_cluster.cluster.session.accounts import UsageTotals
from phi_cluster.cluster.session.recycler import RecycleReason
from phi_cluster.cluster.session.reports import KeeperReport
from phi_cluster.monitoring.engine_metrics import EngineView, engine_metrics
from phi_cluster.monitoring.key_metrics import KeyView, key_metrics
from phi_cluster.monitoring.process_metrics import build_info, process_metrics
from phi_cluster.monitoring.recovery_metrics import RecoveryMetrics
from phi_cluster.monitoring.session_metrics import (
    SESSION_BYTES_BUCKETS,
    SESSION_TOKENS_BUCKETS,
    Distribution,
    NodeView,
    keeper_counters,
    node_metrics,
)
from phi_cluster.monitoring.snapshots import FamilySnapshot, SnapshotSums, merge_snapshots, snapshot_of

# Sessions' actors are recycled for these; they are there from the beginning, so that the first one is an increase.
_NO_RECYCLES = {reason.value: 0 for reason in RecycleReason if reason is not RecycleReason.MAX_STEPS}
_OWN = "controller"


class _Node(NamedTuple):
    """A keeper's latest report, made ready: sessions may be many, and are looked at once, not at each scrape."""

    process: ProcessId
    at: float
    view: NodeView
    private: list[tuple[str, int]]
    kv_bytes_by_tenant: dict[str, int]


class _Replica(NamedTuple):
    at: float
    slot: int
    report: ReplicaReport


class ClusterView:
    """`replicas`: how many there should be. `build`: labels of phi_build_info. `clock` is monotonic, `wall_clock`
    counts since 1970, both in seconds. `families` may be called by another thread than all else."""

    def __init__(
        self,
        replicas: int,
        weights_nbytes: int,
        build: Mapping[str, str],
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ):
        self._num_replicas = replicas
        self._weights_nbytes = weights_nbytes
        self._build = dict(build)
        self._clock = clock
        self._wall_clock = wall_clock
        self._started_at = self._server_started_at = wall_clock()
        self._num_seen = 0
        self._nodes: dict[str, _Node] = {}
        self._replicas: dict[str, _Replica] = {}
        # By node and tenant.
        self._usage: dict[tuple[str, str], UsageTotals] = {}
        self._sums = SnapshotSums(SILENT_AFTER_SECONDS)
        self._registry = CollectorRegistry()
        self._recoveries = RecoveryMetrics(
            self._registry, {"keeper": ("death", "hang"), "replica": ("death",), _OWN: ("death",)}
        )

    # What is told.

    def take_keeper(self, report: KeeperReport, *, hung: bool = False) -> None:
        """`hung`: the node's keeper before this one was ended because it did not answer."""
        now, node_id = self._clock(), report.node_id
        source = f"{node_id}/{report.process.pid}/{report.process.start_ticks}"
        for earlier in self._sums.living(f"{node_id}/"):
            if earlier != source:
                self._sums.retire(earlier)
                self._recoveries.lost("keeper", "hang" if hung else "death")
                if node_id in self._nodes:
                    self._recoveries.recovered("keeper", now - self._nodes[node_id].at)
        counted = keeper_counters(report.activations, _NO_RECYCLES | report.recycles, report.counts)
        self._sums.take(source, snapshot_of(counted) + report.snapshot, now)
        for totals in report.usage:
            # A keeper that was killed has forgotten its last seconds: a counter that went back would count all anew.
            place = node_id, totals.tenant
            if totals.requests >= (self._usage[place].requests if place in self._usage else 0):
                self._usage[place] = totals
        self._nodes[node_id] = _ready(report, now)

    def take_replica(self, report: ReplicaReport) -> None:
        now, replica_id = self._clock(), report.replica_id
        known = self._replicas.get(replica_id)
        if known is None and replica_id not in self._sums:
            self._num_seen += 1
            if self._num_seen > self._num_replicas:
                self._recoveries.lost("replica", "death")
                silent = [one.at for one in self._replicas.values() if now - one.at > SILENT_AFTER_SECONDS]
                if silent:
                    self._recoveries.recovered("replica", now - max(silent))
        self._sums.take(replica_id, report.snapshot, now)
        slot = self._free_slot(now) if known is None else known.slot
        # Its counters are in the sums already.
        self._replicas[replica_id] = _Replica(now, slot, replace(report, snapshot=[], events=[]))

    def forget_node(self, node_id: str) -> None:
        """The node is dead."""
        self._nodes.pop(node_id, None)
        for source in self._sums.living(f"{node_id}/"):
            self._sums.retire(source)

    def forget_silent(self) -> None:
        """Replicas that are gone for sure go into one sum."""
        now = self._clock()
        for replica_id in [name for name, one in self._replicas.items() if now - one.at > GONE_AFTER_SECONDS]:
            del self._replicas[replica_id]
            self._sums.retire(replica_id)

    def keeper_process(self, node_id: str) -> ProcessId | None:
        """Of the node's keeper that reported last."""
        node = self._nodes.get(node_id)
        return None if node is None else node.process

    def snapshots(self) -> list[list[FamilySnapshot]]:
        """Of all that ever counted; of those that are silent, without what was true only then."""
        return self._sums.snapshots(self._clock())

    def num_open_requests(self) -> int:
        """Requests running or waiting in all replicas, as last reported."""
        names = ("phi_num_requests_running", "phi_num_requests_waiting")
        return sum(
            int(value)
            for snapshot in self.snapshots()
            for name, _, _, samples in snapshot
            if name in names
            for _, _, value in samples
        )

    # What is exported.

    def families(self) -> Iterator[Metric]:
        """All metrics, as of what was told last: whoever asks at the same time gets the same."""
        now = self._clock()
        # Copied: this runs in the metrics server's thread.
        nodes, usage = list(self._nodes.values()), list(self._usage.items())
        replicas = [one for one in list(self._replicas.values()) if now - one.at <= SILENT_AFTER_SECONDS]
        yield from node_metrics([replace(node.view, report_age_seconds=now - node.at) for node in nodes])
        yield from engine_metrics(_engine_view(one) for one in replicas if one.report.engine is not None)
        yield from process_metrics(
            _private(nodes, replicas), self._weights_nbytes, self._server_started_at, self._started_at
        )
        yield from build_info(self._build)
        kv_bytes = sum((Counter(node.kv_bytes_by_tenant) for node in nodes), Counter[str]())
        seen: set[str] = set()
        views = []
        for (_, tenant), totals in usage:
            # A tenant's memory is told once, whatever the number of its nodes.
            views.append(_key_view(totals, 0 if tenant in seen else kv_bytes[tenant]))
            seen.add(tenant)
        yield from key_metrics(views)
        own = snapshot_of(self._registry.collect())
        yield from merge_snapshots([*self._sums.snapshots(now), own])

    # What is left to a successor.

    def pack(self) -> bytes:
        """All counters, for `succeed`."""
        sums = self._sums.pack(**{_OWN: snapshot_of(self._registry.collect())})
        packed: bytes = msgpack.packb([self._server_started_at, self._num_seen, self._wall_clock(), sums])
        return packed

    def succeed(self, data: bytes) -> None:
        """Goes on from what a controller that died has left, before anything is told. Raises ValueError if it is
        something else."""
        try:
            server_started_at, num_seen, left_at, sums = msgpack.unpackb(data)
            self._sums.unpack(sums, self._clock())
            self._server_started_at, self._num_seen = float(server_started_at), int(num_seen)
            pause = self._wall_clock() - float(left_at)
        except (ValueError, TypeError, msgpack.UnpackException) as error:
            raise ValueError(f"what the controller before this one has left cannot be read: {error}") from None
        self._sums.retire(_OWN)
        self._recoveries.lost(_OWN, "death")
        self._recoveries.recovered(_OWN, max(pause, 0.0))

    def _free_slot(self, now: float) -> int:
        taken = {one.slot for one in self._replicas.values() if now - one.at <= SILENT_AFTER_SECONDS}
        return min(set(range(len(taken) + 1)) - taken)


def _ready(report: KeeperReport, now: float) -> _Node:
    kv_bytes: Counter[str] = Counter(active=0, held=0, ephemeral=0)
    sessions: Counter[str] = Counter(
        stored=report.num_stored, hibernated=report.num_hibernated, active=0, held=0, ephemeral=0
    )
    by_tenant: Counter[str] = Counter()
    for s in report.sessions:
        kv_bytes[s.state] += s.stats.kv_cache_bytes
        sessions[s.state] += 1
        by_tenant[s.stats.key.tenant] += s.stats.kv_cache_bytes
    tenants = {totals.tenant for totals in report.usage}
    view = NodeView(
        node=_short(report.node_id),
        kv_bytes_by_state=dict(kv_bytes),
        sessions_by_state=dict(sessions),
        session_bytes=Distribution.of((s.stats.kv_cache_bytes for s in report.sessions), SESSION_BYTES_BUCKETS),
        session_tokens=Distribution.of((s.stats.num_tokens for s in report.sessions), SESSION_TOKENS_BUCKETS),
        budget_bytes=report.budget_nbytes,
        reserved_bytes=report.reserved_nbytes,
        hibernated_bytes=report.hibernated_nbytes,
        journal_bytes=report.journal_nbytes,
        warm_actors=report.num_warm,
    )
    actors = [("session_actor", s.private_nbytes) for s in report.sessions if s.actor_pid is not None]
    private = [*actors, ("session_actor", 0), ("keeper", report.private_nbytes)]
    return _Node(report.process, now, view, private, {name: by_tenant[name] for name in tenants})


def _private(nodes: list[_Node], replicas: list[_Replica]) -> Iterator[tuple[str, str, int]]:
    for node in nodes:
        for kind, nbytes in node.private:
            yield node.view.node, kind, nbytes
        # A kind of which there is none just now is 0, not nothing.
        for kind in ("replica", "engine", "standby_engine"):
            yield node.view.node, kind, 0
    for one in replicas:
        node_name = _short(one.report.node_id)
        yield node_name, "replica", one.report.private_nbytes
        if one.report.engine is not None:
            yield node_name, "engine", one.report.engine.private_nbytes
        for _, nbytes in one.report.standby_engines:
            yield node_name, "standby_engine", nbytes
    if nodes:
        yield nodes[0].view.node, "controller", private_bytes()


def _engine_view(replica: _Replica) -> EngineView:
    report = replica.report
    assert report.engine is not None
    return EngineView(
        node=_short(report.node_id),
        replica=str(replica.slot),
        age_seconds=report.engine.age_seconds,
        last_step_seconds=report.last_step_seconds,
        queue_seconds=report.queue_seconds,
        private_nbytes=report.engine.private_nbytes,
        baseline_nbytes=report.engine.private_baseline,
        mapped_nbytes=report.engine.weights_mapped,
        copied_nbytes=report.engine.weights_copied,
    )


def _key_view(totals: UsageTotals, kv_bytes: int) -> KeyView:
    return KeyView(
        key=totals.tenant,
        requests=totals.requests,
        refused=totals.refused,
        tokens_by_kind={
            "prompt": totals.prompt_tokens,
            "cached": totals.cached_tokens,
            "generation": totals.completion_tokens,
        },
        since=totals.since,
        kv_bytes=kv_bytes,
    )


def _short(node_id: str) -> str:
    return node_id[:12]
