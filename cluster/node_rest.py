"""When a node that has no replica gives back what it has, so that whoever lends machines may take it away.

Ray's autoscaler takes no machine on which an actor lives or an object lies: the node's keeper and weights would hold it
for ever. Owns: this decision, and which nodes rest. Pure. Knows nothing of how it is carried out.
"""

from __future__ import annotations

from collections.abc import Callable


class NodeRests:
    """`after`: seconds without a replica; None: never. `clock`: monotonic seconds."""

    def __init__(self, after: float | None, clock: Callable[[], float]):
        self._after = after
        self._clock = clock
        # Without a replica since, by node.
        self._empty_since: dict[str, float] = {}
        self._resting: set[str] = set()

    def should_rest(self, node_id: str, num_replicas: int) -> bool:
        """Of a node that has its keeper: whether it is to give it back now. Asked regularly."""
        if num_replicas or self._after is None:
            self._empty_since.pop(node_id, None)
            return False
        since = self._empty_since.setdefault(node_id, self._clock())
        return self._clock() - since >= self._after

    def rest(self, node_id: str) -> None:
        """It has given it back."""
        self._resting.add(node_id)
        self._empty_since.pop(node_id, None)

    def wake(self, node_id: str) -> None:
        """A replica is there, and wants what it gave back."""
        self._resting.discard(node_id)
        self._empty_since.pop(node_id, None)

    def forget(self, node_id: str) -> None:
        """The node is dead."""
        self.wake(node_id)

    def rests(self, node_id: str) -> bool:
        return node_id in self._resting
