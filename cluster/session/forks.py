"""Forks: a new session with another's conversation, or its beginning, and a private copy of its keys and values.

Owns: the order of a fork. The journal makes it, all or nothing; memory is leased before it is copied, and where there
is none the fork's next turn computes it anew. Knows nothing of HTTP, or of turns but that they wait meanwhile.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from dataclasses import dataclass

from phi_cluster.cluster.events import EventKind
from phi_cluster.cluster.messages import Moved, SegmentRef, SessionKey
from phi_cluster.cluster.session.custody import Custody, Recorded
from phi_cluster.cluster.session.roster import Entry
from phi_cluster.cluster.session.segment import Segment, SegmentGone, SegmentMismatch

logger = logging.getLogger(__name__)


@dataclass
class _Origin:
    """What a fork is made of. `num_tokens`: so many have keys and values; `copy`: of as many as there was room for."""

    recorded: Recorded
    num_tokens: int = 0
    copy: Segment | None = None


class Forks:
    """For one event loop. `made`: how many since this keeper started."""

    def __init__(self, custody: Custody):
        self._custody = custody
        self._roster = custody.roster
        self.made = 0

    async def fork(self, key: SessionKey, new: SessionKey, turn: int | None) -> None:
        """Makes the session `new`: as `key` was after its `turn`-th turn of those that it consists of now (what an edit
        took away does not count), or as it is (None).

        Raises NotFound, SessionExists, InvalidRequest if there are fewer turns, SessionBusy if a turn does not end in
        time, and the journal's errors; nothing has happened then.
        """
        # Memory under a name of its own: the new session may come to be meanwhile, with a lease of its own.
        lease = f"fork {uuid.uuid4().hex}"
        # For so many tokens; None: not asked for yet.
        room: int | None = None
        try:
            while True:
                self._custody.check_free(new)
                entry = self._roster.find(key)
                if entry is None:
                    self._custody.check_known(key)
                    # Only the disk has it, and nothing can come between: this does not wait.
                    self._make(new, _Origin(self._custody.recorded(key, turn)))
                    return
                async with entry.moving:
                    origin = await self._visit(entry, turn, room) if self._roster.find(key) is entry else None
                if origin is None:
                    # It changed hands, or was dropped, while this waited.
                    await asyncio.sleep(0)
                elif room is None and origin.num_tokens:
                    # Not while the session waits: making room may take a while, and may ask for this very session.
                    nbytes = self._nbytes(origin)
                    room = origin.num_tokens if await self._custody.leases.take(lease, nbytes) else 0
                else:
                    self._make(new, origin)
                    return
        finally:
            self._custody.leases.release(lease)

    async def _visit(self, entry: Entry, turn: int | None, room: int | None) -> _Origin | None:
        """The conversation between two of its turns, with a copy of its memory if there is `room`. None: it moved.
        With `entry.moving` held."""
        custody = self._custody
        async with custody.hands.lent(entry, custody.config.turn_wait) as ref:
            if isinstance(ref, Moved):
                return None
            origin = _Origin(custody.recorded(entry.key, turn))
            try:
                await self._copy(ref, origin, room or 0)
            except (SegmentGone, SegmentMismatch, OSError) as error:
                logger.warning("a fork is computed anew: %s", error)
                origin.num_tokens = 0
            return origin

    async def _copy(self, ref: SegmentRef, origin: _Origin, room: int) -> None:
        settings = self._custody.settings
        source = settings.segments.open(ref, settings.layout, settings.fingerprint)
        try:
            origin.num_tokens = min(source.count_matching(origin.recorded.token_ids), source.num_computed_tokens)
            num_tokens = min(origin.num_tokens, room)
            if num_tokens:
                copy = settings.segments.create(settings.layout, settings.fingerprint)
                try:
                    await asyncio.to_thread(copy.copy_from, source, num_tokens)
                except BaseException:
                    copy.close()
                    raise
                origin.copy = copy
        finally:
            source.close()

    def _nbytes(self, origin: _Origin) -> int:
        """Memory of the copy, with all ids."""
        layout = self._custody.settings.layout
        num_ids = min(len(origin.recorded.token_ids), layout.max_model_len)
        return layout.nbytes_used(num_ids, origin.num_tokens)

    def _make(self, new: SessionKey, origin: _Origin) -> None:
        copy, origin.copy = origin.copy, None
        recorded = origin.recorded
        self._custody.make(new, recorded.turns, recorded.info.fingerprint, copy, EventKind.SESSION_FORKED)
        self.made += 1
