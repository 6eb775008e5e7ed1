"""The one place that wires everything: from a configuration to a running server, and back to nothing.

Owns: the order of start and stop, and what is told about it. Knows nothing of the command line's looks (it reports
through a callback) and of what the parts do.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import IO, Any

import ray
from ray.exceptions import RayError

from phi_cluster.cluster import ray_cluster
from phi_cluster.cluster.actors import CONTROLLER, NAMESPACE, create, detached_options, keeper_names, weight_store_name
from phi_cluster.cluster.config import Config
from phi_cluster.cluster.controller import Controller
from phi_cluster.cluster.errors import KeeperMoved, StartError
from phi_cluster.cluster.preflight import (
    Machine,
    check_config,
    check_platform,
    inspect_machine,
    kv_budget,
    object_store_nbytes,
    session_actors,
    standby_engines,
)
from phi_cluster.cluster.runtime_dir import clear_dead_servers, remove_runtime_dir
from phi_cluster.cluster.served_model import ServedModel, choose_dtypes, describe_model
from phi_cluster.cluster.session.hibernation_store import check_key
from phi_cluster.cluster.session.journals import JournalPlace
from phi_cluster.cluster.session.keeper_actor import Keeper
from phi_cluster.cluster.session.redis_server import check_server
from phi_cluster.cluster.weight_store import WeightStore, ensure_packed
from phi_cluster.model.hub import resolve_model
from phi_cluster.model.model_cache import ProgressEvent
from phi_cluster.model.ops.library import ISA_VARIABLE
from phi_cluster.model.tokenizer import Tokenizer


class Report:
    """What a start tells whoever watches. The methods may be overridden."""

    def checked(self, machine: Machine) -> None:
        """The machine and the configuration are fit."""

    def cleared(self, what: str) -> None:
        """Something that a killed server left was removed."""

    def noted(self, text: str) -> None:
        """Nothing is wrong, but the user may want to know."""

    def progress(self, event: ProgressEvent) -> None:
        """Long work goes on."""

    def started(self, part: str, seconds: float) -> None:
        """A part is up."""


@dataclass(frozen=True)
class Prepared:
    """All that is known before anything is started."""

    config: Config
    machine: Machine
    served: ServedModel
    weights_nbytes: int
    budget_nbytes: int
    # Of each replica.
    num_standbys: int
    # At most, on the node.
    num_session_actors: int

    @property
    def num_threads(self) -> int:
        return self.config.engine.num_threads or max(self.machine.cores // self.config.max_replicas, 1)


def prepare(config: Config, report: Report) -> Prepared:
    """Checks machine, configuration and model, and fetches, converts and packs what is not in the cache yet.

    Raises StartError with the one sentence that a user needs.
    """
    check_platform()
    for what in clear_dead_servers():
        report.cleared(what)
    machine = inspect_machine()
    check_config(config, machine)
    report.checked(machine)
    if config.kv.hibernate_key_file is not None:
        check_key(config.kv.hibernate_key_file)
    if config.journal is not None:
        for note in check_server(config.journal):
            report.noted(note)
    # What is wrong with the dtypes is said before a model is fetched for them.
    choose_dtypes(config)
    try:
        folder = resolve_model(
            config.model, config.cache_path, report.progress, config.hub_token or os.environ.get("HF_TOKEN")
        )
    except (ValueError, OSError) as error:
        raise StartError(str(error)) from None
    served = describe_model(config, folder, noted=report.noted)
    try:
        # Each replica loads it too; here what is wrong with it can still be said in one sentence.
        Tokenizer.from_folder(folder)
    except (ValueError, OSError) as error:
        raise StartError(f"{config.model}: {error}") from None

    def packing(done: int, total: int) -> None:
        report.progress(ProgressEvent("packing", done, total, f"{served.names[0]} {served.dtype}"))

    weights, _ = ensure_packed(served, config.cache_path, packing)
    weights_nbytes = weights.stat().st_size
    budget_nbytes = kv_budget(config, machine, weights_nbytes)
    num_standbys = standby_engines(config, machine, weights_nbytes, budget_nbytes)
    if config.engine.standby_engines is None and not num_standbys and config.device == "cpu":
        report.noted("no memory is left for a standby engine: should the engine die, streams pause for seconds")
    num_actors = session_actors(config, machine, weights_nbytes, budget_nbytes, num_standbys)
    if num_actors < config.sessions.max_actors:
        report.noted(
            f"memory is left for {num_actors} session actors, not for sessions.max_actors "
            f"({config.sessions.max_actors}): the keeper holds the other sessions"
        )
    return Prepared(config, machine, served, weights_nbytes, budget_nbytes, num_standbys, num_actors)


class Server:
    """A running server. `stop` ends all of it."""

    def __init__(self, prepared: Prepared, runtime_dir: Path, report: Report):
        """Starts everything and returns when requests can be served; `runtime_dir` goes with the server.

        Ray's environment must have been set (ray_environment.py). Raises StartError, with nothing left behind.
        """
        self._lock = _lock_state(prepared.config.state_path)
        self._runtime_dir = runtime_dir
        self._node_id = ""
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
            controller = ray.get_actor(CONTROLLER, namespace=NAMESPACE)
            return ray.get(controller.num_open_requests.remote(), timeout=2)
        except (ValueError, RayError):
            return 0

    def stop(self) -> int:
        """Drains streams, ends all processes and removes the runtime folder. Returns how many sessions are kept."""
        kept = 0
        if ray.is_initialized():
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
            ray_cluster.stop_ray()
        remove_runtime_dir(self._runtime_dir)
        self._lock.close()
        return kept

    def _end_event_streams(self) -> None:
        """Whoever watches would be waited for as if he were talking."""
        with contextlib.suppress(ValueError, RayError):
            controller = ray.get_actor(CONTROLLER, namespace=NAMESPACE)
            ray.get(controller.end_event_streams.remote(), timeout=2)

    def _start(self, prepared: Prepared, report: Report) -> None:
        config = prepared.config
        # What can be done at once is: cores idle while Ray's processes wait for each other.
        with ThreadPoolExecutor(4) as pool:
            loading = pool.submit(_load_serve)
            with self._timed("ray", report):
                num_cpus = prepared.num_threads * config.max_replicas
                ray_cluster.start_ray(self._runtime_dir, num_cpus, object_store_nbytes(prepared.weights_nbytes))
            self._node_id = ray.get_runtime_context().get_node_id()
            parts = [
                pool.submit(self._start_actors, prepared, report),
                pool.submit(self._start_edge, config, loading, report),
                pool.submit(self._start_replicas, prepared, loading, report),
            ]
            for part in parts:
                part.result()
        _wait_ready(config)

    def _start_actors(self, prepared: Prepared, report: Report) -> None:
        config, served = prepared.config, prepared.served
        with self._timed("weights", report):
            store = create(
                WeightStore,
                detached_options(weight_store_name(self._node_id), self._node_id),
                served,
                config.cache_path,
            )
            name = keeper_names(self._node_id)[0]
            keeper = create(
                Keeper,
                detached_options(name, self._node_id),
                served.layout,
                served.fingerprint,
                JournalPlace(config.state_path, config.journal),
                config.sessions.model_copy(update={"max_actors": prepared.num_session_actors}),
                config.kv,
                prepared.budget_nbytes,
                name,
            )
            controller = create(
                Controller,
                detached_options(CONTROLLER, self._node_id),
                config,
                prepared.weights_nbytes,
                _build_info(prepared),
                self._runtime_dir,
            )
            ray.get([store.weights.remote(), controller.start.remote()])
            _start_keeper(keeper)

    def _start_edge(self, config: Config, loading: Future[tuple[ModuleType, Any]], report: Report) -> None:
        with self._timed("edge", report):
            loading.result()[0].start_serve(config)

    def _start_replicas(self, prepared: Prepared, loading: Future[tuple[ModuleType, Any]], report: Report) -> None:
        config, threads = prepared.config, prepared.num_threads
        with self._timed("engine", report):
            serve_cluster, replica = loading.result()
            serve_cluster.wait_serve_controller()
            arguments = (prepared.served, config, self._runtime_dir, threads, prepared.num_standbys)
            serve_cluster.run_app(replica, config, threads, *arguments)

    @contextmanager
    def _timed(self, part: str, report: Report) -> Iterator[None]:
        begin = time.monotonic()
        yield
        self.timeline[part] = time.monotonic() - begin
        report.started(part, self.timeline[part])


def _start_keeper(keeper: Any, timeout: float = 10.0) -> None:
    """Waits for the end of one that an earlier server of the same state directory had, which may just be dying."""
    deadline = time.monotonic() + timeout
    while True:
        try:
            ray.get(keeper.start.remote())
            return
        except KeeperMoved:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)


def _build_info(prepared: Prepared) -> dict[str, str]:
    """Labels of phi_build_info."""
    served = prepared.served
    return {
        "version": version("phi-cluster"),
        "torch": version("torch"),
        "ray": version("ray"),
        "isa": os.environ.get(ISA_VARIABLE) or prepared.machine.instructions,
        "dtype": served.dtype,
        "kv_cache_dtype": served.kv_cache_dtype,
        "model": served.names[0],
    }


def _load_serve() -> tuple[ModuleType, Any]:
    """Serve, and the class of our replicas: a second or two of imports, done while Ray starts."""
    serve_cluster = importlib.import_module("phi_cluster.cluster.serve_cluster")
    return serve_cluster, importlib.import_module("phi_cluster.cluster.replica").Replica


def _lock_state(state_path: Path) -> IO[str]:
    """One server for a state directory: two keepers would hold the same sessions. Raises StartError."""
    state_path.mkdir(mode=0o700, parents=True, exist_ok=True)
    # Whatever the folder above lets others do: conversations are private.
    (state_path / "sessions").mkdir(mode=0o700, exist_ok=True)
    (state_path / "sessions").chmod(0o700)
    lock = open(state_path / "lock", "w")  # noqa: SIM115 -- held for as long as the server runs
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        lock.close()
        raise StartError(f"state_dir: another phi-cluster uses {state_path}; end it or set another state_dir") from None
    return lock


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
