"""A process with a Ray cluster of two nodes on this machine, each with a keeper and a replica, behind no proxy.

Owns: starting and ending it, and killing its second node. What is said there is said to the replicas' own ports, so
that a test decides which node a request comes to. Run as a program: it prints a line of JSON when all is up, and obeys
words on its standard input. Knows nothing of what is asked.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx

_START_SECONDS = 180.0
ROOT = Path(__file__).parent.parent.parent


class TwoNodes:
    """Such a process, from outside: "head" and "second" are its nodes. `settings` are the configuration's."""

    def __init__(self, journal: str, state_dir: Path, **settings: Any):
        given = {
            "journal": journal,
            "state_dir": str(state_dir),
            "replicas": 2,
            "engine": {"num_threads": 1, "standby_engines": 0, **settings.pop("engine", {})},
            "sessions": {"warm_actors": 0},
            "server": {
                "port": _free_port(),
                "metrics_port": _free_port(),
                "internal_ports": _free_ports(),
                **settings.pop("server", {}),
            },
            **settings,
        }
        self._log = open(state_dir.parent / "two_nodes.log", "wb")  # noqa: SIM115 -- as long as the process
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "tests.cluster.two_nodes", json.dumps(given)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            cwd=ROOT,
        )
        try:
            line = self._line(lambda line: line.startswith("{"))
        except AssertionError:
            self._process.communicate()
            self._log.close()
            raise AssertionError((state_dir.parent / "two_nodes.log").read_text()[-2000:]) from None
        told = json.loads(line)
        self.addresses: dict[str, str] = told["addresses"]
        self.node_ids: dict[str, str] = {name: told[name] for name in ("head", "second")}
        self._pids: dict[str, int] = told["pids"]

    def client(self, node: str, **options: Any) -> httpx.Client:
        """Asks that node's replica."""
        return httpx.Client(base_url=f"http://{self.addresses[node]}", timeout=60, trust_env=False, **options)

    def node_of(self, session_id: str, **headers: str) -> str | None:
        """Where the session's memory is; None: nowhere."""
        with self.client("head") as client:
            told = client.get(f"/v1/sessions/{session_id}", headers=headers).json()
        return next((name for name, node_id in self.node_ids.items() if node_id == told.get("node_id")), None)

    def replica_pid(self, node: str) -> int:
        return self._pids[node]

    def kill_second(self) -> None:
        """With all of its processes, as a machine that is lost."""
        self._tell("kill")

    def close(self) -> None:
        if self._process.poll() is None:
            self._process.communicate("end\n", timeout=120)
        self._log.close()

    def _tell(self, word: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{word}\n")
        self._process.stdin.flush()
        self._line(lambda line: line == f"done {word}")

    def _line(self, is_it: Callable[[str], bool]) -> str:
        """The next such line that it prints; others are Ray's."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if is_it(line.strip()):
                return line
        raise AssertionError("the nodes' process has ended")


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        return port


def _free_ports() -> int:
    """The first of a thousand that nobody listens on, as far as a look at some of them tells."""
    for first in range(21_000, 32_000, 1000):
        try:
            for port in (first, first + 1, first + 2, first + 899, first + 901, first + 902):
                with socket.socket() as one:
                    one.bind(("127.0.0.1", port))
            return first
        except OSError:
            continue
    raise AssertionError("no free ports")


def main(settings: dict[str, Any]) -> None:
    from phi_cluster.cluster.config import Config
    from phi_cluster.cluster.ray_environment import set_environment, token_of

    config = Config.model_validate(settings)
    with tempfile.TemporaryDirectory(prefix="phi-two-") as folder:
        runtime_dir = Path(folder)
        # Where Ray notes the cluster's address, in a folder that it does not make there.
        os.environ["RAY_TMPDIR"] = folder
        set_environment(config, runtime_dir, token_of(config))
        run(config, runtime_dir)


def run(config: Any, runtime_dir: Path) -> None:
    import ray
    from ray.cluster_utils import Cluster

    from phi_cluster.cluster import serve_cluster
    from phi_cluster.cluster.actors import (
        CONTROLLER,
        NAMESPACE,
        create,
        detached_options,
        keeper_names,
        weight_store_name,
    )
    from phi_cluster.cluster.controller import Controller
    from phi_cluster.cluster.replica import Replica
    from phi_cluster.cluster.served_model import describe_model
    from phi_cluster.cluster.session.journals import JournalPlace
    from phi_cluster.cluster.session.keeper_actor import Keeper
    from phi_cluster.cluster.weight_store import WeightStore, ensure_packed
    from phi_cluster.model.hub import resolve_model

    folder = resolve_model(config.model, config.cache_path, lambda event: None, None)
    served = describe_model(config, folder, noted=lambda text: None)
    nbytes = ensure_packed(served, config.cache_path, lambda done, total: None)[0].stat().st_size
    node = {"num_cpus": 1, "object_store_memory": 2 * nbytes, "include_dashboard": False}
    ray._private.services.get_node = patient(ray._private.services.get_node)
    cluster = Cluster(initialize_head=True, head_node_args={**node, "temp_dir": str(runtime_dir / "ray")})
    second = cluster.add_node(num_cpus=1, object_store_memory=2 * nbytes)
    ray.init(address=cluster.address, namespace=NAMESPACE, log_to_driver=False, configure_logging=False)
    try:
        head_id = ray.get_runtime_context().get_node_id()
        starting = []
        for one in (head_id, second.node_id):
            store = create(WeightStore, detached_options(weight_store_name(one), one), served, config.cache_path, 0)
            state_path = config.state_path / one[:8]
            (state_path / "sessions").mkdir(parents=True)
            keeper = create(
                Keeper,
                detached_options(keeper_names(one)[0], one),
                served.layout,
                served.fingerprint,
                JournalPlace(state_path, config.journal),
                config.sessions,
                config.kv,
                512 * 2**20,
                keeper_names(one)[0],
            )
            starting += [store.weights.remote(), keeper.start.remote()]
        controller = create(Controller, detached_options(CONTROLLER, head_id), served, config, nbytes, {}, runtime_dir)
        ray.get([*starting, controller.start.remote()])
        serve_cluster.start_serve(config)
        serve_cluster.run_app(serve_cluster.application(Replica, config, 1, served, config, 1, 0), waits=True)
        replicas: list[Any] = []
        while len({one.node_id for one in replicas}) < 2:
            time.sleep(0.2)
            replicas = list(ray.get(controller.peers.remote()).replicas)
        names = {head_id: "head", second.node_id: "second"}
        told = {
            "addresses": {names[one.node_id]: one.address for one in replicas},
            "pids": {names[one["node_id"]]: one["pid"] for one in ray.get(controller.overview.remote())["replicas"]},
            **{name: node_id for node_id, name in names.items()},
        }
        print(json.dumps(told), flush=True)
        for line in sys.stdin:
            if line.strip() != "kill":
                break
            lose(second)
            cluster.remove_node(second, allow_graceful=False)
            print("done kill", flush=True)
    finally:
        serve_cluster.stop_serve(1.0)
        ray.shutdown()
        cluster.shutdown()


def lose(node: Any) -> None:
    """Ends the node's processes at once. Ray's own way leaves its workers, which answer until they miss the raylet."""
    raylet = node.all_processes["raylet"][0].process.pid
    workers = Path(f"/proc/{raylet}/task/{raylet}/children").read_text().split()
    for pid in (raylet, *map(int, workers)):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def patient(get_node: Callable[..., Any]) -> Callable[..., Any]:
    """Ray gives a node half a minute to come up, and has no setting for it: a busy machine takes longer."""

    def get(*arguments: Any) -> Any:
        deadline = time.monotonic() + _START_SECONDS
        while True:
            try:
                return get_node(*arguments)
            except RuntimeError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.2)

    return get


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
