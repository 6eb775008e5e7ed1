"""Sessions that leave memory, and come back: hibernating and waking.

Owns: the order of both, which caches are on the disk, and the counts. The journal decides: a cache that is not of its
latest state, or is not what was written, is computed anew. Knows nothing of files (a store is injected), of HTTP, or of
who is to sleep: the controller says that, a user, or want of memory.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

from ray.exceptions import RayError

from phi_cluster.cluster.errors import PhiError, SessionBusy
from phi_cluster.cluster.events import EventKind
from phi_cluster.cluster.messages import Moved, SegmentRef, SessionKey
from phi_cluster.cluster.session.custody import Custody, Recorded
from phi_cluster.cluster.session.hibernated_payload import HibernatedPayload
from phi_cluster.cluster.session.hibernation_file import BadHibernation, Mark
from phi_cluster.cluster.session.hibernation_policy import HibernationPolicy
from phi_cluster.cluster.session.hibernation_store import Hibernated, HibernationStore, StorageFull
from phi_cluster.cluster.session.recycler import RecycleReason
from phi_cluster.cluster.session.roster import Entry
from phi_cluster.cluster.session.session import Session

logger = logging.getLogger(__name__)


class Hibernation:
    """For one event loop. `monotonic` gives seconds, to measure with.

    `counts` since it was made: see monitoring/session_metrics.py.
    """

    def __init__(
        self, custody: Custody, store: HibernationStore | None, monotonic: Callable[[], float] = time.monotonic
    ):
        """Without a store sessions are dropped from memory, and nothing is written."""
        self._custody = custody
        custody.put_away = self.make_room
        self._roster = custody.roster
        self._store = store
        self._monotonic = monotonic
        self._asleep: dict[str, Hibernated] = {}
        self._waking: dict[str, asyncio.Task[None]] = {}
        self.policy = HibernationPolicy()
        self.counts: Counter[str] = Counter()

    def leave(self) -> dict[str, Any]:
        """For a successor: what is asleep, and the speeds that were measured."""
        return {"asleep": self._asleep, "policy": self.policy}

    def inherit(self, left: dict[str, Any]) -> None:
        """What a predecessor left, in the place of `start`."""
        self._asleep, self.policy = left["asleep"], left["policy"]

    async def start(self) -> None:
        """Finds what is asleep; what has no journal goes. Once, when the roster knows all journals."""
        if self._store is None:
            return
        found = await asyncio.to_thread(self._store.scan)
        known = {key.digest for key in self._roster.stored_keys()}
        self._asleep = {digest: one for digest, one in found.items() if digest in known}
        for digest in found.keys() - known:
            await asyncio.to_thread(self._store.delete, digest)

    def nbytes(self, key: SessionKey) -> int | None:
        """What the session's cache takes on the disk; None: it is not there."""
        asleep = self._asleep.get(key.digest)
        return None if asleep is None or self._roster.find(key) is not None else asleep.nbytes

    def peek(self, key: SessionKey) -> tuple[Hibernated, HibernatedPayload, Recorded] | None:
        """The session's cache on the disk, to be read by whoever closes it, and what it is of; it stays where it is.
        None: there is none, or it is in memory, or cannot be used. Raises the journal's errors."""
        asleep = self._asleep.get(key.digest)
        if asleep is None or self._store is None or key.digest in self._waking or self._roster.find(key) is not None:
            return None
        recorded, settings = self._custody.recorded(key), self._custody.settings
        try:
            payload = self._store.open(key.digest, settings.layout, settings.fingerprint, mark_of(recorded))
        except (BadHibernation, OSError) as error:
            logger.warning("a hibernated cache cannot be moved: %s", error)
            return None
        return asleep, payload, recorded

    def is_asleep(self, key: SessionKey, asleep: Hibernated) -> bool:
        """Whether this is still what the session has, and all."""
        return self._roster.find(key) is None and self._asleep.get(key.digest) is asleep

    async def forget(self, key: SessionKey) -> None:
        """The conversation is gone, or another: nothing of it stays on the disk. Raises OSError."""
        self._asleep.pop(key.digest, None)
        if self._store is not None:
            await asyncio.to_thread(self._store.delete, key.digest)

    # To sleep.

    async def hibernate(self, key: SessionKey, *, is_asked: bool) -> None:
        """The session's actor and memory are given back, its cache goes to the disk: always if a user asked for it,
        else where reading it will be quicker than computing it.

        Raises NotFound, SessionBusy, StorageFull; the session stays as it is then.
        """
        if self._store is None:
            raise StorageFull("kv.hibernate_quota is 0: no session hibernates")
        while True:
            entry = self._roster.find(key)
            if entry is None:
                self._custody.check_known(key)
                return
            async with entry.moving:
                if self._roster.find(key) is not entry:
                    continue
                wait = self._custody.config.turn_wait if is_asked else 0.0
                if await self._put_away(entry, wait, is_asked, RecycleReason.IDLE):
                    return
            await asyncio.sleep(0)

    async def make_room(self, entry: Entry) -> bool:
        """The session's memory is wanted: it goes to the disk, or, where that cannot be or is not worth it, just goes.
        False if it is in use."""
        # One that is changing hands is left alone: who does that may be waiting for room.
        if entry.moving.locked() or self._roster.find(entry.key) is not entry:
            return False
        if entry.session is not None and entry.session.in_turn:
            # Also one that is on its way to another node: its memory comes free sooner if it is let go.
            return False
        async with entry.moving:
            try:
                return await self._put_away(entry, 0.0, False, RecycleReason.MEMORY_PRESSURE, drops=True)
            except (SessionBusy, RayError, asyncio.TimeoutError):
                return False

    async def _put_away(
        self, entry: Entry, wait: float, is_asked: bool, reason: RecycleReason, *, drops: bool = False
    ) -> bool:
        """False if the session moved. `drops`: it leaves memory also if it cannot be written. With `entry.moving`
        held."""
        custody = self._custody
        if entry.actor is not None:
            await custody.hands.to_keeper(entry, reason, wait)
        session = entry.session
        if session is None:
            return False
        ref = await session.begin_hand_over(wait)
        if isinstance(ref, Moved):
            return False
        try:
            await self._write(entry.key, ref, is_asked)
        except (PhiError, OSError) as error:
            self.counts["hibernation_failures"] += 1
            logger.warning("a cache could not be written to the disk: %s", error)
            if not drops:
                session.cancel_hand_over()
                if isinstance(error, OSError):
                    raise StorageFull(f"the cache could not be written to the disk: {error.strerror}") from None
                raise
        except BaseException:
            session.cancel_hand_over()
            raise
        session.complete_hand_over()
        self._roster.forget(entry, deleted=False)
        custody.leases.release(entry.key.digest)
        return True

    async def _write(self, key: SessionKey, ref: SegmentRef, is_asked: bool) -> None:
        """Raises OSError, StorageFull, and the journal's errors."""
        if self._store is None:
            return
        settings = self._custody.settings
        recorded = self._custody.recorded(key)
        segment = settings.segments.open(ref, settings.layout, settings.fingerprint)
        try:
            # What an interrupted turn left behind the conversation is computed again if anybody reads on.
            num_tokens = min(segment.count_matching(recorded.token_ids), segment.num_computed_tokens)
            nbytes = settings.layout.nbytes_used(num_tokens)
            if num_tokens == 0 or not (is_asked or self.policy.is_worth_restoring(num_tokens, nbytes)):
                await self.forget(key)
                return
            self._asleep.pop(key.digest, None)
            dropped: list[str] = []
            write = self._store.write
            began = self._monotonic()
            try:
                written = await asyncio.to_thread(
                    write, key.digest, segment, num_tokens, mark_of(recorded), dropped.append
                )
            finally:
                for other in dropped:
                    self._asleep.pop(other, None)
        finally:
            segment.close()
        self._asleep[key.digest] = written
        self._custody.events.add(EventKind.SESSION_HIBERNATED, key)
        self._custody.metrics.on_hibernated(self._monotonic() - began)
        self.counts["hibernations"] += 1
        self.counts["hibernated_bytes"] += written.nbytes

    # Awake.

    async def wake(self, key: SessionKey) -> None:
        """If the session's cache is on the disk, the keeper has it in memory again, or, where it cannot be had, it is
        gone: the session's next turn computes it. Raises Overloaded if there is no memory for it."""
        digest = key.digest
        while digest in self._asleep and self._roster.find(key) is None:
            if digest not in self._waking:
                task = self._waking[digest] = asyncio.ensure_future(self._wake(key))
                task.add_done_callback(lambda _: self._waking.pop(digest, None))
            await asyncio.shield(self._waking[digest])

    async def _wake(self, key: SessionKey) -> None:
        assert self._store is not None
        custody, settings = self._custody, self._custody.settings
        digest = key.digest
        asleep = self._asleep.get(digest)
        if asleep is None:
            # Deleted or cleared before this task began.
            return
        recorded = custody.recorded(key)
        num_tokens = min(len(recorded.token_ids), settings.layout.max_model_len)
        if not self.policy.is_worth_restoring(num_tokens, asleep.nbytes):
            await self.forget(key)
            return
        lease = f"wake {digest}"
        segment = None
        try:
            await custody.leases.reserve(lease, settings.layout.nbytes_used(num_tokens))
            segment = settings.segments.create(settings.layout, settings.fingerprint)
            began = self._monotonic()
            try:
                await asyncio.to_thread(self._store.take, digest, segment, mark_of(recorded))
            except (BadHibernation, OSError) as error:
                self.counts["hibernation_failures"] += 1
                logger.warning("a hibernated cache is computed anew: %s", error)
                return
            finally:
                self._asleep.pop(digest, None)
            seconds = self._monotonic() - began
            self.policy.restored(asleep.nbytes, seconds)
            custody.metrics.on_restored(seconds)
            # Others may have opened, cleared or deleted it meanwhile.
            if self._roster.find(key) is None and self._roster.is_known(key):
                taken, segment = segment, None
                session = Session.adopt(taken, custody.journal(key), settings)
                entry = Entry(key, session=session)
                self._roster.adopt(entry)
                custody.settle(entry, session.describe())
                custody.events.add(EventKind.SESSION_WOKEN, key)
                self.counts["restores"] += 1
                self.counts["restored_bytes"] += asleep.nbytes
        finally:
            if segment is not None:
                segment.close()
            custody.leases.release(lease)


def mark_of(recorded: Recorded) -> Mark:
    """Which state of the journal that is."""
    return Mark(recorded.info.epoch, recorded.info.turns)
