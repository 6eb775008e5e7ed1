"""How much of its memory for keys and values a node needs, as what its keeper told last.

Owns: what counts as needed. Pure. Knows nothing of who collects it, and of what is decided by it.
"""

from __future__ import annotations

from typing import NamedTuple

from phi_cluster.cluster.session.reports import KeeperReport

# A conversation that has idled for longer is not in anybody's way: its memory goes to whoever wants it.
NEEDED_SECONDS = 60.0


class KVLoad(NamedTuple):
    """In bytes. `needed`: by sessions in a turn, or used within NEEDED_SECONDS."""

    needed: float
    budget: float


class KVLoads:
    """Of all nodes."""

    def __init__(self) -> None:
        self._loads: dict[str, KVLoad] = {}

    def take(self, report: KeeperReport) -> None:
        needed = sum(
            s.stats.kv_cache_bytes for s in report.sessions if s.stats.in_turn or s.stats.idle_seconds < NEEDED_SECONDS
        )
        self._loads[report.node_id] = KVLoad(needed, report.budget_nbytes)

    def forget(self, node_id: str) -> None:
        self._loads.pop(node_id, None)

    def share(self, node_id: str, num_replicas: int) -> KVLoad:
        """What one of the node's replicas tells of it, so that all of them together tell it once. Nothing is known of a
        node whose keeper has told nothing yet."""
        load = self._loads.get(node_id, KVLoad(0, 0))
        return KVLoad(load.needed / max(num_replicas, 1), load.budget / max(num_replicas, 1))
