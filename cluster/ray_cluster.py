"""The Ray that we start for ourselves, here or as one more node of a cluster, or that runs already: its processes, our
connection to it, and the end.

Owns: starting, joining, draining and stopping, without the parts of Ray that nobody needs here (its environment is
ray_environment.py's). Knows nothing of Serve and of our actors.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import ray

from phi_cluster.cluster import node_agent
from phi_cluster.cluster.errors import StartError

LOOPBACK = "127.0.0.1"
_NAMESPACE = "phi-cluster"
# How long a node may take to end.
_END_SECONDS = 20.0
# How long the head may take to be told that a node leaves.
_DRAIN_SECONDS = 20.0
# Of the raylet's command: what it runs as the agent of its node.
_AGENT = "dashboard_agent_command"


def start_ray(
    runtime_dir: Path, num_cpus: int, object_store_nbytes: int, address: str = LOOPBACK, port: int | None = None
) -> None:
    """A Ray of our own, its files in `runtime_dir`. At an `address` that other machines reach they may join it, at
    `port`. Raises StartError."""
    if port is not None:
        os.environ["RAY_GCS_SERVER_PORT"] = str(port)
    _init(
        runtime_dir,
        address="local",
        num_cpus=num_cpus,
        include_dashboard=False,
        object_store_memory=object_store_nbytes,
        _temp_dir=str(runtime_dir / "ray"),
        _node_ip_address=address,
    )
    _end_log_monitor()


def connect(runtime_dir: Path, address: str, node_address: str | None = None) -> None:
    """To a Ray that runs already. Raises StartError."""
    here = {} if node_address is None else {"_node_ip_address": node_address}
    _init(runtime_dir, address=address, **here)


def _init(runtime_dir: Path, **options: Any) -> None:
    # Ray puts the driver's working directory first on its workers' path: not the user's, which may hold a model.py.
    before = os.getcwd()
    os.chdir(runtime_dir)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _replace_agent()
            ray.init(
                namespace=_NAMESPACE,
                log_to_driver=False,
                logging_level=logging.ERROR,
                configure_logging=False,
                **options,
            )
    except Exception as error:
        raise StartError(f"Ray did not start: {' '.join(str(error).split())[:300]}") from None
    finally:
        os.chdir(before)


class RayNode:
    """Ray's processes on this machine, as a node of a cluster whose head is elsewhere."""

    def __init__(self, runtime_dir: Path, head: str, address: str, num_cpus: int, object_store_nbytes: int):
        """Starts them. `head` is HOST:PORT; `address` this machine's, as the others reach it."""
        # Ray's command, with our agent in the place of Ray's.
        script = f"from {__name__} import run_ray_command; run_ray_command()"
        command = [sys.executable, "-P", "-c", script, "start", "--block", "--disable-usage-stats"]
        options = {
            "--address": head,
            "--node-ip-address": address,
            "--num-cpus": num_cpus,
            "--object-store-memory": object_store_nbytes,
            "--temp-dir": runtime_dir / "ray",
            "--include-log-monitor": "false",
        }
        self._log = runtime_dir / "node.log"
        with self._log.open("wb") as log:
            self._popen = subprocess.Popen(
                command + [f"{name}={value}" for name, value in options.items()],
                cwd=runtime_dir,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                # Ctrl-C is ours: it must not end Ray before the node is drained.
                start_new_session=True,
            )

    @property
    def lives(self) -> bool:
        return self._popen.poll() is None

    @property
    def complaint(self) -> str:
        """The last that Ray has said."""
        lines = self._log.read_text(errors="replace").split("\n")
        return " ".join(line.strip() for line in lines[-12:] if line.strip())[-300:]

    def end(self) -> None:
        """Ends all of its processes."""
        self._popen.terminate()
        try:
            self._popen.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(self._popen.pid, signal.SIGKILL)
            self._popen.wait()


def drain_node(head: str, node_id: str, seconds: float) -> None:
    """Tells Ray that the node leaves: nothing new is placed there, and Serve moves its replicas. Raises StartError if
    Ray refuses."""
    command = [sys.executable, "-P", "-m", "ray.scripts.scripts", "drain-node", f"--address={head}"]
    options = {
        "--node-id": node_id,
        "--reason": "DRAIN_NODE_REASON_PREEMPTION",
        "--reason-message": "phi-cluster: the node leaves",
        "--deadline-remaining-seconds": max(int(seconds), 1),
    }
    arguments = command + [f"{name}={value}" for name, value in options.items()]
    try:
        done = subprocess.run(arguments, capture_output=True, text=True, timeout=_DRAIN_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        raise StartError(f"Ray did not drain the node: nobody answers at {head}") from None
    if done.returncode:
        raise StartError(f"Ray did not drain the node: {' '.join((done.stdout + done.stderr).split())[-300:]}")


def run_ray_command() -> None:
    """The program `ray`, whose raylet gets our agent."""
    _replace_agent()
    from ray.scripts.scripts import main

    main()


def _replace_agent() -> None:
    """The raylet that is started next gets an agent that does nothing (node_agent.py). Ray has no setting for it; where
    these names are no more, its own stays."""
    services: Any = getattr(ray._private, "services", None)
    start = getattr(services, "start_ray_process", None)
    if start is None or getattr(start, "is_ours", False):
        return

    def start_ray_process(command: list[str], *arguments: Any, **options: Any) -> Any:
        told = dict(part[2:].split("=", 1) for part in command if part.startswith("--") and "=" in part)
        if _AGENT in told and "session_dir" in told and "node_id" in told:
            ours = [sys.executable, "-I", "-S", node_agent.__file__, told["session_dir"], told["node_id"]]
            agent = f"--{_AGENT}={subprocess.list2cmdline(ours)}"
            command = [agent if part.startswith(f"--{_AGENT}=") else part for part in command]
        return start(command, *arguments, **options)

    start_ray_process.is_ours = True  # type: ignore[attr-defined]
    services.start_ray_process = start_ray_process


def _end_log_monitor() -> None:
    """It reads all workers' logs for the driver, which does not want them, and remembers every one there ever was."""
    # Ray has no setting for it; where this name is no more, it stays.
    node: Any = getattr(ray._private.worker, "_global_node", None)
    if hasattr(node, "kill_log_monitor"):
        node.kill_log_monitor(check_alive=False)


def stop_ray() -> None:
    """Ends every process of a Ray that is ours, or the connection to one that is not."""
    ray.shutdown()
