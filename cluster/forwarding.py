"""Turns that belong to another node are run there, as if they were run here.

Owns: asking where a turn belongs, at most one hop, and what becomes of a turn whose peer is lost: it goes on here, with
the same words. Knows nothing of how that is decided (placement.py), of sockets (peer_link.py), of HTTP and Ray.

A turn whose peer is lost is read on here, behind the last word that came: what is left of its reply is taken over, and
the rest comes out the same. Should the peer live all the same, its turn is worth nothing any more: this one has taken
the session's epoch since.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace
from typing import Any, Protocol

from phi_cluster.cluster.admission import BoundedTurns
from phi_cluster.cluster.errors import Overloaded, PhiError, Unavailable
from phi_cluster.cluster.messages import SessionKey
from phi_cluster.cluster.peer_link import PeerLost
from phi_cluster.cluster.peers import PeerReplica, PeerTable
from phi_cluster.cluster.placement import AskedTurn, Costs, Forward, Here, Move, Placement, place, place_unnamed
from phi_cluster.cluster.turn_api import BEGINNING, Position, TextDelta, TurnEvent, TurnRequest, TurnStarted
from phi_cluster.cluster.turn_wire import SentTurn

logger = logging.getLogger(__name__)

# So much of a raw prompt names its conversation.
_NAMING_CHARS = 64


class Seat(Protocol):
    """What is known of a session without reading it."""

    @property
    def seat(self) -> str | None:
        """The node that began its last turn; None: not known."""
        ...

    @property
    def num_tokens(self) -> int: ...


class SessionsOfNodes(Protocol):
    """Knows where sessions are; implemented by `session.directory`."""

    async def locate(self, key: SessionKey) -> Seat | None:
        """None: there is no such session. Raises PhiError if that cannot be found out."""
        ...

    async def move_here(self, key: SessionKey, source_node_id: str) -> bool:
        """Fetches the session's memory from that node. False: it could not be had."""
        ...


class Links(Protocol):
    """Implemented by peer_link.PeerLinks."""

    def run(self, peer: PeerReplica, sent: SentTurn) -> AsyncGenerator[TurnEvent, None]: ...


class ForwardObserver(Protocol):
    """Counts turns by what became of them: "forwarded", "moved" (its memory was fetched first), "lost" (its peer)."""

    def on_forward(self, outcome: str) -> None: ...


class ForwardedTurns:
    """Runs turns where they belong (implements turn_api.TurnRunner). For one event loop. `turns` runs them here; at
    most `max_forwarded` are elsewhere at once."""

    def __init__(
        self,
        turns: BoundedTurns,
        peers: PeerTable,
        sessions: SessionsOfNodes,
        links: Links,
        costs: Costs,
        max_forwarded: int,
        observer: ForwardObserver,
    ):
        self._turns = turns
        self._peers = peers
        self._sessions = sessions
        self._links = links
        self._costs = costs
        self._max_forwarded = max_forwarded
        self._observer = observer
        self._num_forwarded = 0

    @property
    def num_forwarded(self) -> int:
        """Replies that are being made elsewhere."""
        return self._num_forwarded

    def check_room(self, num_choices: int = 1) -> None:
        """Raises Overloaded if a turn more, of so many replies, would be refused."""
        if not self._peers.has_peers or self._num_forwarded + num_choices > self._max_forwarded:
            self._turns.check_room(num_choices)

    async def run(self, request: TurnRequest) -> AsyncGenerator[TurnEvent, None]:
        """See turn_api.TurnRunner.run."""
        placement = await self._place(request) if self._peers.has_peers else Here()
        peer = self._peers.replica_on(placement.node_id) if isinstance(placement, Forward) else None
        if isinstance(placement, Move):
            if await self._sessions.move_here(_key(request), placement.source_node_id):
                self._observer.on_forward("moved")
        elif isinstance(placement, Forward) and peer is not None:
            sent = SentTurn(
                replace(request, traceparent=request.span.traceparent or request.traceparent), placement.move_from
            )
            # Once for all that becomes of it: what is read on here is closed with this one.
            async with aclosing(self._there(peer, request, sent)) as events:
                async for event in events:
                    yield event
            return
        async with aclosing(self._turns.run(request)) as events:
            async for event in events:
                yield event

    async def _there(self, peer: PeerReplica, request: TurnRequest, sent: SentTurn) -> AsyncGenerator[TurnEvent, None]:
        started: TurnStarted | None = None
        position = request.resume_from or BEGINNING
        may_have_begun = False
        self._peers.sent(peer, request.num_choices)
        self._num_forwarded += request.num_choices
        self._observer.on_forward("forwarded")
        request.span.event("turn.forwarded", {"phi.node.id": peer.node_id})
        try:
            async with aclosing(self._links.run(peer, sent)) as events:
                async for event in events:
                    if isinstance(event, TurnStarted):
                        started = event
                    elif isinstance(event, TextDelta) and event.position.count > position.count:
                        position = event.position
                    yield event
            return
        except PeerLost as lost:
            logger.warning("a turn's peer is lost, and it goes on here: %s", lost, extra=_named(request))
            request.span.event("turn.peer_lost")
            self._observer.on_forward("lost")
            self._peers.suspect(peer)
            may_have_begun = lost.may_have_begun
        except (Overloaded, Unavailable):
            # What was known of it was a second old. It has left nothing there.
            if started is not None:
                raise
        finally:
            self._num_forwarded -= request.num_choices
        async with aclosing(self._here(request, started, position, may_have_begun=may_have_begun)) as events:
            async for event in events:
                yield event

    async def _here(
        self, request: TurnRequest, started: TurnStarted | None, position: Position, *, may_have_begun: bool
    ) -> AsyncGenerator[TurnEvent, None]:
        """What a peer has left over of a turn, or all of it."""
        can_be_read_on = request.num_choices == 1 and not request.echo
        if started is not None and not can_be_read_on:
            raise Unavailable("the node that made these replies is lost; try again", retry_after=1)
        if may_have_begun and can_be_read_on:
            request = replace(request, resume_from=position)
        async with aclosing(self._turns.run(request)) as events:
            async for event in events:
                if not isinstance(event, TurnStarted) or started is None:
                    yield event

    async def _place(self, request: TurnRequest) -> Placement:
        peers = self._peers
        if request.session_id is None:
            return place_unnamed(conversation_name(request), peers.own, peers.others)
        try:
            found = await self._sessions.locate(_key(request))
        except PhiError:
            # The turn itself finds out what is wrong.
            return Here()
        turn = AskedTurn() if found is None else AskedTurn(found.seat, found.num_tokens)
        return place(turn, peers.own, peers.others, peers.costs(self._costs))


def conversation_name(request: TurnRequest) -> bytes:
    """What stays the same while an unnamed conversation grows: its hint, or what it began with, up to the first thing
    that its user said (many begin with the same instructions)."""
    parts: list[Any] = [request.tenant]
    if request.cache_hint is not None:
        parts += ["hint", request.cache_hint]
    elif request.messages is not None:
        for message in request.messages:
            parts += [message["role"], message.get("content") or ""]
            if message["role"] == "user":
                break
    elif request.prompt is not None:
        parts += ["prompt", request.prompt[:_NAMING_CHARS]]
    return repr(parts).encode("utf-8", "surrogatepass")


def _key(request: TurnRequest) -> SessionKey:
    return SessionKey(request.tenant, request.session_id or "", ephemeral=request.session_id is None)


def _named(request: TurnRequest) -> dict[str, str]:
    return {"request_id": request.request_id}
