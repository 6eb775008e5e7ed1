"""The controller: collects what keepers and replicas know, exports it to Prometheus, and has sessions recycled.

Owns: the rhythm, the sums over nodes and replicas, and the metrics port. Restartable: it holds nothing that cannot be
collected again. The recycler decides, the keeper does; this brings the two together. Knows nothing of HTTP requests,
engines or text.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ray
from prometheus_client import start_http_server
from prometheus_client.core import Metric
from prometheus_client.registry import CollectorRegistry
from ray.exceptions import RayError

from phi_cluster.cluster.actors import NAMESPACE, keeper_name
from phi_cluster.cluster.config import EngineConfig, RecyclerConfig, SessionsConfig
from phi_cluster.cluster.engine_recycler import EnginePolicy, EngineRecycles, EngineReport
from phi_cluster.cluster.errors import PhiError
from phi_cluster.cluster.event_ring import EventRing
from phi_cluster.cluster.events import EventKind, EventLog
from phi_cluster.cluster.overview import ReplicaView, cluster_view
from phi_cluster.cluster.processes import is_running, kill_for_sure, private_bytes
from phi_cluster.cluster.replica_news import ReplicaNews
from phi_cluster.cluster.session.accounts import UsageTotals
from phi_cluster.cluster.session.recycler import RecyclePolicy, RecycleReason, SessionSnapshot, decide, sleepers
from phi_cluster.cluster.session.reports import KeeperReport, SessionReport, private_or_zero
from phi_cluster.cluster.speed_history import SpeedHistory
from phi_cluster.cluster.watch_api import EventPage
from phi_cluster.cluster.worker_logs import logs_folder, prune_logs
from phi_cluster.monitoring.metrics import (
    FamilySnapshot,
    KeyView,
    NodeView,
    key_metrics,
    merge_snapshots,
    node_metrics,
    snapshot_of,
    without_gauges,
)

logger = logging.getLogger(__name__)

# A replica that has not reported for so long does not count in gauges. Only one that is gone for sure is folded into
# the sums: if it reported again, it would count twice.
_REPLICA_SILENCE_SECONDS = 5.0
_REPLICA_GONE_SECONDS = 600.0
# Longer than a hand-over may wait for a turn; a keeper or an actor that hangs must not stop the rounds.
_RECYCLE_SECONDS = 30.0
# Between two looks for sessions that nobody has used for long.
_SWEEP_SECONDS = 600.0
# Between two looks for logs of dead processes, and of how many of these they are kept.
_LOGS_SECONDS = 60.0
_KEPT_LOGS = 100


# A keeper that does not answer for so long, so many times in a row, hangs.
_KEEPER_SECONDS = 5.0
_KEEPER_SILENCES = 3


@ray.remote(num_cpus=0)
class Controller:
    """`weights_nbytes` is what the object store holds of them on each node; `hibernates`: keepers have somewhere to put
    idle sessions' caches; `runtime_dir` is the server's (runtime_dir.py)."""

    def __init__(
        self,
        sessions: SessionsConfig,
        recycler: RecyclerConfig,
        engine: EngineConfig,
        metrics_host: str,
        metrics_port: int,
        weights_nbytes: int,
        hibernates: bool,
        runtime_dir: Path,
    ):
        self._policy = RecyclePolicy(
            max_age=sessions.max_age,
            max_turns=sessions.max_turns,
            max_private_growth=sessions.max_private_growth,
            idle_timeout=sessions.idle_timeout,
        )
        self._hibernate_after = sessions.hibernate_after if hibernates else None
        self._retains = sessions.retention is None
        # By node: when its keeper was last told to delete what nobody uses.
        self._swept: dict[str, float] = {}
        self._rhythm = recycler
        self._engine_recycles = EngineRecycles(
            EnginePolicy(engine.max_age, engine.max_steps, engine.max_private_growth)
        )
        self._logs = logs_folder(runtime_dir)
        self._logs_pruned_at = -math.inf
        self._metrics_address = (metrics_host, metrics_port)
        self._weights_nbytes = weights_nbytes
        self._reports: dict[str, KeeperReport] = {}
        # Counters of keepers that were restarted since.
        self._past_recycles: Counter[str] = Counter()
        self._past_activations = 0
        self._past_counts: Counter[str] = Counter()
        # When each reported, what, and its processes by kind.
        self._replicas: dict[str, tuple[float, list[FamilySnapshot], dict[str, list[int]]]] = {}
        # The sums of all replicas that are gone.
        self._past_replicas: list[FamilySnapshot] = []
        # How often in a row each node's keeper has not answered.
        self._silent_keepers: Counter[str] = Counter()
        # What each tenant has used, on each node.
        self._usage: dict[tuple[str, str], UsageTotals] = {}
        # What each replica told of itself, beside its counters.
        self._told: dict[str, tuple[ReplicaNews, EngineReport | None]] = {}
        self._lost_replicas: set[str] = set()
        self._speeds = SpeedHistory()
        # What the controller itself notices, and all that happens.
        self._own_events = EventLog(time.time)
        self._own_events.add(EventKind.CONTROLLER_STARTED)
        self._events = EventRing(time.time)
        self._started_at = time.monotonic()
        self._running: asyncio.Task[None] | None = None

    async def start(self) -> int:
        """Opens the metrics port and begins. Idempotent; returns the pid."""
        if self._running is None:
            registry = CollectorRegistry()
            registry.register(self)
            host, port = self._metrics_address
            self._server, _ = start_http_server(port, addr=host, registry=registry)
            self._running = asyncio.create_task(self._run())
        return os.getpid()

    async def report_replica(
        self,
        replica_id: str,
        snapshot: list[FamilySnapshot],
        pid: int,
        engine: EngineReport | None,
        standby_pids: list[int],
        news: ReplicaNews,
    ) -> RecycleReason | None:
        """A replica's counters so far, the pids of its processes, and its news, about once a second. The
        answer: why its engine is to be renewed now, if it is."""
        await self.start()
        pids = {"replica": [pid], "engine": [engine.pid] if engine else [], "standby_engine": standby_pids}
        self._replicas[replica_id] = (time.monotonic(), snapshot, pids)
        self._told[replica_id] = (news, engine)
        self._events.take(f"replica-{replica_id[:12]}", news.node_id, news.events)
        return self._engine_recycles.take(replica_id, engine, time.monotonic())

    async def request_engine_recycles(self) -> int:
        """Has the engines of all replicas renewed, one after the other; returns how many."""
        return self._engine_recycles.request_all(time.monotonic())

    async def overview(self) -> dict[str, Any]:
        """The cluster as it is, under the names of the HTTP API."""
        now = time.monotonic()
        replicas = [
            ReplicaView(name, pids["replica"][0], news, now - at, snapshot, engine, pids["standby_engine"])
            for name, (at, snapshot, pids) in self._replicas.items()
            if name not in self._lost_replicas
            for news, engine in [self._told[name]]
        ]
        controller = {"pid": os.getpid(), "age_seconds": round(now - self._started_at, 1)}
        return cluster_view(
            time.time(),
            self._reports.values(),
            replicas,
            controller | {"private_bytes": private_bytes()},
            self._weights_nbytes,
            self._speeds.speeds(60.0),
            self._speeds.series(),
            private_or_zero,
        )

    async def events(self, after: int | None, limit: int, tenant: str | None, wait_seconds: float) -> EventPage:
        """See watch_api.Watch."""
        return await self._events.page(after, limit, tenant, wait_seconds)

    async def end_event_streams(self) -> None:
        """The server is about to stop: whoever waits for events is told that no more will come."""
        self._events.close()

    async def num_open_requests(self) -> int:
        """Requests running or waiting in all replicas, as last reported."""
        names = ("phi_num_requests_running", "phi_num_requests_waiting")
        return sum(
            int(value)
            for snapshot in self._snapshots()
            for name, _, _, samples in snapshot
            if name in names
            for _, _, value in samples
        )

    async def num_replicas(self) -> int:
        """Replicas that have reported lately."""
        deadline = time.monotonic() - _REPLICA_SILENCE_SECONDS
        return sum(at >= deadline for at, _, _ in self._replicas.values())

    def collect(self) -> Iterator[Metric]:
        """All metrics, for prometheus_client; from what was collected last."""
        reports = list(self._reports.values())
        recycles = self._past_recycles + sum((Counter(r.recycles) for r in reports), Counter())
        activations = self._past_activations + sum(r.activations for r in reports)
        counts = self._past_counts + sum((Counter(r.counts) for r in reports), Counter())
        views = [self._view(r) for r in reports]
        yield from node_metrics(views, activations, dict(recycles), self._weights_nbytes, dict(counts))
        yield from key_metrics([_key_view(totals) for totals in list(self._usage.values())])
        yield from merge_snapshots([self._past_replicas, *self._snapshots()])

    def _snapshots(self) -> list[list[FamilySnapshot]]:
        """What each replica reported last; of those that are silent, without what was true only then."""
        deadline = time.monotonic() - _REPLICA_SILENCE_SECONDS
        replicas = list(self._replicas.values())
        return [snapshot if at >= deadline else without_gauges(snapshot) for at, snapshot, _ in replicas]

    async def _run(self) -> None:
        while True:
            try:
                await self._round()
            except Exception:
                # Whatever it is: without this task nothing would be renewed, and the metrics would stand still.
                logger.exception("a round of the controller failed")
            await asyncio.sleep(self._rhythm.interval)

    async def _round(self) -> None:
        self._forget_silent_replicas()
        self._notice_lost_replicas()
        self._speeds.take(time.time(), [self._past_replicas, *self._snapshots()])
        here = ray.get_runtime_context().get_node_id()
        self._events.take("controller", here, self._own_events.after(self._events.seen("controller")))
        await self._prune_logs()
        for node in ray.nodes():
            if not node["Alive"]:
                self._forget_node(node["NodeID"])
                continue
            try:
                keeper = ray.get_actor(keeper_name(node["NodeID"]), namespace=NAMESPACE)
                report = await asyncio.wait_for(keeper.report.remote(self._events_of(node["NodeID"])), _KEEPER_SECONDS)
            except (ValueError, RayError) as error:
                # No keeper there (yet), or it is being restarted.
                logger.info("no report of node %s: %s", node["NodeID"], type(error).__name__)
                self._silent_keepers.pop(node["NodeID"], None)
                continue
            except asyncio.TimeoutError:
                await self._on_silence(node["NodeID"])
                continue
            self._silent_keepers.pop(node["NodeID"], None)
            self._take(report)
            await self._recycle(keeper, report)
            await self._sweep(keeper, report.node_id)

    async def _sweep(self, keeper: Any, node_id: str) -> None:
        now = time.monotonic()
        if self._retains or now - self._swept.get(node_id, -math.inf) < _SWEEP_SECONDS:
            return
        self._swept[node_id] = now
        try:
            await asyncio.wait_for(keeper.delete_unused.remote(), _RECYCLE_SECONDS)
        except (PhiError, RayError, asyncio.TimeoutError) as error:
            logger.info("unused sessions were not deleted: %s", error)

    async def _prune_logs(self) -> None:
        now = time.monotonic()
        if now - self._logs_pruned_at >= _LOGS_SECONDS:
            self._logs_pruned_at = now
            await asyncio.to_thread(prune_logs, self._logs, _KEPT_LOGS, is_running)

    async def _on_silence(self, node_id: str) -> None:
        """The node's keeper did not answer. One that hangs keeps every turn of the node waiting: it is ended, and Ray
        starts another."""
        self._silent_keepers[node_id] += 1
        report = self._reports.get(node_id)
        logger.warning("the keeper of node %s does not answer", node_id)
        if self._silent_keepers[node_id] < _KEEPER_SILENCES or report is None:
            return
        # A process is killed where it runs.
        if node_id == ray.get_runtime_context().get_node_id():
            logger.error("the keeper (pid %d) hangs and is replaced", report.process.pid)
            self._own_events.add(EventKind.KEEPER_HUNG)
            await kill_for_sure(report.process)
            del self._silent_keepers[node_id]

    async def _recycle(self, keeper: Any, report: KeeperReport) -> None:
        now = time.time()
        named = {s.stats.key.digest: s for s in report.sessions if not s.stats.key.ephemeral}
        snapshots = [_snapshot(s, now) for s in named.values()]
        for digest in sleepers(snapshots, self._hibernate_after, now, self._rhythm.max_per_round):
            try:
                call = keeper.put_to_sleep.remote(named.pop(digest).stats.key)
                await asyncio.wait_for(call, _RECYCLE_SECONDS)
            except (PhiError, RayError, asyncio.TimeoutError) as error:
                logger.info("a session was not put to sleep: %s", error)
        reports = {digest: s for digest, s in named.items() if s.actor_pid is not None}
        snapshots = [_snapshot(s, now) for s in reports.values()]
        for order in decide(snapshots, self._policy, now, self._rhythm.max_per_round):
            try:
                call = keeper.recycle.remote(reports[order.digest].stats.key, order.reason)
                await asyncio.wait_for(call, _RECYCLE_SECONDS)
            except (PhiError, RayError, asyncio.TimeoutError) as error:
                # In a long turn, deleted meanwhile, or its actor died: the next round looks again.
                logger.info("a session was not recycled (%s): %s", order.reason.value, error)

    def _take(self, report: KeeperReport) -> None:
        before = self._reports.get(report.node_id)
        if before is not None and before.process != report.process:
            self._remember_counters(before)
            self._own_events.add(EventKind.KEEPER_REPLACED)
            self._events.forget(_source(before))
        self._events.take(_source(report), report.node_id, report.events)
        self._reports[report.node_id] = report
        for totals in report.usage:
            # A keeper that was killed has forgotten its last seconds: a counter that went back would count all anew.
            place = report.node_id, totals.tenant
            if totals.requests >= (self._usage[place].requests if place in self._usage else 0):
                self._usage[place] = totals

    def _forget_node(self, node_id: str) -> None:
        report = self._reports.pop(node_id, None)
        if report is not None:
            self._remember_counters(report)
            self._own_events.add(EventKind.NODE_LOST, reason=node_id[:12])

    def _remember_counters(self, report: KeeperReport) -> None:
        self._past_recycles.update(report.recycles)
        self._past_activations += report.activations
        self._past_counts.update(report.counts)

    def _forget_silent_replicas(self) -> None:
        deadline = time.monotonic() - _REPLICA_GONE_SECONDS
        for replica_id, (reported_at, snapshot, _) in list(self._replicas.items()):
            if reported_at < deadline:
                del self._replicas[replica_id]
                del self._told[replica_id]
                self._lost_replicas.discard(replica_id)
                self._events.forget(f"replica-{replica_id[:12]}")
                past = merge_snapshots([self._past_replicas, without_gauges(snapshot)])
                self._past_replicas = snapshot_of(past)

    def _notice_lost_replicas(self) -> None:
        deadline = time.monotonic() - _REPLICA_SILENCE_SECONDS
        silent = {name for name, (reported_at, *_) in self._replicas.items() if reported_at < deadline}
        for name in silent - self._lost_replicas:
            self._own_events.add(EventKind.REPLICA_LOST, reason=name[:12])
        self._lost_replicas = silent

    def _events_of(self, node_id: str) -> int:
        """The last event that the node's keeper has told, by its own count; 0 of another keeper than before."""
        report = self._reports.get(node_id)
        return 0 if report is None else self._events.seen(_source(report))

    def _view(self, report: KeeperReport) -> NodeView:
        kv_bytes: Counter[str] = Counter()
        sessions: Counter[str] = Counter(stored=report.num_stored, hibernated=report.num_hibernated)
        for s in report.sessions:
            state = "ephemeral" if s.stats.key.ephemeral else "active" if s.actor_pid is not None else "held"
            kv_bytes[state] += s.stats.kv_cache_bytes
            sessions[state] += 1
        private = {
            "session_actor": sum(s.private_nbytes for s in report.sessions),
            "keeper": report.private_nbytes,
            "controller": private_bytes(),
            "replica": 0,
            "engine": 0,
            "standby_engine": 0,
        }
        # Copied: this runs in the metrics server's thread.
        for _, _, pids in list(self._replicas.values()):
            for kind, some in pids.items():
                private[kind] += sum(map(private_or_zero, some))
        return NodeView(
            node=report.node_id[:12],
            kv_bytes_by_state={"active": 0, "held": 0, "ephemeral": 0} | dict(kv_bytes),
            sessions_by_state={"active": 0, "held": 0, "ephemeral": 0} | dict(sessions),
            session_bytes=[s.stats.kv_cache_bytes for s in report.sessions],
            budget_bytes=report.budget_nbytes,
            reserved_bytes=report.reserved_nbytes,
            hibernated_bytes=report.hibernated_nbytes,
            private_bytes_by_kind=private,
        )


def _source(report: KeeperReport) -> str:
    return f"keeper-{report.process.pid}-{report.process.start_ticks}"


def _key_view(totals: UsageTotals) -> KeyView:
    return KeyView(
        key=totals.tenant,
        requests=totals.requests,
        refused=totals.refused,
        tokens_by_kind={
            "prompt": totals.prompt_tokens,
            "cached": totals.cached_tokens,
            "generation": totals.completion_tokens,
        },
    )


def _snapshot(s: SessionReport, now: float) -> SessionSnapshot:
    return SessionSnapshot(
        digest=s.stats.key.digest,
        activated_at=now - s.stats.activation_age_seconds,
        last_used=now - s.stats.idle_seconds,
        turns=s.stats.activation_turns,
        in_turn=s.stats.in_turn,
        private_nbytes=s.private_nbytes,
        private_baseline=s.private_baseline,
    )
