"""Which node a turn belongs to: here, another one, or here with the memory that another one has of the session.

Owns: the decision, and the order in which nodes stand for an unnamed conversation. Pure: it is told all it knows (no
Ray, no network, no clock) and does nothing. Knows nothing of how a turn gets there (forwarding.py), or memory
(session/moving.py).

A session stays where its memory is as long as a turn has room there. It leaves only for a node that is emptier by
`Costs.margin`, and back it would need the same again: so two nodes never play ball with it. A node that drains is left
and never chosen; one that is not among those told of is dead, and never chosen either.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TypeAlias


@dataclass(frozen=True)
class NodeLoad:
    """A node as it was told last. `num_open`: its turns, running and waiting; `capacity`: so many are computed at once.
    `kv_nbytes`: KV memory leased to turns under way (what idle sessions hold gives way), of `kv_budget` (0: not
    known)."""

    node_id: str
    num_open: int
    capacity: int
    kv_nbytes: int = 0
    kv_budget: int = 0
    is_draining: bool = False

    @property
    def pressure(self) -> float:
        """From 1 on, one turn more has to wait: for its place, or for memory."""
        turns = self.num_open / max(self.capacity, 1)
        return max(turns, self.kv_nbytes / self.kv_budget) if self.kv_budget else turns

    @property
    def is_crowded(self) -> bool:
        return self.pressure >= 1.0


@dataclass(frozen=True)
class Costs:
    """What it costs to leave a node, as measured: a move takes `move_seconds` and then `move_bytes_per_second` (0:
    there are no moves), computing again `compute_tokens_per_second`. `turn_seconds` is how long a turn takes.

    `margin`: by so much less pressure another node is better. `patience`: waiting is put up with until it takes so many
    times as long as leaving.
    """

    bytes_per_token: int
    move_bytes_per_second: float = 100e6
    move_seconds: float = 0.1
    compute_tokens_per_second: float = 500.0
    turn_seconds: float = 3.0
    margin: float = 0.25
    patience: float = 2.0

    def moving(self, num_tokens: int) -> float:
        """Seconds to fetch what a node has of so many tokens."""
        if not self.move_bytes_per_second:
            return float("inf")
        return self.move_seconds + num_tokens * self.bytes_per_token / self.move_bytes_per_second

    def computing(self, num_tokens: int) -> float:
        """Seconds to compute so many tokens again."""
        return num_tokens / self.compute_tokens_per_second


@dataclass(frozen=True)
class AskedTurn:
    """A turn of a named session. `seat`: the node that began the session's last turn (None: there is none, or it is not
    known); `num_cached`: so many tokens may be in memory there. `num_prompt`: of the turn, if known."""

    seat: str | None = None
    num_cached: int = 0
    num_prompt: int | None = None

    @property
    def num_saved(self) -> int:
        """Tokens that need not be computed at the seat."""
        return self.num_cached if self.num_prompt is None else min(self.num_cached, self.num_prompt)


@dataclass(frozen=True)
class Here:
    """Run it here; what this node lacks is computed from the journal."""


@dataclass(frozen=True)
class Forward:
    """Let that node run it. `move_from`: after it has fetched the session's memory from there."""

    node_id: str
    move_from: str | None = None


@dataclass(frozen=True)
class Move:
    """Fetch the session's memory from that node, then run it here."""

    source_node_id: str


Placement: TypeAlias = Here | Forward | Move


def place(turn: AskedTurn, own: NodeLoad, peers: Mapping[str, NodeLoad], costs: Costs) -> Placement:
    """Where a named session's turn is run that came to `own`. `peers`: the other nodes that live, by id."""
    nodes = {**peers, own.node_id: own}
    seat = None if turn.seat is None else nodes.get(turn.seat)
    if seat is None:
        # It costs the same everywhere.
        if own.is_draining or own.is_crowded:
            return _run_at(_emptiest(own, nodes.values(), costs), own)
        return Here()
    if not seat.is_draining and not seat.is_crowded:
        return _run_at(seat, own)
    target = _emptiest(own, nodes.values(), costs)
    if target.node_id == seat.node_id or target.is_draining:
        return _run_at(seat, own)
    moving, computing = costs.moving(turn.num_saved), costs.computing(turn.num_saved)
    if not seat.is_draining:
        if target.pressure > seat.pressure - costs.margin:
            return _run_at(seat, own)
        waiting = (seat.pressure - 1.0) * costs.turn_seconds
        if waiting <= costs.patience * min(moving, computing):
            return _run_at(seat, own)
    is_moved = moving < computing
    if target.node_id != own.node_id:
        return Forward(target.node_id, seat.node_id if is_moved else None)
    return Move(seat.node_id) if is_moved else Here()


def place_unnamed(name: bytes, own: NodeLoad, peers: Mapping[str, NodeLoad]) -> Placement:
    """Where a turn of an unnamed conversation is run. `name` is the same for all of its turns: so they come to the same
    node, which has its cache, as long as there is room."""
    nodes = {**peers, own.node_id: own}
    usable = [node_id for node_id, node in nodes.items() if not node.is_draining]
    if not usable:
        return Here()
    order = rendezvous(name, usable)
    chosen = next((node_id for node_id in order if not nodes[node_id].is_crowded), order[0])
    return _run_at(nodes[chosen], own)


def rendezvous(name: bytes, node_ids: Iterable[str]) -> list[str]:
    """The nodes in the order in which they stand for `name`. One that goes or comes changes no other's place."""

    def rank(node_id: str) -> bytes:
        return hashlib.blake2b(node_id.encode(), key=hashlib.blake2b(name, digest_size=32).digest()).digest()

    return sorted(node_ids, key=rank)


def _emptiest(own: NodeLoad, nodes: Iterable[NodeLoad], costs: Costs) -> NodeLoad:
    """Of those that do not drain; `own` unless another has less pressure by the margin."""
    usable = [node for node in nodes if not node.is_draining]
    if not usable:
        return own
    best = min(usable, key=lambda node: (node.pressure, node.node_id))
    is_own_good = not own.is_draining and own.pressure <= best.pressure + costs.margin
    return own if is_own_good else best


def _run_at(node: NodeLoad, own: NodeLoad) -> Placement:
    return Here() if node.node_id == own.node_id else Forward(node.node_id)
