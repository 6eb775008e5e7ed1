"""What Ray and Serve read from the environment: in their own processes, and some of it when they are imported.

Owns: these settings, each with its reason. Knows nothing of Ray itself: it is called before anything imports Ray, so
it must not.
"""

from __future__ import annotations

import math
import os
import secrets
from pathlib import Path

from phi_cluster.cluster.config import Config
from phi_cluster.cluster.logs import FORMAT_VARIABLE, LEVEL_VARIABLE
from phi_cluster.cluster.runtime_dir import RUNTIME_DIR_VARIABLE

# By name: importing it here would cost every start a web framework.
INGRESS_PATH = "phi_cluster.cluster.http.ingress.middlewares"
# A stream may last so long while its replica or HAProxy is being replaced.
LONGEST_STREAM_SECONDS = 3600


def set_environment(config: Config, runtime_dir: Path) -> None:
    """Settings that only count before Ray and Serve are imported by their processes."""
    # Short names: see runtime_dir.MAX_PATH_NBYTES.
    haproxy = runtime_dir / "h"
    haproxy.mkdir(mode=0o700, exist_ok=True)
    first_port = config.server.internal_ports
    os.environ.update(
        {
            RUNTIME_DIR_VARIABLE: str(runtime_dir),
            FORMAT_VARIABLE: config.logging.format,
            LEVEL_VARIABLE: config.logging.level,
            "RAY_USAGE_STATS_ENABLED": "0",
            # Serve: HAProxy in front, replicas answer directly, streams outlive reloads.
            "RAY_SERVE_ENABLE_HA_PROXY": "1",
            "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
            "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(haproxy / "haproxy.cfg"),
            "RAY_SERVE_HAPROXY_SOCKET_PATH": str(haproxy / "a.sock"),
            "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(haproxy),
            "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(haproxy / "server-state"),
            "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(haproxy / "m.sock"),
            "RAY_SERVE_HAPROXY_METRICS_ENABLED": "0",
            "RAY_SERVE_HAPROXY_METRICS_PORT": str(first_port + 901),
            "RAY_SERVE_HAPROXY_STATS_PORT": str(first_port + 902),
            "RAY_SERVE_HAPROXY_NBTHREAD": "1",
            # A client that neither sends nor takes anything, when it is its turn to.
            "RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S": str(math.ceil(config.server.write_timeout) + 60),
            "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": str(LONGEST_STREAM_SECONDS),
            "RAY_SERVE_PORT_QUARANTINE_S": "60",
            # A replica that hangs is not drained: where replicas come and go, a drain may last an hour.
            "RAY_SERVE_FORCE_STOP_UNHEALTHY_REPLICAS": "0" if config.autoscaling.max_replicas is None else "1",
            "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "1",
            "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": str(first_port),
            "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": str(first_port + 400),
            "RAY_SERVE_DIRECT_INGRESS_MIN_GRPC_PORT": str(first_port + 401),
            "RAY_SERVE_DIRECT_INGRESS_MAX_GRPC_PORT": str(first_port + 898),
            # Whom HAProxy asks while there is no replica. On the same port for all servers of a machine, it may be
            # another server's, which would answer: with its own replica, and into its own journals.
            "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(first_port + 899),
            "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT": str(first_port + 900),
            "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": INGRESS_PATH,
            # A proxy that has not begun after 5 s is killed, and a start on a busy machine with it.
            "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
            "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "1",
            "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "1",
            # Workers at the priority of everybody else: engines must not wait for idle processes. Session actors
            # lower theirs.
            "RAY_worker_niceness": "0",
            # Segments are shared memory: Ray's monitor would kill bystanders for them. Our ledger keeps the bounds.
            "RAY_memory_monitor_refresh_ms": "0",
            # The object store has its pages from the start: were /dev/shm full when one is touched, whoever writes a
            # long message would die of SIGBUS.
            "RAY_preallocate_plasma_memory": "1",
            # Ray's gRPC ports listen on all interfaces: without this secret they refuse.
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": os.environ.get("RAY_AUTH_TOKEN") or secrets.token_hex(32),
            "RAY_DEDUP_LOGS": "0",
            # What Ray remembers of the dead: of 100,000 actors by default, 50 KB of each. Session actors come and go.
            "RAY_maximum_gcs_destroyed_actor_cached_count": "64",
            "RAY_maximum_gcs_dead_worker_cached_count": "64",
            # Ray's own metrics and task events, which nobody reads here, cost the keeper and Ray's agent 100 KB each
            # for every session actor. Ours are the controller's.
            "RAY_enable_metrics_collection": "0",
            "RAY_task_events_report_interval_ms": "0",
        }
    )
