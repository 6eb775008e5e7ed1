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
from phi_cluster.cluster.errors import StartError
from phi_cluster.cluster.first_choice import balance_lines
from phi_cluster.cluster.logs import FORMAT_VARIABLE, LEVEL_VARIABLE
from phi_cluster.cluster.runtime_dir import RUNTIME_DIR_VARIABLE
from phi_cluster.cluster.secret_file import read_secret

# By name: importing it here would cost every start a web framework.
INGRESS_PATH = "phi_cluster.cluster.http.ingress.middlewares"
# A stream may last so long while its replica or HAProxy is being replaced.
LONGEST_STREAM_SECONDS = 3600
# Short names: see runtime_dir.MAX_PATH_NBYTES.
_HAPROXY = "h"
_OF_SEVERAL_MACHINES = {
    # A machine that is silent for so long is taken for lost: by default after half a minute.
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "3000",
    "RAY_health_check_failure_threshold": "4",
}


def set_environment(config: Config, runtime_dir: Path, token: str) -> None:
    """Before Ray and Serve are imported."""
    (runtime_dir / _HAPROXY).mkdir(mode=0o700, exist_ok=True)
    os.environ.update(environment(config, runtime_dir, token))


def environment(config: Config, runtime_dir: Path, token: str) -> dict[str, str]:
    """Settings that only count before Ray and Serve are imported by their processes, so all of Ray's processes on all
    machines must have them."""
    haproxy = runtime_dir / _HAPROXY
    first_port = config.server.internal_ports
    return {
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
        "RAY_SERVE_HAPROXY_BALANCE_ALGORITHM": balance_lines(config.session_header, has_nodes=config.has_nodes),
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
        # See http/ingress.py.
        "PHI_CLUSTER_MAY_SLEEP": "0" if config.replicas else "1",
        # By default 5 s: where the machine is busy with something else a proxy takes longer, and Serve would kill it,
        # which ends our start.
        "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
        # Ten times a second Serve's controller looks at everything by default, and asks the GCS; and replicas write
        # down measurements of Serve's, which nobody reads here.
        "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.25",
        "RAY_SERVE_METRICS_EXPORT_INTERVAL_MS": "10000",
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
        "RAY_AUTH_TOKEN": token,
        "RAY_DEDUP_LOGS": "0",
        # By default glibc gives threads heaps of their own, eight for each core, and all of them grow for hours where
        # actors come and go.
        "MALLOC_ARENA_MAX": "2",
        # What Ray remembers of the dead: of 100,000 actors by default, 50 KB of each. Session actors come and go.
        "RAY_maximum_gcs_destroyed_actor_cached_count": "64",
        "RAY_maximum_gcs_dead_worker_cached_count": "64",
        # Ray's own metrics and task events, which nobody reads here, cost the keeper and Ray's agent 100 KB each
        # for every session actor. Ours are the controller's.
        # Nor does anybody read how long each handler of its loops took.
        "RAY_enable_metrics_collection": "0",
        "RAY_event_stats": "0",
        "RAY_task_events_report_interval_ms": "0",
    } | (_OF_SEVERAL_MACHINES if config.has_nodes else {})


def token_of(config: Config) -> str:
    """What Ray's processes know each other by: the machines' shared one, or one of this start. Raises StartError."""
    if config.has_nodes:
        return shared_token(config.token_path)
    return os.environ.get("RAY_AUTH_TOKEN") or secrets.token_hex(32)


def shared_token(path: Path | None) -> str:
    """Raises StartError."""
    if path is not None:
        return read_secret(path, "nodes.token_file").hex()
    if not (given := os.environ.get("RAY_AUTH_TOKEN")):
        raise StartError(
            "machines that others reach want a secret that they share, else anybody could run anything on them: "
            "set nodes.token_file (openssl rand -hex 32, mode 0600), or RAY_AUTH_TOKEN"
        )
    return given
