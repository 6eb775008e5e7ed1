"""The turns of a node's sessions, as far as their keeper has to do with them: what the keeper holds itself has them
here, and of the others it says who holds them.

Owns: the calls of a turn, from its beginning to its end, and its lease of memory. Knows nothing of what is in a
session, and of who asks.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, replace
from typing import Any

from phi_cluster.cluster.messages import (
    OPENED,
    WOKEN,
    BeginTurn,
    CommitTurn,
    Moved,
    ProcessId,
    SegmentRef,
    SessionKey,
    Stretch,
    TurnGrant,
)
from phi_cluster.cluster.session.conversation import name_digest
from phi_cluster.cluster.session.custody import Custody
from phi_cluster.cluster.session.hibernation import Hibernation
from phi_cluster.cluster.session.moving import Moves
from phi_cluster.cluster.session.roster import Entry
from phi_cluster.cluster.session.session import Session, SessionStats
from phi_cluster.cluster.session.tenant_memory import TenantMemory


@dataclass(frozen=True)
class HeldBy:
    """The session is with this actor, in this process: call it directly from now on."""

    actor: Any
    process: ProcessId


class KeptTurns:
    """For one event loop. All methods are short or wait without holding anything."""

    def __init__(self, custody: Custody, hibernation: Hibernation, moves: Moves, memory: TenantMemory):
        self._custody = custody
        self._roster = custody.roster
        self._layout = custody.settings.layout
        self._clock = custody.settings.clock
        self._hibernation = hibernation
        self._moves = moves
        self._memory = memory

    async def begin(self, request: BeginTurn) -> TurnGrant | HeldBy:
        if request.key.ephemeral and not request.key.session_id:
            # It may be here already: then its answer was lost, and nobody would ever end that turn.
            for begun in self._roster:
                if begun.key.ephemeral and begun.session is not None:
                    begun.session.withdraw(request.attempt)
        came: tuple[Stretch, ...] = ()
        while True:
            if request.key.ephemeral and not request.key.session_id:
                left = self._roster.left_by(request.key.tenant, request.request_id) if request.resume else None
                entry = left or self._continue_or_open(request)
            else:
                entry, took = await self._open(request.key)
                came += took
                # Ray has restarted an actor that died: only here is it known that the next process has no session.
                await self._custody.actor_died(request.key)
            if entry.session is None:
                return _held_by(entry)
            self._custody.hands.want_actor(entry)
            grant = await entry.session.begin_turn(request)
            if isinstance(grant, TurnGrant):
                entry.turn_began = asyncio.get_running_loop().time()
                return replace(grant, stretches=(*came, *grant.stretches))
            # It changed hands while this one waited.
            await asyncio.sleep(0)

    async def commit(self, commit: CommitTurn) -> SessionStats | HeldBy | Moved:
        await self._custody.actor_died(commit.key)
        entry = self._roster.find(commit.key)
        if entry is None and (commit.key.ephemeral or not self._roster.is_known(commit.key)):
            # An unnamed conversation died with the keeper that held it. A named one was deleted meanwhile (this is a
            # retry): opening it would bring it back.
            return Moved(commit.key)
        entry = entry or self._roster.open(commit.key)
        if entry.session is None:
            return _held_by(entry)
        stats = entry.session.commit(commit)
        if isinstance(stats, SessionStats):
            seconds = asyncio.get_running_loop().time() - entry.turn_began
            num_computed = commit.num_prompt_tokens - commit.num_cached_tokens
            self._hibernation.policy.computed(num_computed, commit.num_completion_tokens, seconds)
            self._custody.settle(entry, stats)
            self._custody.drop_surplus()
        return stats

    async def abandon(self, key: SessionKey, epoch: int) -> SessionStats | HeldBy | Moved:
        session = await self._find(key)
        if not isinstance(session, Session):
            return session
        entry = self._roster.find(key)
        assert entry is not None
        session.abandon(epoch)
        stats = session.describe()
        self._custody.settle(entry, stats)
        if key.ephemeral and not stats.turns:
            # Nobody can ever go on with it.
            await self._custody.drop(entry)
        self._custody.drop_surplus()
        return stats

    async def lay_prompt(
        self, key: SessionKey, epoch: int, source: SegmentRef, num_tokens: int
    ) -> int | HeldBy | Moved:
        """See `Session.lay_prompt`."""
        session = await self._find(key)
        return await session.lay_prompt(epoch, source, num_tokens) if isinstance(session, Session) else session

    async def withdraw(self, key: SessionKey, claim: str) -> bool | HeldBy | Moved:
        session = await self._find(key)
        return session.withdraw(claim) if isinstance(session, Session) else session

    async def reserve(self, key: SessionKey, num_tokens: int, num_shared_tokens: int) -> None:
        """Leases memory for the session to hold `num_tokens`, of which the first have their keys and values in another
        one's. Raises Overloaded and LimitReached."""
        nbytes = self._layout.nbytes_used(num_tokens) - self._layout.nbytes_shared(num_shared_tokens)
        await self._memory.reserve(key, nbytes)
        if self._roster.find(key) is None:
            # Its client left while it waited, and the session went: nobody would ever give this back.
            self._custody.leases.release(key.digest)

    async def settle_early(self, key: SessionKey) -> None:
        """The session's turn goes on without more memory than it has."""
        entry = self._roster.find(key)
        if entry is not None:
            self._custody.leases.settle(key.digest, (await self._custody.stats(entry)).kv_cache_bytes)

    def settle(self, key: SessionKey, nbytes: int) -> None:
        """A turn with the session's actor is over."""
        if self._roster.find(key) is not None:
            self._custody.leases.settle(key.digest, nbytes)

    async def _open(self, key: SessionKey) -> tuple[Entry, tuple[Stretch, ...]]:
        """The session in memory, and what that took if it was not there."""
        await self._moves.arrived(key)
        if (entry := self._roster.find(key)) is not None:
            return entry, ()
        began = self._clock()
        await self._hibernation.wake(key)
        name = WOKEN if self._roster.find(key) is not None else OPENED
        entry = self._roster.open(key)
        return entry, (Stretch(name, began, max(self._clock() - began, 0.0)),)

    def _continue_or_open(self, request: BeginTurn) -> Entry:
        # Strangers' strings are no keys here.
        hint = None if request.cache_hint is None else name_digest(request.cache_hint).hex()
        return self._roster.continue_or_open(request.key.tenant, request.text, hint)

    async def _find(self, key: SessionKey) -> Session | HeldBy | Moved:
        """The session, if it is held here; else by whom, or that it is not in memory."""
        await self._custody.actor_died(key)
        entry = self._roster.find(key)
        if entry is None:
            return Moved(key)
        return _held_by(entry) if entry.session is None else entry.session


def _held_by(entry: Entry) -> HeldBy:
    return HeldBy(entry.actor.handle, entry.actor.process)
