"""The one place that wires everything: from a configuration to a running server, and back to nothing.

Owns: the order of start and stop, and what is told about it. Knows nothing of the command line's looks (it reports
through a callback) and of what the parts do.
"""

from __future__ import annotations

import contextlib
import importlib
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import ray
from ray.exceptions import RayError

from phi_cluster.cluster import ray_cluster
from phi_cluster.cluster.actors import NAMESPACE, end_actors, find_controller, keeper_names
from phi_cluster.cluster.cluster_record import withdraw
from phi_cluster.cluster.config import Config
from phi_cluster.cluster.errors import KeeperMoved, StartError
from phi_cluster.cluster.head import claim, start_head, start_head_again
from phi_cluster.cluster.node_tasks import check_nodes
from phi_cluster.cluster.preflight import object_store_nbytes
from phi_cluster.cluster.preparation import Prepared
from phi_cluster.cluster.report import Report
from phi_cluster.cluster.runtime_dir import remove_runtime_dir
from phi_cluster.cluster.state_lock import lock_state


class Server:
    """A running server. `stop` ends all of it."""

    def __init__(self, prepared: Prepared, runtime_dir: Path, report: Report):
        """Starts everything and returns when requests can be served; `runtime_dir` goes with the server.

        Ray's environment must have been set (ray_environment.py). Raises StartError, with nothing left behind.
        """
        self._lock = lock_state(prepared.config.state_path)
        self._runtime_dir = runtime_dir
        self._node_id = ""
        self._owns_ray = prepared.config.nodes.ray_address is None
        # Of a Ray that runs already only what this server has started is ended, and another's is not.
        self._owns_actors = self._owns_ray
        self._drain = prepared.config.server.drain
        self.timeline: dict[str, float] = {}
        try:
            self._start(prepared, report)
        except BaseException:
            self.stop()
            raise

    def _close_keeper(self) -> int:
        """Of the one that is in charge; returns how many sessions are kept."""
        for name in keeper_names(self._node_id):
            with contextlib.suppress(ValueError, KeeperMoved):
                return int(ray.get(ray.get_actor(name, namespace=NAMESPACE).close.remote(), timeout=10))
        return 0

    def num_streams(self) -> int:
        """Requests that are running or waiting, as of a second ago."""
        try:
            controller = find_controller()
            return ray.get(controller.num_open_requests.remote(), timeout=2)
        except (ValueError, RayError):
            return 0

    def stop(self) -> int:
        """Drains streams, ends all processes and removes the runtime folder. Returns how many sessions are kept."""
        kept = 0
        if ray.is_initialized():
            if self._owns_actors:
                kept = self._end_actors()
            ray_cluster.stop_ray()
        remove_runtime_dir(self._runtime_dir)
        self._lock.close()
        return kept

    def _end_actors(self) -> int:
        kept = 0
        try:
            self._end_event_streams()
            deadline = time.monotonic() + self._drain
            has_ended = _load_serve()[0].stop_serve(self._drain)
            # What was reported last may be told for some seconds more: it is asked only where there may be streams.
            while not has_ended and self.num_streams() and time.monotonic() < deadline:
                time.sleep(0.2)
            if self._node_id:
                kept = self._close_keeper()
        except Exception:
            # Parts may be dead already; the rest is ended all the same.
            kept = 0
        if not self._owns_ray:
            with contextlib.suppress(RayError):
                end_actors()
                withdraw()
        return kept

    def _end_event_streams(self) -> None:
        """Whoever watches would be waited for as if he were talking."""
        with contextlib.suppress(ValueError, RayError):
            controller = find_controller()
            ray.get(controller.end_event_streams.remote(), timeout=2)

    def _start(self, prepared: Prepared, report: Report) -> None:
        config = prepared.config
        # What can be done at once is: cores idle while Ray's processes wait for each other.
        with ThreadPoolExecutor(4) as pool:
            loading = pool.submit(_load_serve)
            with self._timed("ray", report):
                self._start_ray(prepared)
            self._node_id = ray.get_runtime_context().get_node_id()
            if config.has_nodes:
                claim(prepared)
            self._owns_actors = True
            parts = [
                pool.submit(self._start_actors, prepared, report),
                pool.submit(self._start_edge, config, loading, report),
                pool.submit(self._start_replicas, prepared, loading, report),
            ]
            for part in parts:
                part.result()
        _wait_ready(config)

    def _start_ray(self, prepared: Prepared) -> None:
        config, nodes = prepared.config, prepared.config.nodes
        if nodes.ray_address is not None:
            ray_cluster.connect(self._runtime_dir, nodes.ray_address)
            check_nodes(config, prepared.weights_nbytes)
            return
        ray_cluster.start_ray(
            self._runtime_dir,
            prepared.num_threads * config.replicas_per_node,
            object_store_nbytes(prepared.weights_nbytes),
            nodes.address or ray_cluster.LOOPBACK,
            None if nodes.address is None else nodes.port,
        )

    def _start_actors(self, prepared: Prepared, report: Report) -> None:
        with self._timed("weights", report):
            start = start_head if self._owns_ray else start_head_again
            start(prepared, self._node_id, self._runtime_dir)

    def _start_edge(self, config: Config, loading: Future[tuple[ModuleType, Any]], report: Report) -> None:
        with self._timed("edge", report):
            loading.result()[0].start_serve(config)

    def _start_replicas(self, prepared: Prepared, loading: Future[tuple[ModuleType, Any]], report: Report) -> None:
        config, threads = prepared.config, prepared.num_threads
        with self._timed("engine", report):
            serve_cluster, replica = loading.result()
            serve_cluster.wait_serve_controller()
            arguments = (prepared.served, config, threads, prepared.plan.num_standbys)
            app = serve_cluster.application(replica, config, threads, *arguments)
            # With several machines, replicas may wait for some that have not joined yet.
            serve_cluster.run_app(app, waits=not config.has_nodes)

    @contextmanager
    def _timed(self, part: str, report: Report) -> Iterator[None]:
        begin = time.monotonic()
        yield
        self.timeline[part] = time.monotonic() - begin
        report.started(part, self.timeline[part])


def _load_serve() -> tuple[ModuleType, Any]:
    """Serve, and the class of our replicas: a second or two of imports, done while Ray starts."""
    serve_cluster = importlib.import_module("phi_cluster.cluster.serve_cluster")
    return serve_cluster, importlib.import_module("phi_cluster.cluster.replica").Replica


def _wait_ready(config: Config, timeout: float = 300.0, poll: Callable[[], None] = lambda: time.sleep(0.1)) -> None:
    """Asks /ready until it says yes. Raises StartError."""
    import httpx

    deadline = time.monotonic() + timeout
    last = "no answer"
    host = f"[{config.server.host}]" if ":" in config.server.host else config.server.host
    # A proxy of the environment is for other hosts.
    with httpx.Client(base_url=f"http://{host}:{config.server.port}", timeout=5.0, trust_env=False) as client:
        while time.monotonic() < deadline:
            try:
                answer = client.get("/ready")
                if answer.status_code == 200:
                    return
                last = answer.text[:200]
            except httpx.HTTPError as error:
                last = type(error).__name__
            poll()
    raise StartError(f"the server did not get ready in {timeout:.0f} s: {last}")
