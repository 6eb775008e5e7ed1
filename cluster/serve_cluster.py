"""Ray Serve on our Ray: its controller, HAProxy, and the replicas.

Owns: starting, deploying and draining. Knows nothing of what a replica does. Importing it takes a second, so it is
imported while Ray starts.
"""

from __future__ import annotations

import contextlib
import logging
import time
from typing import Any

import ray
from ray import serve

from phi_cluster.cluster.config import Config
from phi_cluster.cluster.errors import StartError


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


def _quiet() -> dict[str, Any]:
    return {"log_level": "ERROR", "enable_access_log": False}
