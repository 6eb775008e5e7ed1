"""Ray Serve on our Ray: its controller, HAProxy, and the replicas.

Owns: starting, deploying and draining. Knows nothing of what a replica does. Importing it takes a second, so it is
imported while Ray starts.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
import warnings
from typing import Any

import ray
from ray import serve
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy

from phi_cluster.cluster.config import Config
from phi_cluster.cluster.errors import StartError
from phi_cluster.cluster.ray_environment import LONGEST_STREAM_SECONDS

APPLICATION = "phi-cluster"
# After the drain, for what turns leave.
_LAST_COMMITS_SECONDS = 6.0
# `serve.shutdown` returns after so long, whatever still drains.
_SERVE_WAITS_SECONDS = 30.0
# How often a replica tells its load.
_LOAD_SECONDS = 1.0


def start_serve(config: Config) -> None:
    """Serve's controller and HAProxy, on our port."""
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    serve.start(
        proxy_location="EveryNode" if config.has_nodes else "HeadOnly",
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


def application(deployment: Any, config: Config, num_threads: int, *arguments: Any) -> Any:
    """Of the replicas, each with room for its engine in one placement group."""
    bundle: dict[str, float] = {"CPU": num_threads}
    if config.device == "cuda":
        bundle["GPU"] = 1
    configured: Any = serve.deployment(
        **_number_of_replicas(config),
        ray_actor_options={"num_cpus": 0},
        placement_group_bundles=[bundle],
        max_ongoing_requests=10_000,
        graceful_shutdown_wait_loop_s=0.2,
        health_check_period_s=2,
        health_check_timeout_s=10,
        logging_config=_quiet(),
    )
    return configured(deployment).bind(*arguments)


def run_app(app: Any, *, waits: bool) -> None:
    """Deploys an application; `waits` until its replicas are healthy."""
    target = serve.RunTarget(app, name=APPLICATION, route_prefix="/")
    serve.run_many([target], wait_for_applications_running=waits)


def stop_serve(drain: float) -> bool:
    """Drains the replicas (streams may go on for `drain` seconds), then ends Serve's processes, unless somebody else
    has applications there. Whether they have ended: Serve waits for them for half a minute at most."""

    def shut_down() -> None:
        with contextlib.suppress(Exception):
            if set(serve.status().applications) - {APPLICATION}:
                serve.delete(APPLICATION)
            else:
                serve.shutdown()

    # Not waited for beyond the time: replicas are given longer where one more than needed is drained.
    thread = threading.Thread(target=shut_down, daemon=True)
    begin = time.monotonic()
    thread.start()
    thread.join(drain + _LAST_COMMITS_SECONDS)
    return not thread.is_alive() and time.monotonic() - begin < _SERVE_WAITS_SECONDS


def _number_of_replicas(config: Config) -> dict[str, Any]:
    """Options of the deployment. Where a replica may be one too many, its streams may last as long as any."""
    scaling = config.autoscaling
    if scaling.max_replicas is None:
        return {"num_replicas": config.replicas, "graceful_shutdown_timeout_s": config.server.drain}
    policy = AutoscalingPolicy(
        policy_function="phi_cluster.cluster.replica_scaling:LoadScaling",
        policy_kwargs={
            "target_turns": scaling.target_turns or max(config.engine.max_num_seqs / 2, 1),
            "max_wait": scaling.max_wait,
            # On one machine, a replica more has no more memory.
            "kv_target": scaling.kv_target if config.has_nodes else None,
        },
    )
    with warnings.catch_warnings():
        # The interval is to be replaced by a variable, which Serve does not read yet.
        warnings.simplefilter("ignore", DeprecationWarning)
        autoscaling = AutoscalingConfig(
            min_replicas=config.replicas,
            # Whoever starts the server wants to see it serve.
            initial_replicas=max(config.replicas, 1),
            max_replicas=scaling.max_replicas,
            metrics_interval_s=_LOAD_SECONDS,
            look_back_period_s=5 * _LOAD_SECONDS,
            upscale_delay_s=scaling.up_delay,
            downscale_delay_s=scaling.down_delay,
            policy=policy,
        )
    return {"autoscaling_config": autoscaling, "graceful_shutdown_timeout_s": LONGEST_STREAM_SECONDS}


def _quiet() -> dict[str, Any]:
    return {"log_level": "ERROR", "enable_access_log": False}
