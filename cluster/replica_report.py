"""What a replica tells the controller about itself, about once a second.

Owns: this shape. Knows nothing of how the numbers are found or what becomes of them.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from phi_cluster.cluster.engine_recycler import EngineReport
from phi_cluster.cluster.events import Event
from phi_cluster.monitoring.snapshots import FamilySnapshot

# Of a replica that has not reported for so long nothing counts that was true only then; one that is silent for so much
# longer is gone.
SILENT_AFTER_SECONDS = 5.0
GONE_AFTER_SECONDS = 600.0


@dataclass(frozen=True)
class ReplicaReport:
    """`replica_id` is its own, no later one has it. `snapshot`: all it has counted (monitoring/replica_metrics.py).
    Private memory in bytes; of each standby engine with its pid. `engine` None: none serves. `last_step_seconds`: how
    long ago the engine's last step was; `queue_seconds`: how long the oldest sequence has waited in it. `events`: what
    happened since it was heard last. `address`: host:port where peers reach it ("": nowhere); `num_open_turns` run or
    wait in it, `max_running_turns` are computed at once."""

    replica_id: str
    node_id: str
    pid: int
    age_seconds: float
    snapshot: list[FamilySnapshot] = field(repr=False)
    private_nbytes: int
    standby_engines: tuple[tuple[int, int], ...]
    engine: EngineReport | None
    last_step_seconds: float
    queue_seconds: float
    events: list[Event] = field(default_factory=list)
    address: str = ""
    num_open_turns: int = 0
    max_running_turns: int = 0
