"""The cluster in one answer: nodes, replicas and engines, their memory, and the last minutes' speeds.

Owns: the shape, under the names of the HTTP API. Knows nothing of how reports come, of Ray or HTTP. Bytes, seconds.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from phi_cluster.cluster.replica_report import ReplicaReport
from phi_cluster.cluster.session.reports import KeeperReport

# By SessionReport.state.
_STATES = {"active": "active", "held": "held", "ephemeral": "unnamed"}


@dataclass(frozen=True)
class ReplicaView:
    """What one replica told last. `silent_seconds`: since then."""

    report: ReplicaReport
    silent_seconds: float


def node_view(report: KeeperReport) -> dict[str, Any]:
    """A node's sessions and memory. Unnamed conversations are counted for themselves."""
    kv_bytes = dict.fromkeys(_STATES.values(), 0)
    sessions = dict.fromkeys(_STATES.values(), 0)
    for one in report.sessions:
        state = _STATES[one.state]
        kv_bytes[state] += one.stats.kv_cache_bytes
        sessions[state] += 1
    return {
        "id": report.node_id,
        "kv_cache": {
            "budget_bytes": report.budget_nbytes,
            "leased_bytes": report.reserved_nbytes,
            "bytes_by_state": kv_bytes,
        },
        "hibernated_bytes": report.hibernated_nbytes,
        "sessions_by_state": sessions | {"hibernated": report.num_hibernated, "stored": report.num_stored},
        "turns_running": sum(one.stats.in_turn for one in report.sessions),
        "warm_actors": report.num_warm,
        "keeper": {"pid": report.process.pid, "private_bytes": report.private_nbytes},
        "session_actors": {
            "count": sum(one.actor_pid is not None for one in report.sessions),
            "private_bytes": sum(one.private_nbytes for one in report.sessions),
        },
    }


def replica_view(view: ReplicaView) -> dict[str, Any]:
    """A replica with its engines."""
    report, engine = view.report, view.report.engine
    gauges = {
        name: sum(value for _, _, value in samples) for name, kind, _, samples in report.snapshot if kind == "gauge"
    }
    return {
        "id": report.replica_id,
        "node_id": report.node_id,
        "pid": report.pid,
        "age_seconds": round(report.age_seconds + view.silent_seconds, 1),
        "silent_seconds": round(view.silent_seconds, 1),
        "private_bytes": report.private_nbytes,
        "requests_running": int(gauges.get("phi_num_requests_running", 0)),
        "requests_waiting": int(gauges.get("phi_num_requests_waiting", 0)),
        "engine": None
        if engine is None
        else {
            "pid": engine.pid,
            "age_seconds": round(engine.age_seconds, 1),
            "steps": engine.steps,
            "private_bytes": engine.private_nbytes,
            "private_growth_bytes": max(engine.private_nbytes - engine.private_baseline, 0),
        },
        "standby_engines": [{"pid": pid, "private_bytes": nbytes} for pid, nbytes in report.standby_engines],
    }


def overview(
    now: float,
    nodes: Iterable[KeeperReport],
    replicas: Iterable[ReplicaView],
    controller: dict[str, Any],
    weights_nbytes: int,
    last_minute: dict[str, Any],
    history: list[dict[str, Any]],
) -> dict[str, Any]:
    """All of it. `now` is wall clock."""
    seen = [replica_view(one) for one in replicas]
    return {
        "object": "cluster",
        "time": round(now, 3),
        "nodes": [node_view(one) for one in nodes],
        "replicas": seen,
        "controller": controller,
        "weights_bytes": weights_nbytes,
        "requests_running": sum(one["requests_running"] for one in seen),
        "requests_waiting": sum(one["requests_waiting"] for one in seen),
        "last_minute": last_minute,
        "history": history,
    }
