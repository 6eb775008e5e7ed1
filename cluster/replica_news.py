"""What a replica tells the controller of itself, beside its counters.

Owns: the shape. Knows nothing of how it is found, or of what becomes of it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from phi_cluster.cluster.events import Event


@dataclass(frozen=True)
class ReplicaNews:
    """Where it is, for how many seconds, and what happened there since it was heard last."""

    node_id: str
    age_seconds: float
    events: list[Event] = field(default_factory=list)
