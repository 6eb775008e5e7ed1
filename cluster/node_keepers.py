"""The keepers of other nodes, as a replica finds them.

Owns: which nodes are known to live (their replicas report) and the handles of their keepers. Implements
session.keeper_calls.OtherNodes. Knows nothing of what keepers are asked.
"""

from __future__ import annotations

from collections.abc import Collection
from functools import partial
from typing import Any

import ray

from phi_cluster.cluster.actors import NAMESPACE, keeper_names
from phi_cluster.cluster.peers import PeerTable
from phi_cluster.cluster.session.keeper_finder import KeeperFinder


class NodeKeepers:
    """For one event loop."""

    def __init__(self, peers: PeerTable):
        self._peers = peers
        self._finders: dict[str, KeeperFinder] = {}

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
        return self._finder(node_id)()

    def moved(self, node_id: str) -> None:
        """The one that was found last is not in charge."""
        self._finder(node_id).moved()

    def lost(self, node_id: str) -> None:
        """The one that was found last does not answer."""
        self._finder(node_id).lost()

    def _finder(self, node_id: str) -> KeeperFinder:
        if node_id not in self._finders:
            # Of nodes that are gone nothing is kept.
            self._finders = {name: one for name, one in self._finders.items() if name in self.ids}
            find = partial(ray.get_actor, namespace=NAMESPACE)
            self._finders[node_id] = KeeperFinder(find, keeper_names(node_id))
        return self._finders[node_id]
