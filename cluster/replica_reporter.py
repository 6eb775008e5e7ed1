"""What a replica tells the controller once a second, and what it does by the answer.

Owns: that round, and how the numbers of a ReplicaReport are found. Knows nothing of HTTP, and of what the controller
makes of them.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Callable
from typing import Any, Protocol

from ray.exceptions import RayError

from phi_cluster.cluster.config import Config
from phi_cluster.cluster.engine_client import EngineClient
from phi_cluster.cluster.engine_health import EngineHealth
from phi_cluster.cluster.engine_recycler import EngineReport
from phi_cluster.cluster.errors import StartError
from phi_cluster.cluster.events import EventLog
from phi_cluster.cluster.head_start import HeadWatch, start_on_head
from phi_cluster.cluster.keys import KeyFile
from phi_cluster.cluster.kv_load import KVLoad
from phi_cluster.cluster.mapped_weights import Mapped, MappedWeights
from phi_cluster.cluster.peers import PeerTable
from phi_cluster.cluster.replica_report import ReplicaReport
from phi_cluster.cluster.session.recycler import RecycleReason
from phi_cluster.cluster.session.reports import private_or_zero
from phi_cluster.cluster.standby import StandbyEngines
from phi_cluster.monitoring.replica_metrics import ReplicaMetrics

logger = logging.getLogger(__name__)

# Whoever starts the server asks the replicas whether they are ready. One that nobody asks takes it for started then.
_UNASKED_SECONDS = 30.0
_SETTLE_SECONDS = 60.0


class OpenTurns(Protocol):
    """Of turn.py's Turns, what is told."""

    @property
    def num_open(self) -> int: ...


class ReplicaReporter:
    """Attributes: `told`, set when the controller has answered once; `kv_load`, what it has said of this node last."""

    def __init__(
        self,
        replica_id: str,
        node_id: str,
        config: Config,
        metrics: ReplicaMetrics,
        events: EventLog,
        engines: EngineClient,
        standbys: StandbyEngines,
        health: EngineHealth,
        turns: OpenTurns,
        peers: PeerTable,
        *,
        controller: Callable[[], Any],
        find_address: Callable[[], str],
        num_forwarded: Callable[[], int],
        keys: KeyFile | None = None,
        head_watch: HeadWatch | None = None,
        round_seconds: float = 1.0,
    ):
        """`controller` finds the actor, or raises ValueError; `find_address` is
        asked, once an engine serves, until it knows where peers reach this replica; `num_forwarded` turns are run by
        peers just now. `keys` are looked at again in each round. `head_watch`: see head_start.py."""
        self._replica_id = replica_id
        self._node_id = node_id
        self._config = config
        self._metrics = metrics
        self._events = events
        self._events_told = 0
        self._engines = engines
        self._standbys = standbys
        self._health = health
        self._turns = turns
        self._peers = peers
        self._controller = controller
        self._find_address = find_address
        self._address = ""
        self._num_forwarded = num_forwarded
        self._keys = keys
        self._head_watch = head_watch
        self._weights = MappedWeights()
        # Of which engine, and what it needs.
        self._engine_baseline = (0, 0)
        self._recycling: asyncio.Task[None] | None = None
        self._round_seconds = round_seconds
        self._began_at = time.monotonic()
        self.told = asyncio.Event()
        self.kv_load = KVLoad(0, 0)

    async def run(self) -> None:
        """Until it is cancelled."""
        found: Any = None
        while True:
            if self._keys is not None and (told := await asyncio.to_thread(self._keys.refresh)):
                logger.warning("%s", told)
            if self._age > _UNASKED_SECONDS and self._engines.ready:
                self._health.started.set()
            try:
                # Looked for once: that asks the GCS, and nothing else goes on here meanwhile.
                found = found or self._controller()
                await self._tell(found)
            except (ValueError, RayError):
                # It is being replaced: its successor is told all that is still known.
                found = None
                self._events_told = 0
                self._look_after_head()
            await asyncio.sleep(self._round_seconds)

    @property
    def _age(self) -> float:
        return time.monotonic() - self._began_at

    async def _tell(self, controller: Any) -> None:
        report = self._report(await self._look_at_weights())
        orders = await controller.report_replica.remote(report)
        if self._config.has_nodes and self._config.autoscaling.max_replicas is not None:
            self.kv_load = await controller.kv_load.remote(self._node_id)
        self._events_told = max([self._events_told, *(event.number for event in report.events)])
        self._peers.take(orders, report.num_open_turns)
        self.told.set()
        if orders.recycle is not None and self._recycling is None:
            self._recycling = asyncio.get_running_loop().create_task(self._recycle_engine(orders.recycle))
        if self._head_watch is not None:
            self._head_watch.seen()

    def _look_after_head(self) -> None:
        if self._head_watch is not None and self._head_watch.should_start():
            logger.error("there is no controller; starting the head's part again")
            with contextlib.suppress(StartError, RayError):
                start_on_head(self._config)

    async def _look_at_weights(self) -> Mapped:
        engine = self._engines.engine
        return Mapped() if engine is None else await self._weights.of(engine.process.pid)

    def _report(self, weights: Mapped) -> ReplicaReport:
        engines, standby_pids = self._engines, self._standbys.pids
        recoveries = {"engine": engines.recoveries, "standby_engine": self._standbys.losses}
        self._metrics.engines.on_engines(recoveries, len(standby_pids), engines.recycles)
        self._metrics.engines.on_totals(engines.totals._asdict())
        if not self._address and engines.ready:
            self._address = self._find_address()
        return ReplicaReport(
            replica_id=self._replica_id,
            node_id=self._node_id,
            pid=os.getpid(),
            age_seconds=self._age,
            snapshot=self._metrics.snapshot(engines.last_step.num_running, self._num_forwarded()),
            private_nbytes=private_or_zero(os.getpid()),
            standby_engines=tuple((pid, private_or_zero(pid)) for pid in standby_pids),
            engine=self._engine_report(weights),
            last_step_seconds=self._health.silence(),
            queue_seconds=engines.last_step.queue_seconds,
            events=self._events.after(self._events_told),
            address=self._address,
            num_open_turns=self._turns.num_open,
            max_running_turns=self._config.engine.max_num_seqs,
        )

    def _engine_report(self, weights: Mapped) -> EngineReport | None:
        engine = self._engines.engine
        if engine is None:
            return None
        age = time.monotonic() - self._engines.serving_since
        private = private_or_zero(engine.process.pid)
        pid, baseline = self._engine_baseline
        if pid != engine.process.pid:
            baseline = private
        # What it takes in its first minute is what it needs.
        self._engine_baseline = (engine.process.pid, max(private, baseline) if age < _SETTLE_SECONDS else baseline)
        return EngineReport(
            pid=engine.process.pid,
            age_seconds=age,
            steps=self._engines.last_step.step,
            private_nbytes=private,
            private_baseline=self._engine_baseline[1],
            weights_mapped=weights.mapped,
            weights_copied=weights.copied,
        )

    async def _recycle_engine(self, reason: RecycleReason) -> None:
        try:
            await self._engines.recycle(reason.value)
        except Exception as error:
            # The engine that serves goes on. The controller will ask again.
            logger.warning("the engine was not renewed (%s): %s", reason.value, error)
        finally:
            self._recycling = None
