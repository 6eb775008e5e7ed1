"""Bugs that a run must find, by name: each is the product with one thing done wrong.

Owns: these, as subclasses of the product's classes and of the simulation's journal, memory and engine.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

from phi_cluster.cluster.engine_client import EngineClient
from phi_cluster.cluster.engine_link import EngineLink
from phi_cluster.cluster.messages import BeginTurn, CommitTurn, Moved, SegmentRef, SessionKey, TurnGrant
from phi_cluster.cluster.session.actor_pool import PooledActor
from phi_cluster.cluster.session.directory import SessionDirectory
from phi_cluster.cluster.session.hand_over import HandOvers
from phi_cluster.cluster.session.hibernation_store import Hibernated
from phi_cluster.cluster.session.journal import MemoryJournal
from phi_cluster.cluster.session.keeper import NodeSessions
from phi_cluster.cluster.session.kv_leases import KVLeases
from phi_cluster.cluster.session.segment import Segment
from tests.simulation.parts import Parts
from tests.simulation.storage import DurableJournal, HibernationDisk, SimulatedSegment


class _AnyEpoch(DurableJournal):
    """A commit is accepted whatever its epoch is."""

    def _write(self, journal: MemoryJournal, turn: CommitTurn) -> bool:
        if any(stored.request_id == turn.request_id for stored in journal.load()):
            return False
        return journal.commit(replace(turn, epoch=max(turn.epoch, journal.info().epoch)))


class _EarlyLettingGo(HandOvers):
    """The predecessor lets go before the successor has acknowledged."""

    async def _begin(self, key: SessionKey, predecessor: PooledActor, *wait_seconds: float) -> SegmentRef | Moved:
        ref = await super()._begin(key, predecessor, *wait_seconds)
        await predecessor.handle.complete_hand_over.remote(key)
        return ref


class _HastyKeeper(NodeSessions):
    def __init__(self, *arguments: Any):
        super().__init__(*arguments)
        custody = self._custody
        pool = custody.hands._pool
        custody.hands = _EarlyLettingGo(
            custody.roster, pool, custody.settings, custody.journal, custody.config, custody.events, custody.metrics
        )


class _NoWithdrawal(SessionDirectory):
    """A client that leaves while it waits for its turn is forgotten."""

    async def _withdraw(self, request: BeginTurn, begin: asyncio.Future[TurnGrant]) -> None:
        pass


class _EarlyAcknowledgement(SessionDirectory):
    """A turn is finished before it is recorded."""

    async def commit(self, commit: CommitTurn) -> None:
        self._in_background(super().commit(commit))


class _Remembering(SimulatedSegment):
    """What is cut off still counts as computed: memory is used again without being cleared."""

    def trim(self, num_tokens: int) -> None:
        computed, rows = self.num_computed_tokens, list(self.memory.rows)
        super().trim(num_tokens)
        self._fields[3], self.memory.rows[:] = computed, rows


class _Stuttering(EngineClient):
    """The last token is generated again by the next engine."""

    def _connect(self, link: EngineLink) -> None:
        received = {stream: stream.received for stream in self._streams.values()}
        for stream, token_ids in received.items():
            stream.received = token_ids[:-1]
        super()._connect(link)
        for stream, token_ids in received.items():
            stream.received = token_ids


class _Hoarding(KVLeases):
    """The lease of a session that is gone stays."""

    def release(self, digest: str) -> None:
        pass


class _HoardingKeeper(NodeSessions):
    def __init__(self, *arguments: Any):
        super().__init__(*arguments)
        self._custody.leases = _Hoarding(self._custody.ledger, self._custody.make_room, 2.0)


class _Mixed(HibernationDisk):
    """Rows of one session are written under another's name."""

    def write(self, digest: str, segment: Segment, *options: Any) -> Hibernated:
        written = super().write(digest, segment, *options)
        memory = self._disk.memories[digest][0]
        others = [other for name, (other, _) in self._disk.memories.items() if name != digest]
        if others:
            memory.rows[: len(others[0].rows)] = others[0].rows[: len(memory.rows)]
        return written


PLANTED = {
    "a commit with a stale epoch": Parts(journal=_AnyEpoch),
    "a hand-over that lets go too early": Parts(keeper=_HastyKeeper),
    "a withdrawal that is lost": Parts(directory=_NoWithdrawal),
    "an acknowledgement before the commit": Parts(directory=_EarlyAcknowledgement),
    "memory that is not cleared": Parts(segment=_Remembering),
    "a token twice at a failover": Parts(engine_client=_Stuttering),
    "a lease that is not given back": Parts(keeper=_HoardingKeeper),
    "a hibernated memory of another session": Parts(store=_Mixed),
}
