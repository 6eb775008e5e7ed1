"""What users do to their sessions by name: look, clear, delete, export, have renewed or put to sleep.

Owns: these deeds, for sessions wherever they are, and their public descriptions. Knows nothing of turns, of HTTP, or of
how a session changes hands.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

from ray.exceptions import RayActorError

from phi_cluster.cluster.events import EventKind
from phi_cluster.cluster.messages import SessionKey
from phi_cluster.cluster.session.custody import Custody, no_session, session_exists
from phi_cluster.cluster.session.hibernation import Hibernation
from phi_cluster.cluster.session.journal import Glance
from phi_cluster.cluster.session.recycler import RecycleReason
from phi_cluster.cluster.session.reports import public_description, stored_description
from phi_cluster.cluster.session.roster import Entry
from phi_cluster.cluster.session.session import SessionStats
from phi_cluster.cluster.session.session_export import BadExport, pack_session, unpack_session
from phi_cluster.cluster.session.transcript import Transcript


class Administration:
    """Every method raises NotFound for a session that there is not."""

    def __init__(self, custody: Custody, hibernation: Hibernation, node_id: str):
        self._custody = custody
        self._hibernation = hibernation
        self._roster = custody.roster
        self._node_id = node_id

    async def describe(self, key: SessionKey) -> dict[str, Any]:
        """One session under the names of the HTTP API."""
        entry = self._roster.find(key)
        if entry is not None:
            return self.public(entry, await self._custody.stats(entry))
        if not self._custody.is_known(key):
            raise no_session(key)
        # In place: in a thread it could make a journal anew that is being deleted.
        return self._describe_stored(key)

    def said(self, key: SessionKey) -> str:
        """The conversation's text, as of its last turn. Raises the journal's errors too."""
        if not self._custody.is_known(key):
            raise no_session(key)
        return Transcript.replay(self._custody.recorded(key).turns).text

    async def clear(self, key: SessionKey) -> dict[str, Any]:
        """Raises SessionBusy."""
        wait = self._custody.config.turn_wait
        while True:
            entry = self._custody.known(key)
            stats = await (entry.session.clear(wait) if entry.session else entry.actor.handle.clear.remote(key, wait))
            if isinstance(stats, SessionStats):
                self._custody.settle(entry, stats)
                await self._hibernation.forget(key)
                self._custody.events.add(EventKind.SESSION_CLEARED, key)
                return self.public(entry, stats)

    async def delete(self, key: SessionKey) -> None:
        """Raises SessionBusy."""
        custody, wait = self._custody, self._custody.config.turn_wait
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
                        await entry.actor.handle.delete.remote(key, wait)
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

    def export(self, key: SessionKey) -> bytes:
        """The session's record as a file (session_export.py), as of its last turn. Raises the journal's errors."""
        if not self._custody.is_known(key):
            raise no_session(key)
        recorded = self._custody.recorded(key)
        return pack_session(recorded.info.fingerprint, key, recorded.info.created_at, recorded.turns)

    async def import_session(self, key: SessionKey, data: bytes, vocab_size: int) -> dict[str, Any]:
        """Makes a session of such a file. Raises SessionExists, BadExport, and the journal's errors."""
        custody = self._custody
        # Long ones take a while.
        export = await asyncio.to_thread(unpack_session, data, key, vocab_size)
        if export.fingerprint != custody.settings.fingerprint:
            raise BadExport("the session was exported from another model, whose token ids mean nothing to this one")
        # From here to the end nothing can come between.
        if self._custody.is_known(key):
            raise session_exists(key)
        journal = custody.journal(key)
        try:
            journal.fill(export.turns, export.fingerprint)
        except ValueError:
            raise session_exists(key) from None
        finally:
            journal.close()
        self._roster.add_stored(key)
        custody.events.add(EventKind.SESSION_IMPORTED, key)
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
