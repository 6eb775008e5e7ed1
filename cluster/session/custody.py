"""What a node's keeper has in its custody: every session's entry, the memory leased to it, and whoever holds it.

Owns: roster, ledger, the log of events and hand-overs, looking at a session wherever it is, going on with one whose
actor died, and making room. Knows nothing of who asks (turns: keeper.py; users: administration.py), of engines or text.
"""

from __future__ import annotations

import asyncio
import logging
from array import array
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from ray.exceptions import RayError

from phi_cluster.cluster.config import KVConfig, SessionsConfig
from phi_cluster.cluster.errors import InvalidRequest, NotFound, PhiError, SessionBusy, SessionExists
from phi_cluster.cluster.events import EventKind, EventLog
from phi_cluster.cluster.messages import CommitTurn, SessionKey
from phi_cluster.cluster.session.actor_pool import ActorPool, RayActors
from phi_cluster.cluster.session.hand_over import HandOvers
from phi_cluster.cluster.session.journal import Journal, JournalInfo, Journals, MemoryJournal
from phi_cluster.cluster.session.kv_leases import KVLeases
from phi_cluster.cluster.session.ledger import Ledger
from phi_cluster.cluster.session.roster import Entry, Roster
from phi_cluster.cluster.session.segment import Segment, SegmentGone, SegmentMismatch
from phi_cluster.cluster.session.session import Session, SessionSettings, SessionStats
from phi_cluster.cluster.session.transcript import Transcript
from phi_cluster.monitoring.session_metrics import SessionMetrics

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Recorded:
    """What a session's journal says. `token_ids`: what its memory should hold of it; none if another model said it."""

    turns: list[CommitTurn]
    info: JournalInfo
    token_ids: array[int]


class Custody:
    """For one event loop. `put_away(entry)`, which hibernation.py sets, has a named session leave memory for want of
    room; False if it is in use."""

    put_away: Callable[[Entry], Awaitable[bool]]

    def __init__(
        self,
        settings: SessionSettings,
        journals: Journals,
        actors: RayActors,
        sessions: SessionsConfig,
        kv: KVConfig,
        budget_nbytes: int,
        metrics: SessionMetrics,
    ):
        self.settings = settings
        self.metrics = metrics
        self.config = sessions
        self.journals = journals
        self.events = EventLog(settings.clock)
        self.ledger = Ledger(budget_nbytes)
        self.leases = KVLeases(self.ledger, self.make_room, kv.reserve_wait)
        self.roster = Roster(self.open_session, sessions.max_ephemeral)
        self.hands = HandOvers(
            self.roster,
            ActorPool(actors, sessions.warm_actors, settings.is_alive),
            settings,
            self.journal,
            sessions,
            self.events,
            metrics,
        )

    async def start(self) -> None:
        """Finds what is stored and what actors hold. Then `hands` may be started."""
        for key in await asyncio.to_thread(lambda: list(self.journals.keys())):
            self.roster.add_stored(key)
        for entry in await self.hands.adopt_actors():
            assert entry.last_stats is not None
            self.ledger.settle(entry.key.digest, entry.last_stats.kv_cache_bytes)

    # Looking.

    def journal(self, key: SessionKey) -> Journal:
        if key.ephemeral:
            return MemoryJournal(key, self.settings.fingerprint, self.settings.clock)
        return self.journals.open(key)

    def open_session(self, key: SessionKey) -> Session:
        """From its journal, or a new one. Raises the journal's errors."""
        return Session.restore(self.journal(key), self.settings, activate=False)

    def recorded(self, key: SessionKey, num_turns: int | None = None) -> Recorded:
        """The conversation, or what its first turns left. In place: in a thread it could make a journal anew that is
        being deleted. Raises InvalidRequest if there are fewer turns, and the journal's errors."""
        held = self.roster.find(key) if key.ephemeral else None
        if held is not None and held.session is not None:
            info, turns = held.session.record()
        else:
            journal = self.journal(key)
            try:
                info, turns = journal.info(), journal.load()
            finally:
                journal.close()
        if num_turns is not None and not 1 <= num_turns <= len(turns):
            raise InvalidRequest(f"turn is {num_turns}: the conversation has {len(turns)} turns", param="turn")
        turns = turns[:num_turns]
        same_model = info.fingerprint == self.settings.fingerprint
        return Recorded(turns, info, Transcript.replay(turns if same_model else ()).token_ids)

    def known(self, key: SessionKey) -> Entry:
        """The session's entry, opened if only the disk has it. Raises NotFound and the journal's errors."""
        self.check_known(key)
        return self.roster.open(key)

    def check_known(self, key: SessionKey) -> None:
        """Raises NotFound, and JournalUnavailable."""
        if not self.is_known(key):
            raise NotFound(f"no session {key.session_id!r}")

    def check_free(self, key: SessionKey) -> None:
        """Raises SessionExists, and JournalUnavailable."""
        if self.is_known(key):
            raise _exists(key)

    def is_known(self, key: SessionKey) -> bool:
        """Whether there is such a session: here, or made elsewhere since the journals were listed. Raises
        JournalUnavailable."""
        if not self.roster.is_known(key) and self.journals.shared and self.journals.glance(key) is not None:
            self.roster.add_stored(key)
        return self.roster.is_known(key)

    def make(
        self, key: SessionKey, turns: list[CommitTurn], fingerprint: str, memory: Segment | None, kind: EventKind
    ) -> None:
        """A new session of these turns, all at once: nobody finds half of it. `memory`, which is taken over, holds keys
        and values of their beginning. Raises SessionExists and the journal's errors; nothing has happened then."""
        try:
            self.check_free(key)
            journal = self.journal(key)
            try:
                journal.fill(turns, fingerprint)
            except ValueError:
                raise _exists(key) from None
            finally:
                journal.close()
        except BaseException:
            if memory is not None:
                memory.close()
            raise
        # From here on there is the session.
        self.roster.add_stored(key)
        self.events.add(kind, key)
        if memory is None:
            return
        try:
            session = Session.adopt(memory, self.journal(key), self.settings)
        except (PhiError, OSError) as error:
            logger.warning("a copied cache is computed anew: %s", type(error).__name__)
            return
        entry = Entry(key, session=session)
        self.roster.adopt(entry)
        self.settle(entry, session.describe())

    async def stats(self, entry: Entry) -> SessionStats:
        """Fresh statistics; of an actor that does not answer, the last that are known."""
        if entry.session is None:
            try:
                stats = await asyncio.wait_for(entry.actor.call("describe", entry.key), 2.0)
            except RayError:
                await self.actor_died(entry.key)
            except asyncio.TimeoutError:
                await self.hands.on_silence(entry)
                await self.actor_died(entry.key)
            else:
                entry.silent_since = None
                if isinstance(stats, SessionStats):
                    entry.last_stats = stats
        if entry.session is not None:
            entry.last_stats = entry.session.describe()
        assert entry.last_stats is not None
        return entry.last_stats

    # An actor's death.

    async def actor_died(self, key: SessionKey) -> None:
        """Somebody could not reach the session's actor, or is about to: if its process is dead, the session goes on
        here, in its memory."""
        entry = self.roster.find(key)
        if entry is None or entry.actor is None or self.settings.is_alive(entry.actor.process):
            return
        async with entry.moving:
            if self.roster.find(key) is not entry:
                return
            if entry.actor is not None and not self.settings.is_alive(entry.actor.process):
                self.events.add(EventKind.SESSION_ACTOR_DIED, key)
                began, actor = self.settings.clock(), entry.actor
                self.metrics.recoveries.lost("session_actor", "death" if entry.silent_since is None else "hang")
                try:
                    entry.session, entry.actor = self._inherit(entry), None
                except (PhiError, OSError) as error:
                    # Left to its journal: its next turn tries again and is told. It must not fail reports and others.
                    logger.warning("a session whose actor died could not be opened: %s", type(error).__name__)
                    self.roster.forget(entry, deleted=False)
                    self.leases.release(key.digest)
                entry.hold(None)
                entry.silent_since = None
                self.hands.actor_lost(actor)
                self.metrics.recoveries.recovered("session_actor", max(self.settings.clock() - began, 0.0))

    def _inherit(self, entry: Entry) -> Session:
        """The session of an actor that died: in its memory, or, if that is not to be had, from its journal."""
        if entry.memory is not None:
            journal = self.journal(entry.key)
            try:
                return Session.take_over(
                    entry.memory.ref, journal, self.settings, recycled=False, last_used=self._last_used(entry)
                )
            except (SegmentGone, SegmentMismatch) as error:
                journal.close()
                logger.warning("a session's memory is lost with its actor: %s", error)
        return self.open_session(entry.key)

    def _last_used(self, entry: Entry) -> float:
        idle = 0.0 if entry.last_stats is None else entry.last_stats.idle_seconds
        return self.settings.clock() - idle

    # Memory.

    def settle(self, entry: Entry, stats: SessionStats) -> None:
        """The lease shrinks to what the session holds, unless its next turn has begun, or it is not here any more."""
        if not stats.in_turn and self.roster.find(entry.key) is entry:
            self.leases.settle(entry.key.digest, stats.kv_cache_bytes)

    async def make_room(self, nbytes: int, tenant: str | None = None) -> bool:
        """Ends idle unnamed conversations, then has idle named ones, of one tenant or of all, give theirs back; whether
        any byte came free."""
        entries = {entry.key.digest: entry for entry in self.roster if tenant in (None, entry.key.tenant)}
        candidates = [await self.stats(entry) for entry in entries.values()]
        while victims := self.ledger.pick_victims(nbytes, candidates):
            freed = [await self._try_drop(entries[digest]) for digest in victims]
            if any(freed):
                return True
            # They are in use after all: the others' turn.
            candidates = [stats for stats in candidates if stats.key.digest not in victims]
        return False

    async def drop_cache(self, key: SessionKey) -> None:
        """The session's keys and values go, if it is between two turns."""
        entry = self.roster.find(key)
        if entry is None:
            return
        if entry.session is not None:
            entry.session.drop_cache()
        else:
            await entry.actor.call("drop_cache", key)
        self.settle(entry, await self.stats(entry))
        self.events.add(EventKind.MEMORY_GIVEN_WAY, key, reason="turn")

    def drop_surplus(self) -> None:
        """Unnamed conversations beyond the number to keep go."""
        for entry in self.roster.surplus_ephemeral():
            asyncio.create_task(self.drop(entry))  # noqa: RUF006 -- nobody waits for it, and it cannot fail

    async def _try_drop(self, entry: Entry) -> bool:
        try:
            is_gone = await self.drop(entry)
            if is_gone:
                self.events.add(EventKind.MEMORY_GIVEN_WAY, entry.key, reason="idle")
            return is_gone
        except RayError as error:
            # Its actor died: not the fault of whoever waits for room.
            logger.info("a cache could not be dropped: %s", type(error).__name__)
            return False

    async def drop(self, entry: Entry) -> bool:
        """Out of memory it goes, an unnamed one for good; False if it is in use."""
        if self.roster.find(entry.key) is not entry:
            return False
        if not entry.key.ephemeral:
            return await self.put_away(entry)
        # Unnamed conversations never have an actor.
        assert entry.session is not None
        if entry.session.in_turn:
            # Also one that is on its way to another node: that is not to be given up for this.
            return False
        try:
            await entry.session.deactivate(0.0)
        except SessionBusy:
            return False
        self.roster.forget(entry, deleted=True)
        self.leases.release(entry.key.digest)
        return True


def _exists(key: SessionKey) -> SessionExists:
    return SessionExists(f"there is a session {key.session_id!r}: choose another id, or delete it first", param="id")
