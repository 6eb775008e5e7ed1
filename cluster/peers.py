"""The replicas of other nodes: what the controller tells of them, and what a replica knows by it.

Owns: where each listens and how much it has to do, as of a second ago; that nobody who is silent is told of; and what a
replica has sent to others since it was told. Knows nothing of Ray, of how a turn gets to a peer and of what is decided
by it.

Where all replicas are on one node nothing is told and nothing is looked at.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from phi_cluster.cluster.placement import Costs, NodeLoad
from phi_cluster.cluster.replica_report import SILENT_AFTER_SECONDS, ReplicaReport
from phi_cluster.cluster.session.recycler import RecycleReason
from phi_cluster.cluster.session.reports import KeeperReport

# What was told so long ago is not known any more. A controller is back sooner.
_STALE_SECONDS = 10.0
# A peer that could not be reached is left alone for so long.
_SUSPECT_SECONDS = 5.0
# No more is told of: nodes, and of each the replicas that have least to do.
_MAX_NODES = 256
_MAX_REPLICAS = 4


@dataclass(frozen=True)
class PeerReplica:
    """A replica that takes turns: `address` is host:port, for whoever can prove to belong to the cluster."""

    replica_id: str
    node_id: str
    address: str
    num_open: int
    capacity: int


@dataclass(frozen=True)
class PeerNews:
    """All that is told of a cluster of several nodes, the one that is told included; and the slowest node's speeds, of
    those that have measured them (0: none has)."""

    nodes: tuple[NodeLoad, ...] = ()
    replicas: tuple[PeerReplica, ...] = ()
    move_bytes_per_second: float = 0.0
    compute_tokens_per_second: float = 0.0


@dataclass(frozen=True)
class ReplicaOrders:
    """What the controller answers to a replica's report: why its engine is to be renewed now (None: it is not), where
    the cluster's accounts and stored responses are, and the peers, if there are other nodes."""

    recycle: RecycleReason | None
    head_node_id: str
    peers: PeerNews = PeerNews()


class PeerBook:
    """The controller's. `clock` is monotonic, in seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._replicas: dict[str, tuple[float, PeerReplica]] = {}
        # By node: KV memory of turns under way, and the budget.
        self._memory: dict[str, tuple[int, int]] = {}
        # By node: bytes a second of its moves, tokens a second of its turns.
        self._speeds: dict[str, tuple[float, float]] = {}
        self._draining: frozenset[str] = frozenset()

    def take_replica(self, report: ReplicaReport) -> None:
        if report.address:
            told = PeerReplica(
                report.replica_id, report.node_id, report.address, report.num_open_turns, report.max_running_turns
            )
            self._replicas[report.replica_id] = self._clock(), told

    def take_keeper(self, report: KeeperReport) -> None:
        idle = sum(one.stats.kv_cache_bytes for one in report.sessions if not one.stats.in_turn)
        self._memory[report.node_id] = max(report.reserved_nbytes - idle, 0), report.budget_nbytes
        self._speeds[report.node_id] = report.move_bytes_per_second, report.compute_tokens_per_second

    def drain(self, node_ids: Iterable[str]) -> None:
        """These nodes, and no others, are about to go."""
        self._draining = frozenset(node_ids)

    def forget_node(self, node_id: str) -> None:
        """The node is dead."""
        self._memory.pop(node_id, None)
        self._speeds.pop(node_id, None)
        self._replicas = {name: one for name, one in self._replicas.items() if one[1].node_id != node_id}

    @property
    def has_several_nodes(self) -> bool:
        return len({one.node_id for _, one in self._replicas.values()}) > 1

    def news(self) -> PeerNews:
        """Of all nodes that have a replica which reported lately; nothing if that is one node."""
        if not self.has_several_nodes:
            return PeerNews()
        now = self._clock()
        self._replicas = {name: one for name, one in self._replicas.items() if now - one[0] <= SILENT_AFTER_SECONDS}
        by_node: dict[str, list[PeerReplica]] = {}
        for _, one in self._replicas.values():
            by_node.setdefault(one.node_id, []).append(one)
        if len(by_node) < 2:
            return PeerNews()
        chosen = sorted(by_node)[:_MAX_NODES]
        nodes = tuple(self._load(node_id, by_node[node_id]) for node_id in chosen)
        replicas = (one for node_id in chosen for one in sorted(by_node[node_id], key=_by_room)[:_MAX_REPLICAS])
        moving = _slowest(one[0] for one in self._speeds.values())
        computing = _slowest(one[1] for one in self._speeds.values())
        return PeerNews(nodes, tuple(replicas), moving, computing)

    def _load(self, node_id: str, replicas: list[PeerReplica]) -> NodeLoad:
        used, budget = self._memory.get(node_id, (0, 0))
        return NodeLoad(
            node_id,
            num_open=sum(one.num_open for one in replicas),
            capacity=sum(one.capacity for one in replicas),
            kv_nbytes=used,
            kv_budget=budget,
            is_draining=node_id in self._draining,
        )


class PeerTable:
    """A replica's. `num_open()`: its own turns just now; `capacity`: so many it computes at once. `clock` is monotonic,
    in seconds. For one event loop."""

    def __init__(
        self,
        node_id: str,
        num_open: Callable[[], int],
        clock: Callable[[], float] = time.monotonic,
        capacity: int = 1,
    ) -> None:
        self.node_id = node_id
        self._capacity = capacity
        self._num_open = num_open
        self._clock = clock
        self._news = PeerNews()
        self._told_at = 0.0
        self._reported = 0
        # Turns sent to others since they were told of, by replica.
        self._sent: Counter[str] = Counter()
        self._suspects: dict[str, float] = {}
        # None: not told yet.
        self.head_node_id: str | None = None

    def take(self, orders: ReplicaOrders, num_reported: int) -> None:
        """What the controller has told; `num_reported`: turns of this replica that it was told of."""
        self._news, self._told_at, self._reported = orders.peers, self._clock(), num_reported
        self.head_node_id = orders.head_node_id
        self._sent.clear()

    @property
    def has_peers(self) -> bool:
        return bool(self._news.nodes) and self._clock() - self._told_at <= _STALE_SECONDS

    def costs(self, assumed: Costs) -> Costs:
        """With the speeds that were measured in the place of those that are assumed."""
        news = self._news
        return replace(
            assumed,
            move_bytes_per_second=news.move_bytes_per_second or assumed.move_bytes_per_second,
            compute_tokens_per_second=news.compute_tokens_per_second or assumed.compute_tokens_per_second,
        )

    @property
    def own(self) -> NodeLoad:
        """This node."""
        told = next((one for one in self._news.nodes if one.node_id == self.node_id), None)
        if told is None:
            # It has not been told of yet.
            return NodeLoad(self.node_id, self._num_open(), self._capacity)
        return replace(told, num_open=max(told.num_open + self._num_open() - self._reported, 0))

    @property
    def others(self) -> dict[str, NodeLoad]:
        """Other nodes on which there is a replica that can be asked, by id."""
        if not self.has_peers:
            return {}
        sent: Counter[str] = Counter()
        reachable = set()
        for one in self._news.replicas:
            if one.node_id != self.node_id and not self._is_suspect(one):
                reachable.add(one.node_id)
                sent[one.node_id] += self._sent[one.replica_id]
        return {
            one.node_id: replace(one, num_open=one.num_open + sent[one.node_id])
            for one in self._news.nodes
            if one.node_id in reachable
        }

    @property
    def node_ids(self) -> frozenset[str]:
        """The other nodes, whether their replicas can be asked just now or not."""
        if not self.has_peers:
            return frozenset()
        return frozenset(one.node_id for one in self._news.nodes) - {self.node_id}

    def replica_on(self, node_id: str) -> PeerReplica | None:
        """The one of the node's that has least to do; None: none can be asked."""
        if not self.has_peers:
            return None
        there = [one for one in self._news.replicas if one.node_id == node_id and not self._is_suspect(one)]
        told = [replace(one, num_open=one.num_open + self._sent[one.replica_id]) for one in there]
        return min(told, key=_by_room, default=None)

    def sent(self, peer: PeerReplica, num_turns: int) -> None:
        """So many turns go there, of which nobody has told yet."""
        self._sent[peer.replica_id] += num_turns

    def suspect(self, peer: PeerReplica) -> None:
        """It could not be reached: for a moment it is not asked again."""
        self._suspects[peer.replica_id] = self._clock() + _SUSPECT_SECONDS

    def _is_suspect(self, peer: PeerReplica) -> bool:
        until = self._suspects.get(peer.replica_id)
        if until is not None and self._clock() >= until:
            del self._suspects[peer.replica_id]
        return peer.replica_id in self._suspects


def _slowest(speeds: Iterable[float]) -> float:
    return min((one for one in speeds if one), default=0.0)


def _by_room(one: PeerReplica) -> tuple[float, str]:
    return one.num_open / max(one.capacity, 1), one.replica_id
