"""The Ray that we start for ourselves: its processes and its end.

Owns: starting and stopping Ray and Serve (their environment is ray_environment.py's). Knows nothing of our actors.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
import warnings
from pathlib import Path
from typing import Any

import ray
from ray import serve

from phi_cluster.cluster.config import Config
from phi_cluster.cluster.errors import StartError


def start_ray(runtime_dir: Path, num_cpus: int, object_store_nbytes: int) -> None:
    """A Ray of our own on loopback, its files in `runtime_dir`. Raises StartError."""
    # Ray puts the driver's working directory first on its workers' path: not the user's, which may hold a model.py.
    before = os.getcwd()
    os.chdir(runtime_dir)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
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
    except Exception as error:
        raise StartError(f"Ray did not start: {' '.join(str(error).split())[:300]}") from None
    finally:
        os.chdir(before)


def start_serve(config: Config) -> None:
    """Serve's controller and HAProxy, on our port."""
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    serve.start(
        proxy_location="HeadOnly",
        http_options=serve.HTTPOptions(host=config.server.host, port=config.server.port),
        logging_config=_quiet(),
    )


def wait_serve_controller(timeout: float = 60.0) -> None:
    """Until applications can be deployed, which is before HAProxy is up. Raises StartError."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        with contextlib.suppress(ValueError):
            ray.get_actor("SERVE_CONTROLLER_ACTOR", namespace="serve")
            return
        time.sleep(0.05)
    raise StartError("Ray Serve's controller did not start")


def run_app(deployment: Any, config: Config, num_threads: int, *arguments: Any) -> None:
    """Deploys the replicas, each with room for its engine in one placement group, and waits until they are healthy."""
    bundle: dict[str, float] = {"CPU": num_threads}
    if config.device == "cuda":
        bundle["GPU"] = 1
    configured: Any = serve.deployment(
        num_replicas=config.replicas,
        ray_actor_options={"num_cpus": 0},
        placement_group_bundles=[bundle],
        max_ongoing_requests=10_000,
        graceful_shutdown_timeout_s=config.server.drain,
        graceful_shutdown_wait_loop_s=0.2,
        health_check_period_s=2,
        health_check_timeout_s=10,
        logging_config=_quiet(),
    )
    serve.run(configured(deployment).bind(*arguments), name="phi-cluster", route_prefix="/", blocking=False)


def stop_serve() -> None:
    """Drains the replicas (streams may go on for the graceful time), then ends Serve's processes."""
    with contextlib.suppress(Exception):
        serve.shutdown()


def stop_ray() -> None:
    """Ends every process of our Ray."""
    ray.shutdown()


def _quiet() -> dict[str, Any]:
    return {"log_level": "ERROR", "enable_access_log": False}
