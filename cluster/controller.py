"""The controller: collects what keepers and replicas know, exports it to Prometheus, and has sessions recycled.

Owns: the rhythm, and the metrics port. Restartable: it holds nothing that cannot be collected again, but the counters
of processes that are gone, which it leaves in a file to its successor. The recycler decides, the keeper does; this
brings the two together. Knows nothing of HTTP requests, engines or text.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import ray
from prometheus_client import start_http_server
from prometheus_client.core import Metric
from prometheus_client.registry import CollectorRegistry
from ray.exceptions import RayError

from phi_cluster.cluster.actors import NAMESPACE, keeper_names, keeper_of, weight_store_name
from phi_cluster.cluster.cluster_news import ClusterNews
from phi_cluster.cluster.cluster_view import ClusterView
from phi_cluster.cluster.config import Config
from phi_cluster.cluster.draining_nodes import DrainingNodes
from phi_cluster.cluster.engine_recycler import EnginePolicy, EngineRecycles
from phi_cluster.cluster.errors import KeeperMoved, PhiError
from phi_cluster.cluster.events import EventKind
from phi_cluster.cluster.growth import GrowthWatch
from phi_cluster.cluster.heap import keep_heap_trimmed
from phi_cluster.cluster.kv_load import KVLoad, KVLoads
from phi_cluster.cluster.logs import log_as
from phi_cluster.cluster.messages import ProcessId
from phi_cluster.cluster.node_rest import NodeRests
from phi_cluster.cluster.node_starts import NodeStarts
from phi_cluster.cluster.node_tasks import end_process
from phi_cluster.cluster.peers import PeerBook, PeerNews, ReplicaOrders
from phi_cluster.cluster.processes import is_running, kill_for_sure, private_bytes, process_id
from phi_cluster.cluster.replica_report import ReplicaReport
from phi_cluster.cluster.served_model import ServedModel
from phi_cluster.cluster.session.recycler import RecyclePolicy, SessionSnapshot, decide, sleepers
from phi_cluster.cluster.session.reports import KeeperReport, SessionReport
from phi_cluster.cluster.watch_api import EventPage
from phi_cluster.cluster.worker_logs import logs_folder, prune_logs

logger = logging.getLogger(__name__)

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
    """`weights_nbytes` is what the object store holds of them on each node; `build`: see cluster_view.py. `runtime_dir`
    is the server's (runtime_dir.py): one controller leaves its counters there to the next. They go with the server: the
    next one's counters begin anew, and Prometheus takes it so."""

    def __init__(
        self, served: ServedModel, config: Config, weights_nbytes: int, build: Mapping[str, str], runtime_dir: Path
    ):
        log_as("controller")
        keep_heap_trimmed()
        sessions, engine = config.sessions, config.engine
        self._policy = RecyclePolicy(
            max_age=sessions.max_age,
            max_turns=sessions.max_turns,
            max_private_growth=sessions.max_private_growth,
            idle_timeout=sessions.idle_timeout,
        )
        self._hibernate_after = sessions.hibernate_after if config.kv.hibernate_quota else None
        self._retains = sessions.retention is None
        # By node: when its keeper was last told to delete what nobody uses.
        self._swept: dict[str, float] = {}
        self._rhythm = config.recycler
        self._keeper_growth = GrowthWatch(config.recycler.max_keeper_growth)
        self._own_growth = GrowthWatch(config.recycler.max_controller_growth)
        self._engine_recycles = EngineRecycles(
            EnginePolicy(engine.max_age, engine.max_steps, engine.max_private_growth)
        )
        self._metrics_address = (config.server.metrics_host, config.server.metrics_port)
        self._view = ClusterView(config.max_replicas, weights_nbytes, build)
        self._left_path = runtime_dir / "counters"
        with suppress(FileNotFoundError):
            try:
                self._view.succeed(self._left_path.read_bytes())
            except (ValueError, OSError) as error:
                if isinstance(error, FileNotFoundError):
                    raise
                logger.warning("counters begin anew: %s", error)
        # How often in a row each node's keeper has not answered, and whose was ended for it.
        self._silent_keepers: Counter[str] = Counter()
        self._hung_keepers: set[str] = set()
        self._news = ClusterNews(weights_nbytes)
        self._kv_loads = KVLoads()
        self._rests = NodeRests(config.nodes.idle_timeout, time.monotonic)
        self._node_starts = NodeStarts(served, config, self._news) if config.has_nodes else None
        self._draining = DrainingNodes(self._news, keeper_of) if config.has_nodes else None
        self._peers = PeerBook()
        self._logs = logs_folder(runtime_dir)
        self._logs_pruned_at = -math.inf
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

    async def report_replica(self, report: ReplicaReport) -> ReplicaOrders:
        """About once a second."""
        await self.start()
        self._view.take_replica(report)
        self._news.take_replica(report)
        # It may have come while its node was about to rest.
        self._rests.wake(report.node_id)
        self._peers.take_replica(report)
        reason = self._engine_recycles.take(report.replica_id, report.engine, time.monotonic())
        return ReplicaOrders(reason, ray.get_runtime_context().get_node_id(), self._peers.news())

    async def peers(self) -> PeerNews:
        """What replicas are told of each other."""
        return self._peers.news()

    async def request_engine_recycles(self) -> int:
        """Has the engines of all replicas renewed, one after the other; returns how many."""
        return self._engine_recycles.request_all(time.monotonic())

    async def overview(self) -> dict[str, Any]:
        """The cluster as it is, under the names of the HTTP API."""
        return self._news.overview()

    async def events(self, after: int | None, limit: int, tenant: str | None, wait_seconds: float) -> EventPage:
        """See watch_api.Watch."""
        return await self._news.page(after, limit, tenant, wait_seconds)

    async def end_event_streams(self) -> None:
        """The server is about to stop."""
        self._news.close()

    async def is_drained(self, node_id: str) -> bool:
        """Whether neither a replica nor a session's memory is left on a node that leaves."""
        assert self._draining is not None
        is_empty = self._rests.rests(node_id) or self._draining.is_empty(node_id)
        return not self._news.num_replicas(node_id) and is_empty

    async def num_replicas(self) -> int:
        """Replicas that have reported lately."""
        return self._news.num_replicas()

    async def want_node(self, node_id: str) -> None:
        """A replica has come to a node that has no keeper."""
        self._rests.wake(node_id)

    async def kv_load(self, node_id: str) -> KVLoad:
        """What a replica of the node tells Serve's autoscaling of the node's memory."""
        return self._kv_loads.share(node_id, self._news.num_replicas(node_id))

    async def num_open_requests(self) -> int:
        """Requests running or waiting in all replicas, as last reported."""
        return self._view.num_open_requests()

    def collect(self) -> Iterator[Metric]:
        """All metrics, for prometheus_client; from what was collected last."""
        return self._view.families()

    async def _run(self) -> None:
        while True:
            try:
                await self._round()
                await asyncio.to_thread(self._leave, self._view.pack())
            except Exception:
                # Whatever it is: without this task nothing would be renewed, and the metrics would stand still.
                logger.exception("a round of the controller failed")
            await asyncio.sleep(self._rhythm.interval)

    def _leave(self, packed: bytes) -> None:
        """For the next controller: all of it, or what was there before."""
        aside = self._left_path.with_suffix(".new")
        aside.write_bytes(packed)
        aside.rename(self._left_path)

    async def _round(self) -> None:
        self._view.forget_silent()
        self._news.look(ray.get_runtime_context().get_node_id(), self._view.snapshots())
        await self._prune_logs()
        nodes = ray.nodes()
        if self._draining is not None:
            draining = await asyncio.to_thread(ray._private.state.state.get_draining_nodes)
            self._peers.drain(draining)
            self._draining.look(draining, [n["NodeID"] for n in nodes if n["Alive"] and n["NodeID"] not in draining])
        for node in nodes:
            if not node["Alive"]:
                self._peers.forget_node(node["NodeID"])
                self._view.forget_node(node["NodeID"])
                self._news.forget_node(node["NodeID"])
                self._kv_loads.forget(node["NodeID"])
                self._rests.forget(node["NodeID"])
                continue
            if self._rests.rests(node["NodeID"]):
                continue
            try:
                keeper, report = await self._report_of(node["NodeID"])
            except (ValueError, RayError) as error:
                # No keeper there (yet), or it is being restarted.
                if isinstance(error, ValueError) and self._node_starts is not None:
                    self._node_starts.wanted(node["NodeID"])
                logger.info("no report of node %s: %s", node["NodeID"], type(error).__name__)
                self._silent_keepers.pop(node["NodeID"], None)
                continue
            except asyncio.TimeoutError:
                await self._on_silence(node["NodeID"])
                continue
            self._silent_keepers.pop(node["NodeID"], None)
            self._view.take_keeper(report, hung=report.node_id in self._hung_keepers)
            self._hung_keepers.discard(report.node_id)
            self._news.take_keeper(report)
            self._kv_loads.take(report)
            self._peers.take_keeper(report)
            if await self._let_rest(keeper, report.node_id):
                continue
            await self._recycle(keeper, report)
            await self._sweep(keeper, report.node_id)
            await self._renew_keeper(keeper, report)
        if self._own_growth.exceeds("here", os.getpid(), private_bytes(), time.monotonic()):
            # Ray starts another, which collects all of this again.
            logger.warning("the controller has grown too much and is renewed")
            await kill_for_sure(process_id())

    async def _let_rest(self, keeper: Any, node_id: str) -> bool:
        """Whether the node's actors were ended, since it has had no replica for long."""
        is_here = node_id == ray.get_runtime_context().get_node_id()
        if is_here or not self._rests.should_rest(node_id, self._news.num_replicas(node_id)):
            return False
        others = [n["NodeID"] for n in ray.nodes() if n["Alive"] and not self._rests.rests(n["NodeID"])]
        with suppress(PhiError, RayError, asyncio.TimeoutError):
            targets = [other for other in others if other != node_id]
            await asyncio.wait_for(keeper.evacuate.remote(targets, _RECYCLE_SECONDS / 2), _RECYCLE_SECONDS)
            await asyncio.wait_for(keeper.close.remote(), _RECYCLE_SECONDS)
        self._rests.rest(node_id)
        for name in (*keeper_names(node_id), weight_store_name(node_id)):
            with suppress(ValueError):
                ray.kill(ray.get_actor(name, namespace=NAMESPACE))
        self._peers.forget_node(node_id)
        self._view.forget_node(node_id)
        self._kv_loads.forget(node_id)
        self._news.add(EventKind.NODE_RESTS, reason=node_id[:12])
        return True

    async def _report_of(self, node_id: str) -> tuple[Any, KeeperReport]:
        """The keeper that is in charge there, and what it tells. Raises ValueError if there is none, RayError and
        TimeoutError."""
        for name in keeper_names(node_id):
            with suppress(ValueError, KeeperMoved):
                keeper = ray.get_actor(name, namespace=NAMESPACE)
                told = self._news.events_of(node_id)
                return keeper, await asyncio.wait_for(keeper.report.remote(told), _KEEPER_SECONDS)
        raise ValueError(f"no keeper of node {node_id} is in charge")

    async def _renew_keeper(self, keeper: Any, report: KeeperReport) -> None:
        """If it has grown too much: it makes its successor itself."""
        if not self._keeper_growth.exceeds(report.node_id, report.process, report.private_nbytes, time.monotonic()):
            return
        try:
            is_renewed = await asyncio.wait_for(keeper.renew.remote(), _RECYCLE_SECONDS)
        except (PhiError, RayError, asyncio.TimeoutError) as error:
            logger.info("the keeper was not renewed: %s", type(error).__name__)
            return
        if is_renewed:
            logger.warning("the keeper (pid %d) has grown too much and has been renewed", report.process.pid)

    async def _prune_logs(self) -> None:
        now = time.monotonic()
        if now - self._logs_pruned_at >= _LOGS_SECONDS:
            self._logs_pruned_at = now
            await asyncio.to_thread(prune_logs, self._logs, _KEPT_LOGS, is_running)

    async def _sweep(self, keeper: Any, node_id: str) -> None:
        now = time.monotonic()
        if self._retains or now - self._swept.get(node_id, -math.inf) < _SWEEP_SECONDS:
            return
        self._swept[node_id] = now
        try:
            await asyncio.wait_for(keeper.delete_unused.remote(), _RECYCLE_SECONDS)
        except (PhiError, RayError, asyncio.TimeoutError) as error:
            logger.info("unused sessions were not deleted: %s", error)

    async def _on_silence(self, node_id: str) -> None:
        """The node's keeper did not answer. One that hangs keeps every turn of the node waiting: it is ended, and Ray
        starts another."""
        self._silent_keepers[node_id] += 1
        process = self._view.keeper_process(node_id)
        logger.warning("the keeper of node %s does not answer", node_id)
        if self._silent_keepers[node_id] < _KEEPER_SILENCES or process is None:
            return
        logger.error("the keeper (pid %d) hangs and is replaced", process.pid)
        self._news.add(EventKind.KEEPER_HUNG)
        await self._end_process(node_id, process)
        self._hung_keepers.add(node_id)
        del self._silent_keepers[node_id]

    async def _end_process(self, node_id: str, process: ProcessId) -> None:
        """A process is killed where it runs."""
        if node_id == ray.get_runtime_context().get_node_id():
            await kill_for_sure(process)
            return
        try:
            await asyncio.wait_for(end_process(node_id, process), _RECYCLE_SECONDS)
        except (RayError, asyncio.TimeoutError) as error:
            logger.warning("process %d of node %s was not ended: %s", process.pid, node_id[:12], error)

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
