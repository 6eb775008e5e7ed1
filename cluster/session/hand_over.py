"""How sessions change hands on a node: from the keeper to an actor, from an actor to its successor, and back.

Owns: the order of a hand-over (make before break), the pool of actors, and giving actors to sessions one by one.
Knows nothing of who asked for it and of policy.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable

import ray
from ray.exceptions import RayError

from phi_cluster.cluster.actors import NAMESPACE, SESSION_PREFIX
from phi_cluster.cluster.config import SessionsConfig
from phi_cluster.cluster.errors import PhiError
from phi_cluster.cluster.messages import Moved, SessionKey
from phi_cluster.cluster.processes import private_bytes
from phi_cluster.cluster.session.actor_pool import ActorPool, PooledActor
from phi_cluster.cluster.session.journal import Journal
from phi_cluster.cluster.session.recycler import RecycleReason
from phi_cluster.cluster.session.roster import Entry, Roster
from phi_cluster.cluster.session.session import Session, SessionSettings, SessionStats

logger = logging.getLogger(__name__)

# How long a hand-over waits for the turn under way; a longer turn is left alone until the next round.
_WAIT_SECONDS = 5.0


class HandOvers:
    """For one event loop. Counters since it was made; `recycles` by RecycleReason value."""

    def __init__(
        self,
        roster: Roster,
        pool: ActorPool,
        settings: SessionSettings,
        journal: Callable[[SessionKey], Journal],
        config: SessionsConfig,
    ):
        self._roster = roster
        self._pool = pool
        self._settings = settings
        self._journal = journal
        self._config = config
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
                self._pool.end(entry.actor)

    def want_actor(self, entry: Entry) -> None:
        """The session is in use here: it gets an actor of its own when its turn has ended."""
        if not entry.key.ephemeral:
            entry.wants_actor = True
            self._needed.set()

    async def recycle(self, entry: Entry, reason: RecycleReason) -> None:
        """Renews the session's actor, make before break; with a reason that deactivates, the keeper takes the session
        and the actor ends. Raises SessionBusy if a turn does not end in time, and what a hand-over raises."""
        async with entry.moving:
            if reason.deactivates:
                await self._to_keeper(entry, reason)
            else:
                await self._to_actor(entry, await self._pool.take(), reason)

    async def end_actor(self, entry: Entry) -> None:
        """The session is gone: so is its actor."""
        if entry.actor is not None:
            self._pool.end(entry.actor)

    async def adopt_actors(self) -> list[Entry]:
        """Finds the actors that an earlier keeper of this node had, and enters their sessions."""
        adopted = []
        for actor in ray.util.list_named_actors(all_namespaces=True):
            if actor["namespace"] != NAMESPACE or not actor["name"].startswith(SESSION_PREFIX):
                continue
            try:
                handle = ray.get_actor(actor["name"], namespace=NAMESPACE)
                pooled = PooledActor(handle, await handle.process.remote())
                held = await handle.held.remote()
                baseline = private_bytes(pooled.process.pid)
            except (ValueError, RayError, ProcessLookupError):
                continue
            if held is None or held[1].state == "moved":
                self._pool.add(pooled)
                continue
            if held[1].state == "handing_over":
                # The keeper died in between; whoever was to follow has nothing yet or holds the same memory.
                await handle.cancel_hand_over.remote(held[0])
            entry = Entry(held[0], actor=pooled, private_baseline=baseline, last_stats=held[1])
            self._roster.adopt(entry)
            adopted.append(entry)
        return adopted

    async def _to_actor(self, entry: Entry, successor: PooledActor, reason: RecycleReason | None) -> None:
        """The successor takes the session, then the predecessor lets go. With `entry.moving` held."""
        key, predecessor = entry.key, entry.actor
        try:
            if predecessor is None:
                assert entry.session is not None
                stats: SessionStats | Moved = entry.session.describe()
                ref = await entry.session.begin_hand_over(_WAIT_SECONDS)
            else:
                stats = await predecessor.handle.describe.remote(key)
                ref = await predecessor.handle.begin_hand_over.remote(key, _WAIT_SECONDS)
        except (PhiError, RayError):
            self._pool.add(successor)
            raise
        if isinstance(ref, Moved) or isinstance(stats, Moved):
            self._pool.add(successor)
            return
        last_used = self._settings.clock() - stats.idle_seconds
        try:
            entry.last_stats = await successor.handle.activate.remote(key, ref, predecessor is not None, last_used)
        except (PhiError, RayError):
            if predecessor is None:
                assert entry.session is not None
                entry.session.cancel_hand_over()
            else:
                await predecessor.handle.cancel_hand_over.remote(key)
            self._pool.end(successor)
            raise
        held, entry.session, entry.actor, entry.wants_actor = entry.session, None, successor, False
        entry.private_baseline = private_bytes(successor.process.pid)
        self.activations += 1
        if predecessor is None:
            assert held is not None
            held.complete_hand_over()
        else:
            assert reason is not None
            self.recycles[reason.value] += 1
            await predecessor.handle.complete_hand_over.remote(key)
            self._pool.end(predecessor)

    async def _to_keeper(self, entry: Entry, reason: RecycleReason) -> None:
        """The keeper takes the session's memory, still warm; its actor ends. With `entry.moving` held."""
        actor = entry.actor
        if actor is None:
            return
        stats = await actor.handle.describe.remote(entry.key)
        ref = await actor.handle.begin_hand_over.remote(entry.key, _WAIT_SECONDS)
        if isinstance(ref, Moved) or isinstance(stats, Moved):
            return
        last_used = self._settings.clock() - stats.idle_seconds
        try:
            entry.session = Session.take_over(
                ref, self._journal(entry.key), self._settings, recycled=False, last_used=last_used
            )
        except BaseException:
            await actor.handle.cancel_hand_over.remote(entry.key)
            raise
        entry.actor, entry.wants_actor = None, False
        self.recycles[reason.value] += 1
        await actor.handle.complete_hand_over.remote(entry.key)
        self._pool.end(actor)

    async def _tend(self) -> None:
        """Gives actors to sessions that want one, one spawn at a time, and keeps some warm."""
        while True:
            await self._needed.wait()
            await asyncio.sleep(self._config.spawn_interval)
            try:
                await self._tend_once()
            except (PhiError, RayError, ProcessLookupError, OSError) as error:
                # The session stays where it is; the next round tries again.
                logger.warning("a session did not change hands: %s", error)

    async def _tend_once(self) -> None:
        waiting = [e for e in self._roster if e.wants_actor and e.session is not None and not e.session.in_turn]
        num_actors = sum(e.actor is not None for e in self._roster) + self._pool.num_warm
        wanted = min(len(waiting), 1) + self._config.warm_actors
        if self._pool.num_warm < wanted and num_actors < self._config.max_actors:
            self._pool.add(await self._pool.spawn())
        for entry in waiting[: self._pool.num_warm]:
            async with entry.moving:
                if entry.session is not None and not entry.session.in_turn:
                    await self._to_actor(entry, await self._pool.take(), None)
