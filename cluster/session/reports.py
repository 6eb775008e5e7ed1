"""What a keeper tells of its sessions: to the controller in numbers, to users under the names of the HTTP API.

Owns: these shapes. Knows nothing of Ray, or of how the numbers are found.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from phi_cluster.cluster.events import Event
from phi_cluster.cluster.messages import ProcessId
from phi_cluster.cluster.processes import private_bytes
from phi_cluster.cluster.session.accounts import UsageTotals
from phi_cluster.cluster.session.journal import Glance
from phi_cluster.cluster.session.session import SessionStats
from phi_cluster.monitoring.snapshots import FamilySnapshot


@dataclass(frozen=True)
class SessionReport:
    """One session in memory. `actor_pid` None: the keeper holds it. Private memory of its actor in bytes, now and
    when it took the session."""

    stats: SessionStats
    actor_pid: int | None
    private_nbytes: int
    private_baseline: int

    @property
    def state(self) -> str:
        """Who has it: `ephemeral` of an unnamed conversation, else `active` (an actor) or `held` (the keeper)."""
        if self.stats.key.ephemeral:
            return "ephemeral"
        return "held" if self.actor_pid is None else "active"


@dataclass(frozen=True)
class KeeperReport:
    """What the controller collects. Bytes; counters since this keeper started; `counts` are those that the metrics
    declare, `snapshot` what it measures (see monitoring/session_metrics.py). The speeds are those with which sessions
    come from other nodes and prompts are computed, as measured: for moving_policy.is_worth_moving."""

    node_id: str
    process: ProcessId
    budget_nbytes: int
    reserved_nbytes: int
    sessions: list[SessionReport]
    num_stored: int
    num_hibernated: int
    hibernated_nbytes: int
    num_warm: int
    activations: int
    recycles: dict[str, int]
    private_nbytes: int
    counts: dict[str, int]
    journal_nbytes: int = 0
    snapshot: list[FamilySnapshot] = field(default_factory=list)
    usage: list[UsageTotals] = field(default_factory=list)
    # Since the controller asked last.
    events: list[Event] = field(default_factory=list)
    move_bytes_per_second: float = 0.0
    compute_tokens_per_second: float = 0.0


def public_usage(totals: UsageTotals, *, num_turns: int, num_sessions: int, kv_cache_nbytes: int) -> dict[str, Any]:
    """What a tenant has used and uses now, under the names of the HTTP API."""
    return {
        "name": totals.tenant,
        "since": round(totals.since, 3),
        "requests": totals.requests,
        "refused": totals.refused,
        "prompt_tokens": totals.prompt_tokens,
        "cached_tokens": totals.cached_tokens,
        "completion_tokens": totals.completion_tokens,
        "turns_running": num_turns,
        "sessions": num_sessions,
        "kv_cache_bytes": kv_cache_nbytes,
    }


def public_description(stats: SessionStats, actor_pid: int | None, node_id: str) -> dict[str, Any]:
    """A session in memory, under the names of the HTTP API."""
    return {
        "id": stats.key.session_id,
        "state": "active" if actor_pid is not None else "held",
        "num_tokens": stats.num_tokens,
        "kv_cache_bytes": stats.kv_cache_bytes,
        "disk_bytes": 0,
        "process_bytes": private_or_zero(actor_pid),
        "turns": stats.turns,
        "age_seconds": round(stats.age_seconds, 3),
        "idle_seconds": round(stats.idle_seconds, 3),
        "activation": stats.activation,
        "recycles": stats.recycles,
        "holder": "keeper" if actor_pid is None else "actor",
        "node_id": node_id,
        "actor_pid": actor_pid,
    }


def stored_description(session_id: str, seen: Glance, now: float, disk_nbytes: int | None) -> dict[str, Any]:
    """A session that only the disk holds, under the same names. `now` is wall clock, seconds; `disk_nbytes` its
    hibernated cache, None if there is only its journal."""
    return {
        "id": session_id,
        "state": "stored" if disk_nbytes is None else "hibernated",
        "num_tokens": seen.num_tokens,
        "kv_cache_bytes": 0,
        "disk_bytes": disk_nbytes or 0,
        "process_bytes": 0,
        "turns": seen.turns,
        "age_seconds": round(max(now - seen.created_at, 0.0), 3),
        "idle_seconds": round(max(now - seen.last_used, 0.0), 3),
        "activation": seen.activation,
        "recycles": seen.recycles,
        "holder": "disk",
        "node_id": None,
        "actor_pid": None,
    }


def private_or_zero(pid: int | None) -> int:
    """Private memory in bytes of a process that there may not be, or not any more."""
    try:
        return private_bytes(pid) if pid else 0
    except ProcessLookupError:
        return 0
