"""How sessions change hands on a node: from the keeper to an actor, from an actor to its successor, and back.

Owns: the order of a hand-over (make before break), the pool of actors, and giving actors to sessions one by one.
Knows nothing of who asked for it and of policy.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import Counter
from collections.abc import AsyncIterator, Callable
from typing import Any

from ray.exceptions import RayError, RayTaskError

from phi_cluster.cluster.config import SessionsConfig
from phi_cluster.cluster.errors import PhiError, SessionBusy
from phi_cluster.cluster.events import EventKind, EventLog
from phi_cluster.cluster.messages import Moved, ProcessId, SegmentRef, SessionKey
from phi_cluster.cluster.session.actor_pool import ANSWER_SECONDS, ActorPool, PooledActor
from phi_cluster.cluster.session.journal import Journal
from phi_cluster.cluster.session.recycler import RecycleReason
from phi_cluster.cluster.session.reports import private_or_zero
from phi_cluster.cluster.session.roster import Entry, Roster
from phi_cluster.cluster.session.segment import SegmentGone, SegmentMismatch
from phi_cluster.cluster.session.session import Session, SessionSettings, SessionStats
from phi_cluster.monitoring.session_metrics import SessionMetrics

logger = logging.getLogger(__name__)

# How long a hand-over waits for the turn under way; a longer turn is left alone until the next round.
_WAIT_SECONDS = 5.0
# A call may be lost although its actor lives.
_CANCELS = 5


class HandOvers:
    """For one event loop. Counters since it was made; `recycles` by RecycleReason value."""

    def __init__(
        self,
        roster: Roster,
        pool: ActorPool,
        settings: SessionSettings,
        journal: Callable[[SessionKey], Journal],
        config: SessionsConfig,
        events: EventLog,
        metrics: SessionMetrics,
    ):
        self._roster = roster
        self._pool = pool
        self._settings = settings
        self._journal = journal
        self._config = config
        self._events = events
        self._metrics = metrics
        self._tending: asyncio.Task[None] | None = None
        self._needed = asyncio.Event()
        self.activations = 0
        self.recycles: Counter[str] = Counter()

    @property
    def num_warm(self) -> int:
        return self._pool.num_warm

    def start(self) -> None:
        """Begins to tend to the sessions. Nothing is spawned before the first one wants an actor."""
        self._tending = asyncio.get_running_loop().create_task(self._tend())

    def close(self) -> None:
        """Ends all actors."""
        if self._tending is not None:
            self._tending.cancel()
        self._pool.end_all()
        for entry in self._roster:
            if entry.actor is not None:
                self._pool.actors.kill(entry.actor.handle)

    def want_actor(self, entry: Entry) -> None:
        """The session is in use here: it gets an actor of its own when its turn has ended."""
        if not entry.key.ephemeral:
            entry.wants_actor = True
            self._needed.set()

    async def recycle(self, entry: Entry, reason: RecycleReason) -> None:
        """Renews the session's actor, make before break; with a reason that deactivates, the keeper takes the session
        and the actor ends. Raises SessionBusy if a turn does not end in time, and what a hand-over raises."""
        async with entry.moving:
            if self._roster.find(entry.key) is not entry:
                # Deleted or dropped while this waited.
                return
            if reason.deactivates:
                await self.to_keeper(entry, reason)
            else:
                if entry.actor is None and self._num_actors() >= self._config.max_actors:
                    # Nothing to renew: it is given an actor when there is room for one.
                    self.want_actor(entry)
                    return
                await self._to_actor(entry, await self._pool.take(), reason)

    @contextlib.asynccontextmanager
    async def lent(self, entry: Entry, wait_seconds: float) -> AsyncIterator[SegmentRef | Moved]:
        """The session's memory, to be read between two turns: those that come meanwhile wait. With `entry.moving` held.
        Raises SessionBusy if the turn under way does not end in time, and what a hand-over raises."""
        session, actor = entry.session, entry.actor
        if session is not None:
            ref = await session.begin_hand_over(wait_seconds)
        else:
            ref = await self._begin(entry.key, actor, wait_seconds)
        try:
            yield ref
        finally:
            if not isinstance(ref, Moved):
                if session is not None:
                    session.cancel_hand_over()
                else:
                    await self._cancel(entry.key, actor)

    async def end_actor(self, entry: Entry) -> None:
        """The session is gone: so is its actor."""
        if entry.actor is not None:
            self._pool.end(entry.actor)

    def known_actor(self, handle: Any, process: ProcessId) -> PooledActor:
        """As a predecessor had it."""
        return self._pool.pooled(handle, process)

    def add_warm(self, handle: Any, process: ProcessId) -> None:
        """One that a predecessor had ready."""
        self._pool.add(self.known_actor(handle, process))

    def leave_warm(self) -> list[tuple[Any, ProcessId]]:
        """For a successor: those that are ready. Those that are being started end; nothing is tended to any more."""
        if self._tending is not None:
            self._tending.cancel()
        return self._pool.leave()

    def actor_lost(self, actor: PooledActor) -> None:
        """Its process is dead, and its session goes on without it."""
        self._pool.end(actor)

    async def adopt_actors(self) -> list[Entry]:
        """Finds the actors that an earlier keeper of this node had, and enters their sessions."""
        empty: list[PooledActor] = []
        holders: dict[str, Entry] = {}
        for found in await asyncio.gather(*(self._look_at(name) for name in self._pool.actors.names())):
            if isinstance(found, PooledActor):
                empty.append(found)
            elif found is not None:
                other = holders.get(found.key.digest)
                if other is not None and _activation(other) > _activation(found):
                    found, other = other, found
                if other is not None:
                    # The keeper died in a hand-over that was all but done: two hold the same memory. Only the
                    # successor may go on, or two turns would write at once.
                    self._pool.end(other.actor)
                    other.hold(None)
                holders[found.key.digest] = found
        for entry in holders.values():
            if entry.last_stats is not None and entry.last_stats.state == "handing_over":
                # The keeper died in between, and nobody follows. (One that dies now is found dead later.)
                await self._cancel(entry.key, entry.actor)
        # Entered all at once: if anything above fails, looking again finds the same.
        for pooled in empty:
            self._pool.add(pooled)
        for entry in holders.values():
            self._roster.adopt(entry)
        return list(holders.values())

    async def _look_at(self, name: str) -> Entry | PooledActor | None:
        """What an earlier keeper's actor holds. One that is dead is nobody, one that does not answer is ended."""
        try:
            handle = self._pool.actors.find(name)
        except ValueError:
            return None
        try:
            held = await asyncio.wait_for(handle.held.remote(), ANSWER_SECONDS)
        except (RayError, asyncio.TimeoutError):
            # An error is no proof of its death: it may still hold a session, and hand turns out.
            self._pool.actors.kill(handle)
            return None
        pooled = self._pool.pooled(handle, held.process)
        if held.key is None or held.stats is None or held.stats.state == "moved":
            return pooled
        entry = Entry(
            held.key, actor=pooled, private_baseline=private_or_zero(pooled.process.pid), last_stats=held.stats
        )
        self.hold(entry, held.memory)
        return entry

    async def on_silence(self, entry: Entry) -> None:
        """The session's actor did not answer. One that is silent for too long hangs: it is ended."""
        now = asyncio.get_running_loop().time()
        if entry.silent_since is None:
            entry.silent_since = now
        actor = entry.actor
        if actor is not None and now - entry.silent_since > self._config.hang_timeout:
            logger.error("a session actor (pid %d) does not answer and is replaced", actor.process.pid)
            await self._pool.actors.kill_for_sure(actor.process)
            self.recycles[RecycleReason.UNRESPONSIVE.value] += 1
            self._events.add(EventKind.SESSION_ACTOR_HUNG, entry.key)

    def hold(self, entry: Entry, ref: SegmentRef | None) -> None:
        """Whatever becomes of the actor: its memory is not lost with it. (One that cannot be had is computed again.)"""
        memory = None
        if ref is not None:
            with contextlib.suppress(SegmentGone, SegmentMismatch):
                memory = self._settings.hold(ref)
        entry.hold(memory)

    async def _to_actor(self, entry: Entry, successor: PooledActor, reason: RecycleReason | None) -> None:
        """The successor takes the session, then the predecessor lets go. With `entry.moving` held."""
        key, predecessor = entry.key, entry.actor
        try:
            if predecessor is None:
                assert entry.session is not None
                stats: SessionStats | Moved = entry.session.describe()
                ref = await entry.session.begin_hand_over(_WAIT_SECONDS)
            else:
                # One that hangs would hold the lock for ever.
                stats = await asyncio.wait_for(predecessor.call("describe", key), ANSWER_SECONDS)
                ref = await self._begin(key, predecessor)
        except (PhiError, RayError, asyncio.TimeoutError):
            self._pool.add(successor)
            raise
        if isinstance(ref, Moved) or isinstance(stats, Moved):
            self._pool.add(successor)
            return
        last_used = self._settings.clock() - stats.idle_seconds
        try:
            entry.last_stats = await successor.call(
                "activate", successor.process, key, ref, predecessor is not None, last_used
            )
        except RayError as error:
            if isinstance(error, RayTaskError):
                # It refused (the journal cannot be written, the memory is gone): it holds nothing, and is used again.
                self._pool.add(successor)
            else:
                # First of all: it may hold the session.
                self._pool.end(successor)
            if predecessor is None:
                assert entry.session is not None
                entry.session.cancel_hand_over()
            else:
                await self._cancel(key, predecessor)
            raise
        self.hold(entry, ref)
        held, entry.session, entry.actor, entry.wants_actor = entry.session, None, successor, False
        entry.silent_since = None
        # It may be dead by now. Whatever it is, the predecessor is let go: it must not keep those who wait there.
        entry.private_baseline = private_or_zero(successor.process.pid)
        self.activations += 1
        if predecessor is None:
            assert held is not None
            held.complete_hand_over()
            self._events.add(EventKind.SESSION_ACTIVATED, key)
        else:
            assert reason is not None
            self.recycles[reason.value] += 1
            self._events.add(EventKind.SESSION_RECYCLED, key, reason=reason.value)
            await self._let_go(key, predecessor)

    async def to_keeper(self, entry: Entry, reason: RecycleReason, wait_seconds: float = _WAIT_SECONDS) -> None:
        """The keeper takes the session's memory, still warm; its actor ends. With `entry.moving` held. Raises
        SessionBusy if a turn does not end in time, and what a hand-over raises."""
        actor = entry.actor
        if actor is None:
            return
        stats = await asyncio.wait_for(actor.call("describe", entry.key), ANSWER_SECONDS)
        ref = await self._begin(entry.key, actor, wait_seconds)
        if isinstance(ref, Moved) or isinstance(stats, Moved):
            return
        last_used = self._settings.clock() - stats.idle_seconds
        try:
            entry.session = Session.take_over(
                ref, self._journal(entry.key), self._settings, recycled=False, last_used=last_used
            )
        except BaseException:
            await self._cancel(entry.key, actor)
            raise
        entry.hold(None)
        entry.actor, entry.wants_actor = None, False
        self.recycles[reason.value] += 1
        self._events.add(EventKind.SESSION_DEACTIVATED, entry.key, reason=reason.value)
        self._metrics.on_deactivated(reason.value)
        await self._let_go(entry.key, actor)

    async def _begin(
        self, key: SessionKey, predecessor: PooledActor, wait_seconds: float = _WAIT_SECONDS
    ) -> SegmentRef | Moved:
        """Raises SessionBusy and RayError, and the session is as before."""
        try:
            return await predecessor.call("begin_hand_over", key, wait_seconds)
        except RayTaskError:
            raise
        except RayError:
            # Only the answer may be lost: it must not wait for a successor that nobody sends.
            await self._cancel(key, predecessor)
            raise

    async def _cancel(self, key: SessionKey, predecessor: PooledActor) -> None:
        """The predecessor goes on as before, unless it is dead."""
        for _ in range(_CANCELS):
            try:
                await asyncio.wait_for(predecessor.call("cancel_hand_over", key), ANSWER_SECONDS)
                return
            except RayTaskError:
                # No hand-over is under way.
                return
            except (RayError, asyncio.TimeoutError) as error:
                logger.info("a predecessor was not told to go on: %s", type(error).__name__)

    async def _let_go(self, key: SessionKey, predecessor: PooledActor) -> None:
        """The session is with its successor: the predecessor tells those who wait, and ends."""
        try:
            await asyncio.wait_for(predecessor.call("complete_hand_over", key), ANSWER_SECONDS)
        except (RayError, asyncio.TimeoutError) as error:
            # It is dead, or hangs: its end tells them as well.
            logger.info("a predecessor did not let go by itself: %s", type(error).__name__)
        finally:
            self._pool.end(predecessor)

    async def _tend(self) -> None:
        """Gives actors to sessions that want one, one spawn at a time, and keeps some warm."""
        while True:
            await self._needed.wait()
            await asyncio.sleep(self._config.spawn_interval)
            try:
                await self._tend_once()
            except Exception:
                # Whatever it is: without this task no session would get an actor any more. The next round tries again.
                logger.exception("sessions could not be tended to")

    def _num_actors(self) -> int:
        return sum(entry.actor is not None for entry in self._roster) + self._pool.num_waiting

    def _waiting(self) -> list[Entry]:
        """Sessions that want an actor and are between two turns, those that were used last first: in a long queue they
        are the ones that may be used again. Who has idled so long that its actor would go at once does not want one."""
        found: list[tuple[float, int, Entry]] = []
        for number, entry in enumerate(self._roster):
            if entry.wants_actor and entry.session is not None and not entry.session.in_turn:
                idle = entry.session.describe().idle_seconds
                if self._config.idle_timeout is not None and idle > self._config.idle_timeout:
                    entry.wants_actor = False
                else:
                    found.append((idle, number, entry))
        return [entry for *_, entry in sorted(found, key=lambda one: one[:2])]

    async def _tend_once(self) -> None:
        waiting = self._waiting()
        wanted = min(len(waiting), 1) + self._config.warm_actors
        if self._pool.num_waiting < wanted and self._num_actors() < self._config.max_actors:
            self._pool.add(await self._pool.spawn())
        # One at least, if it has to stand in line with those that renew theirs: while they go on none is ever spare.
        num = max(self._pool.num_warm, 1) if self._pool.num_waiting else 0
        for _ in range(min(len(waiting), num)):
            await self._give(await self._pool.take())

    async def _give(self, successor: PooledActor) -> None:
        """To the first of the sessions that want an actor by now."""
        entry = next((one for one in self._waiting() if not one.moving.locked()), None)
        if entry is None:
            self._pool.add(successor)
            return
        async with entry.moving:
            try:
                await self._to_actor(entry, successor, None)
            except SessionBusy:
                # A turn began in between; the next round tries again.
                pass
            except (PhiError, RayError) as error:
                # The session stays, until its next turn asks again: the others must not wait behind it.
                entry.wants_actor = False
                logger.warning("a session did not change hands: %s", error)


def _activation(entry: Entry) -> int:
    return 0 if entry.last_stats is None else entry.last_stats.activation
