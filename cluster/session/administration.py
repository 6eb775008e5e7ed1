"""What users do to their sessions by name: look, clear, delete, export, have renewed or put to sleep.

Owns: these deeds, for sessions wherever they are, and their public descriptions. Knows nothing of turns, of HTTP, or of
how a session changes hands.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

from ray.exceptions import RayActorError

from phi_cluster.cluster.errors import Overloaded
from phi_cluster.cluster.events import EventKind
from phi_cluster.cluster.messages import SessionKey
from phi_cluster.cluster.session.cache_export import CacheExports, ImportFile
from phi_cluster.cluster.session.custody import Custody, Recorded
from phi_cluster.cluster.session.hibernation import Hibernation
from phi_cluster.cluster.session.hibernation_store import StorageFull
from phi_cluster.cluster.session.journal import Glance
from phi_cluster.cluster.session.recycler import RecycleReason
from phi_cluster.cluster.session.reports import public_description, stored_description
from phi_cluster.cluster.session.roster import Entry
from phi_cluster.cluster.session.session import SessionStats
from phi_cluster.cluster.session.session_export import BadExport, pack_session, unpack_session
from phi_cluster.cluster.session.spool import SpoolRef
from phi_cluster.cluster.session.transcript import Transcript


class Administration:
    """Every method raises NotFound for a session that there is not."""

    def __init__(self, custody: Custody, hibernation: Hibernation, caches: CacheExports, node_id: str):
        self._custody = custody
        self._hibernation = hibernation
        self._caches = caches
        self._roster = custody.roster
        self._node_id = node_id

    async def describe(self, key: SessionKey) -> dict[str, Any]:
        """One session under the names of the HTTP API."""
        entry = self._roster.find(key)
        if entry is not None:
            return self.public(entry, await self._custody.stats(entry))
        self._custody.check_known(key)
        # In place: in a thread it could make a journal anew that is being deleted.
        return self._describe_stored(key)

    def said(self, key: SessionKey) -> str:
        """The conversation's text, as of its last turn. Raises the journal's errors too."""
        self._custody.check_known(key)
        return Transcript.replay(self._custody.recorded(key).turns).text

    async def clear(self, key: SessionKey) -> dict[str, Any]:
        """Raises SessionBusy."""
        wait = self._custody.config.turn_wait
        while True:
            entry = self._custody.known(key)
            stats = await (entry.session.clear(wait) if entry.session else entry.actor.call("clear", key, wait))
            if isinstance(stats, SessionStats):
                self._custody.settle(entry, stats)
                await self._hibernation.forget(key)
                self._custody.events.add(EventKind.SESSION_CLEARED, key)
                return self.public(entry, stats)

    async def delete(self, key: SessionKey, wait: float | None = None) -> None:
        """`wait`: so many seconds for the turn under way (None: as a turn waits). Raises SessionBusy."""
        custody = self._custody
        wait = custody.config.turn_wait if wait is None else wait
        while True:
            if self._roster.find(key) is None and self._custody.is_known(key):
                # Without opening it: also one whose journal cannot be read can be deleted.
                custody.journal(key).delete()
                self._roster.forget_stored(key)
                custody.events.add(EventKind.SESSION_DELETED, key)
                await self._hibernation.forget(key)
                return
            entry = custody.known(key)
            async with entry.moving:
                if self._roster.find(key) is not entry:
                    # Deleted, or dropped for want of room, while this waited.
                    continue
                if entry.session is not None:
                    await entry.session.delete(wait)
                else:
                    # An actor that died keeps nobody from deleting what it left.
                    with contextlib.suppress(RayActorError):
                        await entry.actor.call("delete", key, wait)
                    await custody.hands.end_actor(entry)
                    custody.journal(key).delete()
                self._roster.forget(entry, deleted=True)
                custody.leases.release(key.digest)
                custody.events.add(EventKind.SESSION_DELETED, key)
                await self._hibernation.forget(key)
                return

    async def recycle(self, key: SessionKey, reason: RecycleReason) -> dict[str, Any]:
        """Renews the session's actor (or gives it back, by reason). Raises SessionBusy."""
        await self._hibernation.wake(key)
        await self._custody.hands.recycle(self._custody.known(key), reason)
        return await self.describe(key)

    async def hibernate(self, key: SessionKey) -> dict[str, Any]:
        """See `Hibernation.hibernate`; by a user's wish."""
        await self._hibernation.hibernate(key, is_asked=True)
        return await self.describe(key)

    async def export(self, key: SessionKey, cache_up_to: int | None = None) -> bytes | SpoolRef:
        """The session's record as a file (session_export.py), as of its last turn; with as much of its cache as makes
        the file no longer than `cache_up_to` bytes (cache_export.py), where there is one: then it is a file that is to
        be fetched (see `fetched`). Raises the journal's errors; with a cache SessionBusy, Overloaded and StorageFull
        too."""
        self._custody.check_known(key)

        def turns_file(recorded: Recorded) -> bytes:
            return pack_session(recorded.info.fingerprint, key, recorded.info.created_at, recorded.turns)

        if cache_up_to is not None:
            with contextlib.suppress(Overloaded):
                await self._hibernation.wake(key)
            try:
                packed = await self._caches.pack(key, turns_file, cache_up_to)
            except OSError as error:
                raise StorageFull(f"the cache cannot be exported: {error.strerror or error}") from None
            if packed is not None:
                return packed
            self._custody.check_known(key)
        return turns_file(self._custody.recorded(key))

    def fetched(self, token: bytes) -> None:
        """See `CacheExports.fetched`."""
        self._caches.fetched(token)

    async def import_session(self, key: SessionKey, given: ImportFile, vocab_size: int) -> dict[str, Any]:
        """Makes a session of such a file, with the cache in it if that is to be believed and there is room. Raises
        SessionExists, BadExport, and the journal's errors."""
        custody = self._custody
        # Long ones take a while.
        export = await asyncio.to_thread(unpack_session, given.turns, key, vocab_size)
        if export.fingerprint != custody.settings.fingerprint:
            raise BadExport("the session was exported from another model, whose token ids mean nothing to this one")
        # Before any memory is taken.
        custody.check_free(key)
        token_ids = Transcript.replay(export.turns).token_ids
        async with self._caches.unpacked(given, len(export.turns), token_ids) as memory:
            custody.make(key, export.turns, export.fingerprint, memory, EventKind.SESSION_IMPORTED)
        return await self.describe(key)

    def public(self, entry: Entry, stats: SessionStats) -> dict[str, Any]:
        """A session in memory under the names of the HTTP API."""
        pid = None if entry.actor is None else entry.actor.process.pid
        return public_description(stats, pid, self._node_id)

    def _describe_stored(self, key: SessionKey) -> dict[str, Any]:
        journal = self._custody.journal(key)
        try:
            info, turns = journal.info(), journal.load()
        finally:
            journal.close()
        last_used = max([info.created_at, *(turn.committed_at for turn in turns)])
        num_tokens = Transcript.replay(turns).num_tokens
        seen = Glance(num_tokens, info.turns, info.activation, info.recycles, info.created_at, last_used)
        now, disk_nbytes = self._custody.settings.clock(), self._hibernation.nbytes(key)
        return stored_description(key.session_id, seen, now, disk_nbytes)
