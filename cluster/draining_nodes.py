"""Nodes that leave: their keepers send their sessions to others, again and again until nothing is left there.

Owns: which nodes drain, and how far each is. Knows nothing of how a session moves (session/evacuation.py), and of what
has a node drained: Ray says so.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from ray.exceptions import RayError

from phi_cluster.cluster.cluster_news import ClusterNews
from phi_cluster.cluster.errors import PhiError
from phi_cluster.cluster.events import EventKind

logger = logging.getLogger(__name__)

# One round of a keeper's; those in use to its end come in the next one.
_ROUND_SECONDS = 10.0
# Between two rounds: streams go on there until Serve ends its replicas.
_AGAIN_SECONDS = 1.0


class DrainingNodes:
    """For the controller's event loop. `keeper_of` raises ValueError for a node without one."""

    def __init__(self, news: ClusterNews, keeper_of: Callable[[str], Any], again_seconds: float = _AGAIN_SECONDS):
        self._news = news
        self._keeper_of = keeper_of
        self._again_seconds = again_seconds
        self._under_way: dict[str, asyncio.Task[None]] = {}
        self._empty: set[str] = set()

    def look(self, draining: Iterable[str], others: Sequence[str]) -> None:
        """Once a round: the nodes that drain now, and those that live and do not."""
        draining = set(draining)
        for node_id in self._under_way.keys() - draining:
            # Gone, or it stays after all.
            self._under_way.pop(node_id).cancel()
            self._empty.discard(node_id)
        for node_id in draining - self._under_way.keys():
            self._news.add(EventKind.NODE_DRAINING, reason=node_id[:12])
            self._under_way[node_id] = asyncio.get_running_loop().create_task(self._drain(node_id, others))

    def is_empty(self, node_id: str) -> bool:
        """Whether the last round has left no session in the node's memory."""
        return node_id in self._empty

    async def _drain(self, node_id: str, targets: Sequence[str]) -> None:
        while True:
            try:
                done = await self._keeper_of(node_id).evacuate.remote(list(targets), _ROUND_SECONDS)
            except (ValueError, PhiError, RayError) as error:
                logger.warning("node %s: its sessions were not moved: %s", node_id[:12], error)
            else:
                if done.failed:
                    self._empty.discard(node_id)
                else:
                    self._empty.add(node_id)
            await asyncio.sleep(self._again_seconds)
