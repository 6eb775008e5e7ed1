"""The keepers of other nodes, as a replica finds them.

Owns: which nodes are known to live (their replicas report) and the handles of their keepers. Implements
session.directory.OtherNodes. Knows nothing of what keepers are asked.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import ray

from phi_cluster.cluster.actors import NAMESPACE, keeper_name
from phi_cluster.cluster.peers import PeerTable


class NodeKeepers:
    """For one event loop."""

    def __init__(self, peers: PeerTable):
        self._peers = peers

    @property
    def own_id(self) -> str:
        return self._peers.node_id

    @property
    def ids(self) -> Collection[str]:
        return self._peers.node_ids

    @property
    def head_id(self) -> str:
        # Until anything is told, there is nobody else.
        return self._peers.head_node_id or self._peers.node_id

    def keeper(self, node_id: str) -> Any:
        """Raises ValueError if there is none."""
        return ray.get_actor(keeper_name(node_id), namespace=NAMESPACE)
