"""The cluster in one answer: nodes, replicas and engines, their memory, and the last minutes' speeds.

Owns: the shape, under the names of the HTTP API. Knows nothing of how reports come, of Ray or HTTP. Bytes, seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from phi_cluster.cluster.engine_recycler import EngineReport
from phi_cluster.cluster.replica_news import ReplicaNews
from phi_cluster.cluster.session.reports import KeeperReport
from phi_cluster.monitoring.metrics import FamilySnapshot


@dataclass(frozen=True)
class ReplicaView:
    """What is known of one replica. `silent_seconds`: since it reported last."""

    replica_id: str
    pid: int
    news: ReplicaNews
    silent_seconds: float
    snapshot: list[FamilySnapshot]
    engine: EngineReport | None
    standby_pids: list[int]


def node_view(report: KeeperReport) -> dict[str, Any]:
    """A node's sessions and memory. Unnamed conversations are counted for themselves."""
    kv_bytes = dict.fromkeys(("active", "held", "unnamed"), 0)
    sessions = dict.fromkeys(("active", "held", "unnamed"), 0)
    for one in report.sessions:
        state = "unnamed" if one.stats.key.ephemeral else "held" if one.actor_pid is None else "active"
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


def replica_view(view: ReplicaView, private_bytes: Callable[[int], int]) -> dict[str, Any]:
    """A replica with its engines. `private_bytes` of a pid: 0 if it is gone."""
    engine = view.engine
    gauges = {
        name: sum(value for _, _, value in samples) for name, kind, _, samples in view.snapshot if kind == "gauge"
    }
    return {
        "id": view.replica_id,
        "node_id": view.news.node_id,
        "pid": view.pid,
        "age_seconds": round(view.news.age_seconds + view.silent_seconds, 1),
        "silent_seconds": round(view.silent_seconds, 1),
        "private_bytes": private_bytes(view.pid),
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
        "standby_engines": [{"pid": pid, "private_bytes": private_bytes(pid)} for pid in view.standby_pids],
    }


def cluster_view(
    now: float,
    nodes: Iterable[KeeperReport],
    replicas: Iterable[ReplicaView],
    controller: dict[str, Any],
    weights_nbytes: int,
    last_minute: dict[str, Any],
    history: list[dict[str, Any]],
    private_bytes: Callable[[int], int],
) -> dict[str, Any]:
    """All of it. `now` is wall clock."""
    seen = [replica_view(one, private_bytes) for one in replicas]
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
