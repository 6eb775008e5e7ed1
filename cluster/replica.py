"""The Serve deployment: one replica holds clients' connections, and one engine of its own computes for it.

Owns: the lifecycle of the replica, which includes its engines', admission, and wiring the edge to turns, sessions and
the engine. Knows nothing of torch: it must not crash with the model.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import mmap
import os
import time
import uuid
from functools import partial
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import ray
from ray import serve
from ray.exceptions import RayError
from starlette.middleware import Middleware

from phi_cluster.cluster.actors import NAMESPACE, find_controller, keeper_names, keeper_of, weight_store_name
from phi_cluster.cluster.admission import AdmittedTurns, UsageOfKeys
from phi_cluster.cluster.coalescing import CoalescedTurns
from phi_cluster.cluster.config import Config
from phi_cluster.cluster.engine_client import EngineClient
from phi_cluster.cluster.engine_health import START_SECONDS, EngineHealth
from phi_cluster.cluster.engine_link import start_engine
from phi_cluster.cluster.errors import Unavailable
from phi_cluster.cluster.events import EventKind, EventLog
from phi_cluster.cluster.forwarding import ForwardedTurns
from phi_cluster.cluster.head_relay import HeadClient, HeadRelay
from phi_cluster.cluster.head_start import HeadWatch
from phi_cluster.cluster.heap import keep_heap_trimmed
from phi_cluster.cluster.http.edge import EdgeSettings
from phi_cluster.cluster.http.schemas import MAX_CHOICES
from phi_cluster.cluster.http.server import build_app
from phi_cluster.cluster.keys import KeyFile
from phi_cluster.cluster.logs import log_as
from phi_cluster.cluster.managed_sessions import ManagedSessions
from phi_cluster.cluster.node_keepers import NodeKeepers
from phi_cluster.cluster.own_port import listening_address
from phi_cluster.cluster.peer_door import PeerDoor
from phi_cluster.cluster.peer_link import PeerLinks
from phi_cluster.cluster.peer_proof import ClusterKey, Guard
from phi_cluster.cluster.peers import PeerTable
from phi_cluster.cluster.placement import Costs
from phi_cluster.cluster.poison import PoisonList
from phi_cluster.cluster.preflight import LOOPBACK
from phi_cluster.cluster.processes import boot_id, is_alive, process_id
from phi_cluster.cluster.ray_engine import EngineSpawner
from phi_cluster.cluster.refusals import RefusalsTold
from phi_cluster.cluster.replica_reporter import ReplicaReporter
from phi_cluster.cluster.replica_scaling import scaling_metrics
from phi_cluster.cluster.responses.assembly import ResponseRoom
from phi_cluster.cluster.responses.making import MakerLimits
from phi_cluster.cluster.responses.run import Tools
from phi_cluster.cluster.runtime_dir import current_runtime_dir
from phi_cluster.cluster.served_model import ServedModel
from phi_cluster.cluster.session.directory import SessionDirectory
from phi_cluster.cluster.session.keeper_finder import KeeperFinder
from phi_cluster.cluster.session.memfd import PAGE_NBYTES
from phi_cluster.cluster.session.recycler import RecycleReason
from phi_cluster.cluster.spoken import SpokenReader
from phi_cluster.cluster.standby import StandbyEngines
from phi_cluster.cluster.tokenization import Tokenization
from phi_cluster.cluster.traced_turns import TracedTurns
from phi_cluster.cluster.turn import Turns
from phi_cluster.cluster.turn_api import TurnRunner
from phi_cluster.cluster.turn_attempt import TurnLimits
from phi_cluster.cluster.watch import ClusterWatch
from phi_cluster.model.tokenizer import Tokenizer
from phi_cluster.monitoring.replica_metrics import ReplicaMetrics

if TYPE_CHECKING:
    from phi_cluster.cluster.open_telemetry import OpenTelemetryTracer

logger = logging.getLogger(__name__)

_LAST_COMMITS_SECONDS = 5.0
# The controller is up by then, or being replaced.
_TOLD_SECONDS = 10.0
# Why an engine may be renewed.
_ENGINE_RECYCLES = (RecycleReason.LEAK, RecycleReason.REQUESTED, RecycleReason.MAX_AGE, RecycleReason.MAX_STEPS)


@serve.ingress()
class Replica:
    """One replica with its engine. Serve builds it, asks for its ASGI app, and watches `check_health`."""

    async def __init__(  # type: ignore[misc]
        self, served: ServedModel, config: Config, num_threads: int, num_standbys: int, starts_head: bool = False
    ):
        """`served` and `num_standbys` are the head's; another machine has its own. `starts_head`: see head_start.py."""
        log_as("replica")
        keep_heap_trimmed()
        self._node_id = ray.get_runtime_context().get_node_id()
        if config.has_nodes:
            served, num_standbys = await _of_this_node(self._node_id)
        runtime_dir = current_runtime_dir()
        self._served = served
        self._config = config
        self._replica_id = uuid.uuid4().hex
        self._events = EventLog(time.time)
        self._events.add(EventKind.REPLICA_STARTED)
        self._metrics = ReplicaMetrics(reason.value for reason in _ENGINE_RECYCLES)
        finder = KeeperFinder(partial(ray.get_actor, namespace=NAMESPACE), keeper_names(self._node_id))
        self._keys = None if config.keys_path is None else KeyFile(config.keys_path)
        self._peers = PeerTable(self._node_id, lambda: self._turns.num_open, capacity=config.engine.max_num_seqs)
        self._sessions = SessionDirectory(
            finder,
            config.state_path,
            self._metrics.journals,
            NodeKeepers(self._peers),
            None if self._keys is None else self._keys.limits_of,
        )
        spawner = EngineSpawner(served, config, runtime_dir, num_threads, self._node_id)
        hang_timeout = config.engine.hang_timeout
        # Set once the server is up: nothing that is not needed for that is started before.
        started = asyncio.Event()
        self._standbys = StandbyEngines(
            num_standbys,
            partial(start_engine, spawner.spawn_standby, hang_timeout),
            may_begin=started,
            events=self._events,
        )
        self._engines = EngineClient(
            partial(start_engine, spawner.spawn, hang_timeout),
            self._standbys,
            self._metrics.engines,
            events=self._events,
        )
        self._engines.start()
        self._health = EngineHealth(self._engines, started)
        # The engine's process starts meanwhile.
        self._tokenizer = await asyncio.to_thread(Tokenizer.from_folder, served.folder)
        self._turns = Turns(
            self._tokenizer,
            self._sessions,
            self._engines,
            TurnLimits(
                max_model_len=served.max_model_len,
                max_turns=config.engine.max_num_seqs + config.engine.max_waiting,
                turn_wait=config.sessions.turn_wait,
                regime_tokens=served.regime_tokens,
                # Segments are laid out in pages of 4 KiB, whatever the machine's are.
                shares_prompts=mmap.PAGESIZE == PAGE_NBYTES,
            ),
            process_id(),
            PoisonList(runtime_dir / "poison"),
        )
        # Without a token (nothing of ours starts without one) a replica has no peers.
        token = os.environ.get("RAY_AUTH_TOKEN", "")
        self._cluster_key = ClusterKey(token, version("phi-cluster")) if token else None
        self._links, self._head, self._forwarded = None, None, None
        everywhere: ForwardedTurns | Turns = self._turns
        if self._cluster_key is not None:
            self._links = PeerLinks(self._cluster_key)
            self._head = HeadClient(self._cluster_key, self._peers)
            everywhere = self._forwarded = ForwardedTurns(
                self._turns,
                self._peers,
                self._sessions,
                self._links,
                Costs(served.layout.kv.nbytes_used(1024) // 1024),
                config.engine.max_num_seqs + config.engine.max_waiting,
                self._metrics.forwards,
            )
        # What every endpoint runs turns with.
        self._runner: TurnRunner = everywhere
        if self._keys is not None:
            self._runner = AdmittedTurns(everywhere, self._sessions, self._keys.limits_of, process_id())
        self._runner = RefusalsTold(self._runner, self._events)
        self._tracer = self._open_tracer()
        if self._tracer is not None:
            self._runner = TracedTurns(self._runner, self._tracer, served.names[0])
        if config.server.stream_interval > 1:
            self._runner = CoalescedTurns(self._runner, config.server.stream_interval)
        self._managed = ManagedSessions(self._sessions, self._engines, SpokenReader(self._tokenizer), self._node_id)
        self._room = ResponseRoom(
            config.state_path,
            Tools(self._runner, self._metrics.requests, time),
            self._managed,
            MakerLimits(
                retention=config.responses.retention,
                wait=config.sessions.turn_wait,
                max_background=config.responses.max_background,
                max_queued=config.responses.max_queued,
            ),
            process_id(),
            is_alive,
            boot_id(),
        )
        self._room.start()
        waits = config.max_replicas > 1 and await _others_serve()
        self._reporter = ReplicaReporter(
            self._replica_id,
            self._node_id,
            config,
            self._metrics,
            self._events,
            self._engines,
            self._standbys,
            self._health,
            self._turns,
            self._peers,
            controller=find_controller,
            find_address=self._find_address,
            num_forwarded=lambda: 0 if self._forwarded is None else self._forwarded.num_forwarded,
            keys=self._keys,
            head_watch=HeadWatch() if starts_head else None,
        )
        # From now on it is known that somebody needs what this node has.
        self._reporting = asyncio.get_running_loop().create_task(self._reporter.run())
        if waits:
            # What comes meanwhile is for those that can serve it.
            with contextlib.suppress(Unavailable):
                await self._engines.wait_ready(START_SECONDS)
        if config.journal is not None:
            # There may be other nodes: whose accounts and responses count is known before the first request.
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._reporter.told.wait(), _TOLD_SECONDS)

    def _open_tracer(self) -> OpenTelemetryTracer | None:
        if self._config.tracing.endpoint is None:
            return None
        # Where nothing is traced, nothing of it is loaded.
        from phi_cluster.cluster.open_telemetry import tracer_of

        return tracer_of(self._config.tracing, self._replica_id, version("phi-cluster"))

    def __serve_build_asgi_app__(self) -> Any:
        served, server = self._served, self._config.server
        settings = EdgeSettings(
            served_model_names=served.names,
            max_model_len=served.max_model_len,
            vocab_size=served.config.vocab_size,
            max_body_bytes=server.max_body,
            max_import_bytes=server.max_import,
            max_choices=min(MAX_CHOICES, self._config.engine.max_num_seqs),
            body_seconds=server.body_timeout,
            write_seconds=server.write_timeout,
            session_headers=server.session_headers,
            cors_origins=server.cors_origins,
            # With keys it does not matter by which name a client calls; without, a browser must not be led here.
            allowed_hosts=() if self._keys else (*LOOPBACK, *server.allowed_hosts),
            keep_alive_seconds=server.keep_alive,
            system_fingerprint=f"fp_{served.fingerprint[:12]}",
        )
        room, keys = self._room, self._keys
        app = build_app(
            settings,
            self._runner,
            Tokenization(self._tokenizer, served.max_model_len),
            room.responses,
            room.conversations,
            self._managed,
            self,
            self._health,
            self._metrics.requests,
            ClusterWatch(),
            keys=keys,
            usage=None if keys is None else UsageOfKeys(self._sessions, keys.limits_of),
            inside=[Middleware(HeadRelay, self._head, settings, self._metrics.requests.on_error)] if self._head else [],
        )
        guard = None if self._cluster_key is None else Guard(self._cluster_key, self._replica_id)
        # What peers send is run here, in their traces.
        turns = self._turns if self._tracer is None else TracedTurns(self._turns, self._tracer, served.names[0])
        app.add_middleware(PeerDoor, guard, turns, self._sessions)
        return app

    async def __del__(self) -> None:
        """Serve calls this at the end, when all answers are given: turns whose client had left may still commit."""
        await self._room.close()
        deadline = time.monotonic() + _LAST_COMMITS_SECONDS
        while self._turns.num_running and time.monotonic() < deadline:  # noqa: ASYNC110 -- for a moment, once
            await asyncio.sleep(0.02)
        await self._engines.close()
        for one in (self._links, self._head):
            if one is not None:
                await one.close()
        if self._tracer is not None:
            # The last spans are sent, if that can be had quickly.
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(asyncio.to_thread(self._tracer.close), self._config.tracing.timeout)

    async def check_health(self) -> None:
        """Serve replaces a replica whose check raises."""
        if not self._health.live():
            raise RuntimeError("the engine has made no step lately")

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Serve asks for it where `autoscaling` is configured."""
        return scaling_metrics(self._turns, self._room.num_in_background, self._reporter.kv_load)

    async def recycle_engines(self) -> int:
        """See turn_api.EngineAdmin."""
        try:
            controller = find_controller()
            count: int = await controller.request_engine_recycles.remote()
        except (ValueError, RayError):
            raise Unavailable("the controller is being restarted; try again", retry_after=2) from None
        return count

    def _find_address(self) -> str:
        """Where Serve lets this replica listen; "" before it does, and for whoever nobody may ask anything."""
        if self._cluster_key is None:
            return ""
        # As this node has them.
        first, last = (int(os.environ.get(f"RAY_SERVE_DIRECT_INGRESS_{name}_HTTP_PORT", 0)) for name in ("MIN", "MAX"))
        return listening_address(first, last, ray.util.get_node_ip_address())


async def _of_this_node(node_id: str) -> tuple[ServedModel, int]:
    """The model as it is on this node, and how many engines may stand by: once the node's actors are up."""
    deadline = time.monotonic() + START_SECONDS
    while True:
        try:
            keeper = keeper_of(node_id)
            store = ray.get_actor(weight_store_name(node_id), namespace=NAMESPACE)
            await keeper.start.remote()
            return await store.served.remote()
        except (ValueError, RayError):
            if time.monotonic() > deadline:
                raise
        with contextlib.suppress(ValueError, RayError):
            await find_controller().want_node.remote(node_id)
        await asyncio.sleep(0.2)


async def _others_serve() -> bool:
    """Whether there are replicas already: else the server is starting, and its parts do so at once."""
    try:
        return bool(await find_controller().num_replicas.remote())
    except (ValueError, RayError):
        return False
