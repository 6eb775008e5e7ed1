"""The Ray that we start for ourselves: its processes and its end.

Owns: starting and stopping Ray, without the parts of it that nobody needs here (its environment is
ray_environment.py's). Knows nothing of Serve and of our actors.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import ray

from phi_cluster.cluster import node_agent
from phi_cluster.cluster.errors import StartError

# Of the raylet's command: what it runs as the agent of its node.
_AGENT = "dashboard_agent_command"


def start_ray(runtime_dir: Path, num_cpus: int, object_store_nbytes: int) -> None:
    """A Ray of our own on loopback, its files in `runtime_dir`. Raises StartError."""
    # Ray puts the driver's working directory first on its workers' path: not the user's, which may hold a model.py.
    before = os.getcwd()
    os.chdir(runtime_dir)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _replace_agent()
            ray.init(
                address="local",
                num_cpus=num_cpus,
                include_dashboard=False,
                object_store_memory=object_store_nbytes,
                namespace="phi-cluster",
                log_to_driver=False,
                logging_level=logging.ERROR,
                configure_logging=False,
                _temp_dir=str(runtime_dir / "ray"),
                _node_ip_address="127.0.0.1",
            )
        _end_log_monitor()
    except Exception as error:
        raise StartError(f"Ray did not start: {' '.join(str(error).split())[:300]}") from None
    finally:
        os.chdir(before)


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
    """Ends every process of our Ray."""
    ray.shutdown()
