"""A node's keeper: it knows who holds each session, holds those that have no actor (yet), and leases KV memory.

Owns: the roster, the leases, and the calls of replicas, users and the controller. Restartable: what actors hold
outlives it, what it held itself comes back from the journals. Knows nothing of engines, text or policy: the controller
tells it whom to recycle.

A burst of new sessions starts here at once; actors follow one by one, at the lowest priority, and take the sessions
over between two turns.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import ray
from ray.exceptions import RayActorError, RayError

from phi_cluster.cluster.config import KVConfig, SessionsConfig
from phi_cluster.cluster.errors import NotFound, PhiError, SessionBusy
from phi_cluster.cluster.messages import BeginTurn, CommitTurn, Moved, SessionKey, TurnGrant
from phi_cluster.cluster.processes import private_bytes, process_id
from phi_cluster.cluster.session.actor import session_settings
from phi_cluster.cluster.session.actor_pool import ActorPool, RayActors
from phi_cluster.cluster.session.hand_over import HandOvers
from phi_cluster.cluster.session.journal import Journal, MemoryJournal
from phi_cluster.cluster.session.kv_leases import KVLeases
from phi_cluster.cluster.session.ledger import Ledger
from phi_cluster.cluster.session.recycler import RecycleReason
from phi_cluster.cluster.session.reports import (
    KeeperReport,
    SessionReport,
    private_or_zero,
    public_description,
    stored_description,
)
from phi_cluster.cluster.session.roster import Entry, Roster
from phi_cluster.cluster.session.segment import SegmentGone, SegmentMismatch
from phi_cluster.cluster.session.segment_layout import SegmentLayout
from phi_cluster.cluster.session.session import Session, SessionSettings, SessionStats
from phi_cluster.cluster.session.sqlite_journal import SQLiteJournal, list_sessions
from phi_cluster.cluster.session.transcript import Transcript

logger = logging.getLogger(__name__)

# A session that the keeper holds closes its journal's file after so long without a turn.
_REST_SECONDS = 30.0


@dataclass(frozen=True)
class HeldBy:
    """The session is with this actor: call it directly from now on."""

    actor: Any


class Journals(Protocol):
    """A node's durable journals."""

    def open(self, key: SessionKey) -> Journal: ...

    def keys(self) -> Iterable[SessionKey]:
        """Of all that there are. Called in a thread."""
        ...


class NodeSessions:
    """All methods are short or wait without holding anything."""

    def __init__(
        self,
        settings: SessionSettings,
        journals: Journals,
        actors: RayActors,
        node_id: str,
        sessions: SessionsConfig,
        kv: KVConfig,
        budget_nbytes: int,
    ):
        self._layout = settings.layout
        self._config = sessions
        self._journals = journals
        self._settings = settings
        self._node_id = node_id
        self._process = process_id()
        self._ledger = Ledger(budget_nbytes)
        self._leases = KVLeases(self._ledger, self._make_room, kv.reserve_wait)
        self._roster = Roster(self._open_session, sessions.max_ephemeral)
        self._hands = HandOvers(self._roster, ActorPool(actors), self._settings, self._journal, sessions)
        self._starting: asyncio.Task[None] | None = None

    async def start(self) -> int:
        """Finds what is stored and what actors hold; then tends to the sessions. Idempotent; returns the pid."""
        if self._starting is None or (self._starting.done() and self._starting.exception() is not None):
            self._starting = asyncio.create_task(self._start())
        await asyncio.shield(self._starting)
        return os.getpid()

    async def _start(self) -> None:
        for key in await asyncio.to_thread(lambda: list(self._journals.keys())):
            self._roster.add_stored(key)
        for entry in await self._hands.adopt_actors():
            assert entry.last_stats is not None
            self._ledger.settle(entry.key.digest, entry.last_stats.kv_cache_bytes)
        self._hands.start()

    # A turn.

    async def begin_turn(self, request: BeginTurn) -> TurnGrant | HeldBy:
        await self.start()
        if request.key.ephemeral and not request.key.session_id:
            # It may be here already: then its answer was lost, and nobody would ever end that turn.
            for begun in self._roster:
                if begun.key.ephemeral and begun.session is not None:
                    begun.session.withdraw(request.attempt)
        while True:
            if request.key.ephemeral and not request.key.session_id:
                left = self._roster.left_by(request.key.tenant, request.request_id) if request.resume else None
                entry = left or self._roster.continue_or_open(request.key.tenant, request.text)
            else:
                entry = self._roster.open(request.key)
            if entry.session is None:
                return HeldBy(entry.actor.handle)
            self._hands.want_actor(entry)
            grant = await entry.session.begin_turn(request)
            if isinstance(grant, TurnGrant):
                return grant
            # It changed hands while this one waited.
            await asyncio.sleep(0)

    async def commit(self, commit: CommitTurn) -> SessionStats | HeldBy | Moved:
        await self.start()
        entry = self._roster.find(commit.key)
        if entry is None and commit.key.ephemeral:
            # Nothing to add to: an unnamed conversation died with the keeper that held it.
            return Moved(commit.key)
        if entry is None and not self._roster.is_known(commit.key):
            # Deleted meanwhile (this is a retry): opening it would bring it back.
            return Moved(commit.key)
        entry = entry or self._roster.open(commit.key)
        if entry.session is None:
            return HeldBy(entry.actor.handle)
        stats = entry.session.commit(commit)
        if isinstance(stats, SessionStats):
            self._settle(entry, stats)
            self._drop_surplus()
        return stats

    async def abandon(self, key: SessionKey, epoch: int) -> SessionStats | HeldBy | Moved:
        await self.start()
        entry = self._roster.find(key)
        if entry is None:
            return Moved(key)
        if entry.session is None:
            return HeldBy(entry.actor.handle)
        entry.session.abandon(epoch)
        stats = entry.session.describe()
        self._settle(entry, stats)
        self._drop_surplus()
        return stats

    async def withdraw(self, key: SessionKey, claim: str) -> bool | HeldBy | Moved:
        await self.start()
        entry = self._roster.find(key)
        if entry is None:
            return Moved(key)
        return entry.session.withdraw(claim) if entry.session else HeldBy(entry.actor.handle)

    async def reserve(self, key: SessionKey, num_tokens: int) -> None:
        """Leases memory for the session to hold `num_tokens`. Raises Overloaded."""
        await self.start()
        await self._leases.reserve(key.digest, self._layout.nbytes_used(num_tokens))
        if self._roster.find(key) is None:
            # Its client left while it waited, and the session went: nobody would ever give this back.
            self._leases.release(key.digest)

    async def settle(self, key: SessionKey, nbytes: int) -> None:
        """A turn with the session's actor is over."""
        await self.start()
        if self._roster.find(key) is not None:
            self._leases.settle(key.digest, nbytes)

    async def actor_died(self, key: SessionKey) -> None:
        """A replica could not reach the session's actor: if it is dead, the session goes on here, in its memory."""
        await self.start()
        entry = self._roster.find(key)
        if entry is None or entry.actor is None or self._settings.is_alive(entry.actor.process):
            return
        async with entry.moving:
            if self._roster.find(key) is not entry:
                return
            if entry.actor is not None and not self._settings.is_alive(entry.actor.process):
                try:
                    entry.session, entry.actor = self._inherit(entry), None
                except (PhiError, OSError) as error:
                    # Left to its journal: its next turn tries again and is told. It must not fail reports and others.
                    logger.warning("a session whose actor died could not be opened: %s", type(error).__name__)
                    self._roster.forget(entry, deleted=False)
                    self._leases.release(key.digest)
                entry.hold(None)
                entry.silent_since = None

    # Administration.

    async def describe(self, key: SessionKey) -> dict[str, Any]:
        """One session under the names of the HTTP API. Raises NotFound."""
        await self.start()
        entry = self._roster.find(key)
        if entry is not None:
            return self._public(entry, await self._stats(entry))
        if not self._roster.is_known(key):
            raise NotFound(f"no session {key.session_id!r}")
        # In place: in a thread it could make a journal anew that is being deleted.
        return self._describe_stored(key)

    async def list(self, tenant: str, limit: int, after: str | None) -> list[dict[str, Any]]:
        """A tenant's named sessions in ascending order of id."""
        await self.start()
        names = [name for name in self._roster.stored_names(tenant) if after is None or name > after]
        described = []
        for name in names[:limit]:
            try:
                described.append(await self.describe(SessionKey(tenant, name)))
                await asyncio.sleep(0)
            except PhiError:
                # Deleted meanwhile, or its journal cannot be read: the others are worth showing.
                continue
        return described

    async def clear(self, key: SessionKey) -> dict[str, Any]:
        """Raises NotFound and SessionBusy."""
        wait = self._config.turn_wait
        while True:
            entry = await self._known(key)
            stats = await (entry.session.clear(wait) if entry.session else entry.actor.handle.clear.remote(key, wait))
            if isinstance(stats, SessionStats):
                self._settle(entry, stats)
                return self._public(entry, stats)

    async def delete(self, key: SessionKey) -> None:
        """Raises NotFound and SessionBusy."""
        wait = self._config.turn_wait
        while True:
            await self.start()
            if self._roster.find(key) is None and self._roster.is_known(key):
                # Without opening it: also one whose journal cannot be read can be deleted.
                self._journal(key).delete()
                self._roster.forget_stored(key)
                return
            entry = await self._known(key)
            async with entry.moving:
                if self._roster.find(key) is not entry:
                    # Deleted, or dropped for want of room, while this waited.
                    continue
                if entry.session is not None:
                    await entry.session.delete(wait)
                else:
                    # An actor that died keeps nobody from deleting what it left.
                    with contextlib.suppress(RayActorError):
                        await entry.actor.handle.delete.remote(key, wait)
                    await self._hands.end_actor(entry)
                    self._journal(key).delete()
                self._roster.forget(entry, deleted=True)
                self._leases.release(key.digest)
                return

    async def recycle(self, key: SessionKey, reason: RecycleReason) -> dict[str, Any]:
        """Renews the session's actor (or gives it back, by reason). Raises NotFound and SessionBusy."""
        entry = await self._known(key)
        await self._hands.recycle(entry, reason)
        return await self.describe(key)

    async def report(self) -> KeeperReport:
        await self.start()
        entries = list(self._roster)
        leased = [self._ledger.lease(entry.key.digest) for entry in entries]
        stats = await asyncio.gather(*(self._stats(entry) for entry in entries))
        for entry, s, before in zip(entries, stats, leased, strict=True):
            if before == self._ledger.lease(s.key.digest) != s.kv_cache_bytes:
                # A turn that ended without a word (its replica died): the lease shrinks to what is really there.
                self._settle(entry, s)
            if entry.session is not None and not entry.session.in_turn and s.idle_seconds > _REST_SECONDS:
                entry.session.rest()
        in_memory = {entry.key.digest for entry in entries}
        return KeeperReport(
            node_id=self._node_id,
            process=self._process,
            budget_nbytes=self._ledger.capacity,
            reserved_nbytes=self._ledger.usage,
            sessions=[self._reported(entry, s) for entry, s in zip(entries, stats, strict=True)],
            num_stored=sum(key.digest not in in_memory for key in self._roster.stored_keys()),
            num_warm=self._hands.num_warm,
            activations=self._hands.activations,
            recycles=dict(self._hands.recycles),
            private_nbytes=private_bytes(),
        )

    async def close(self) -> int:
        """Ends all actors; conversations stay in their journals. Returns how many named sessions there are."""
        await self.start()
        self._hands.close()
        return sum(1 for _ in self._roster.stored_keys())

    # Memory.

    async def _make_room(self, nbytes: int) -> bool:
        """Ends idle unnamed conversations, then drops the caches of idle named ones; whether any byte came free."""
        entries = {entry.key.digest: entry for entry in self._roster}
        stats = [await self._stats(entry) for entry in entries.values()]
        freed = False
        for digest in self._ledger.pick_victims(nbytes, stats):
            try:
                freed = await self._drop(entries[digest]) or freed
            except RayError as error:
                # Its actor died: not the fault of whoever waits for room.
                logger.info("a cache could not be dropped: %s", type(error).__name__)
        return freed

    async def _drop(self, entry: Entry) -> bool:
        key = entry.key
        if self._roster.find(key) is not entry:
            return False
        if entry.session is not None:
            try:
                await entry.session.deactivate(0.0)
            except SessionBusy:
                return False
            self._roster.forget(entry, deleted=key.ephemeral)
            self._leases.release(key.digest)
            return True
        freed = await entry.actor.handle.drop_cache.remote(key)
        if isinstance(freed, Moved) or freed == 0:
            return False
        self._settle(entry, await self._stats(entry))
        return True

    def _settle(self, entry: Entry, stats: SessionStats) -> None:
        """The lease shrinks to what the session holds, unless its next turn has begun, or it is not here any more."""
        if not stats.in_turn and self._roster.find(entry.key) is entry:
            self._leases.settle(entry.key.digest, stats.kv_cache_bytes)

    def _drop_surplus(self) -> None:
        for entry in self._roster.surplus_ephemeral():
            asyncio.create_task(self._drop(entry))  # noqa: RUF006 -- nobody waits for it, and it cannot fail

    # Looking.

    def _journal(self, key: SessionKey) -> Journal:
        if key.ephemeral:
            return MemoryJournal(key, self._settings.fingerprint, self._settings.clock)
        return self._journals.open(key)

    def _open_session(self, key: SessionKey) -> Session:
        return Session.restore(self._journal(key), self._settings, activate=False)

    def _inherit(self, entry: Entry) -> Session:
        """The session of an actor that died: in its memory, or, if that is not to be had, from its journal."""
        if entry.memory is not None:
            journal = self._journal(entry.key)
            try:
                return Session.take_over(
                    entry.memory.ref, journal, self._settings, recycled=False, last_used=self._last_used(entry)
                )
            except (SegmentGone, SegmentMismatch) as error:
                journal.close()
                logger.warning("a session's memory is lost with its actor: %s", error)
        return self._open_session(entry.key)

    def _last_used(self, entry: Entry) -> float:
        idle = 0.0 if entry.last_stats is None else entry.last_stats.idle_seconds
        return self._settings.clock() - idle

    async def _known(self, key: SessionKey) -> Entry:
        await self.start()
        if not self._roster.is_known(key):
            raise NotFound(f"no session {key.session_id!r}")
        return self._roster.open(key)

    async def _stats(self, entry: Entry) -> SessionStats:
        """Fresh statistics; of an actor that does not answer, the last that are known."""
        if entry.session is None:
            try:
                stats = await asyncio.wait_for(entry.actor.handle.describe.remote(entry.key), 2.0)
            except RayError:
                await self.actor_died(entry.key)
            except asyncio.TimeoutError:
                await self._hands.on_silence(entry)
                await self.actor_died(entry.key)
            else:
                entry.silent_since = None
                if isinstance(stats, SessionStats):
                    entry.last_stats = stats
        if entry.session is not None:
            entry.last_stats = entry.session.describe()
        assert entry.last_stats is not None
        return entry.last_stats

    def _reported(self, entry: Entry, stats: SessionStats) -> SessionReport:
        pid = None if entry.actor is None else entry.actor.process.pid
        return SessionReport(stats, pid, private_or_zero(pid), entry.private_baseline)

    def _public(self, entry: Entry, stats: SessionStats) -> dict[str, Any]:
        pid = None if entry.actor is None else entry.actor.process.pid
        return public_description(stats, pid, self._node_id)

    def _describe_stored(self, key: SessionKey) -> dict[str, Any]:
        journal = self._journal(key)
        try:
            info, transcript = journal.info(), Transcript.replay(journal.load())
        finally:
            journal.close()
        return stored_description(key.session_id, info, transcript.num_tokens, self._settings.clock())


class _SQLiteJournals:
    def __init__(self, state_path: Path, settings: SessionSettings):
        self._state_path = state_path
        self._settings = settings

    def open(self, key: SessionKey) -> Journal:
        return SQLiteJournal(self._state_path, key, self._settings.fingerprint, self._settings.clock)

    def keys(self) -> Iterable[SessionKey]:
        return list_sessions(self._state_path)


# Whoever waits here, for a turn or for memory, must not take the place of the commit that it waits for: Ray's default
# is 1000.
@ray.remote(num_cpus=0, max_concurrency=15_000)  # type: ignore[call-overload]
class Keeper(NodeSessions):
    """A node's sessions in a process of their own, with Ray's actors and journals on the disk."""

    def __init__(
        self,
        layout: SegmentLayout,
        fingerprint: str,
        state_path: Path,
        sessions: SessionsConfig,
        kv: KVConfig,
        budget_nbytes: int,
    ):
        settings = session_settings(layout, fingerprint)
        node_id = ray.get_runtime_context().get_node_id()
        actors = RayActors(layout, fingerprint, state_path, node_id)
        super().__init__(settings, _SQLiteJournals(state_path, settings), actors, node_id, sessions, kv, budget_nbytes)
