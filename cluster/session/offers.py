"""Sessions that this node's keeper offers to another one's: frozen between two turns, read piece by piece, let go.

Owns: the offers, and their ends. Whoever comes for a session meanwhile (a turn, a user's deed) does not wait: the offer
ends at once, and the session is here as it was. So does one of which nothing is read for a while. Only one that is told
that the other node has the session lets it go: its pages are given back, its journal stays. Knows nothing of who takes
a session, and why.
"""

from __future__ import annotations

import asyncio
import logging
import os
import uuid
from dataclasses import dataclass, field, replace

from phi_cluster.cluster.messages import CommitTurn, Moved, SessionKey
from phi_cluster.cluster.session.custody import Custody, Recorded
from phi_cluster.cluster.session.hibernation import Hibernation, mark_of
from phi_cluster.cluster.session.hibernation_file import BadHibernation
from phi_cluster.cluster.session.hibernation_store import Hibernated
from phi_cluster.cluster.session.moving_memory import (
    OutgoingMemory,
    Piece,
    SegmentPayload,
    piece_nbytes,
    segment_header,
)
from phi_cluster.cluster.session.recycler import RecycleReason
from phi_cluster.cluster.session.roster import Entry
from phi_cluster.cluster.session.segment import Segment, SegmentGone, SegmentMismatch

logger = logging.getLogger(__name__)

# A turn under way may be about to end.
_WAIT_SECONDS = 0.5
# An offer of which nothing is read for so long has ended.
_SILENT_SECONDS = 15.0


@dataclass(frozen=True)
class Offer:
    """A session's memory, to be read as `num_pieces` pieces of the header `packed` (moving_memory.py). `turns`: of an
    unnamed conversation, whose journal is nowhere else."""

    move_id: str
    packed: bytes
    num_pieces: int
    idle_seconds: float
    turns: list[CommitTurn] | None = field(default=None, repr=False)
    cache_hint: str | None = None


@dataclass(eq=False)
class _Given:
    """`entry` None: the session is on the disk, where `asleep` is what it has."""

    key: SessionKey
    memory: OutgoingMemory
    entry: Entry | None = None
    segment: Segment | None = None
    asleep: Hibernated | None = None
    num_readers: int = 0
    is_over: bool = False
    silence: asyncio.TimerHandle | None = None

    def close(self) -> None:
        """When nobody reads any more: a descriptor that is closed under a reader may be somebody else's by then."""
        if self.is_over and not self.num_readers:
            self.memory.close()


class Offers:
    """For one event loop."""

    def __init__(self, custody: Custody, hibernation: Hibernation):
        self._custody = custody
        self._hibernation = hibernation
        self._roster = custody.roster
        self._given: dict[str, _Given] = {}
        # Digests of sessions that are offered, or about to be.
        self._taken: set[str] = set()

    @property
    def num_open(self) -> int:
        """Sessions that are being fetched."""
        return len(self._given)

    async def offer(self, key: SessionKey) -> Offer | None:
        """None: there is nothing here that could be moved, or it is offered already. Raises SessionBusy, the journal's
        errors, and what a hand-over raises; the session stays as it is then."""
        if key.digest in self._taken:
            return None
        journals = self._custody.journals
        if not key.ephemeral and journals.shared and journals.glance(key) is None:
            # Deleted elsewhere: asking its journal would make it anew.
            return None
        self._taken.add(key.digest)
        offer = None
        try:
            entry = self._roster.find(key)
            offer = self._on_disk(key) if entry is None else await self._in_memory(entry)
            return offer
        finally:
            if offer is None:
                self._taken.discard(key.digest)

    async def piece(self, move_id: str, number: int) -> Piece | None:
        """None: the offer has ended."""
        given = self._given.get(move_id)
        if given is None:
            return None
        self._listen(move_id, given)
        given.num_readers += 1
        try:
            data = await asyncio.to_thread(given.memory.piece, number)
        except (OSError, BadHibernation, IndexError) as error:
            logger.warning("a session's memory cannot be read to be moved: %s", error)
            self._end(move_id, given)
            return None
        finally:
            given.num_readers -= 1
            given.close()
        return None if given.is_over else Piece(data)

    async def let_go(self, move_id: str, *, taken: bool) -> bool:
        """The other node has the session, or will not have it. False if the session is still here."""
        given = self._given.get(move_id)
        if given is None:
            return False
        session = given.entry.session if given.entry is not None else None
        if session is not None and session.describe().num_waiting:
            taken = False
        is_here = self._end(move_id, given, taken=taken)
        if not taken or is_here:
            return False
        if given.entry is not None:
            self._roster.forget(given.entry, deleted=False)
            self._custody.leases.release(given.key.digest)
        else:
            await self._hibernation.forget(given.key)
        return True

    async def _in_memory(self, entry: Entry) -> Offer | None:
        custody, key = self._custody, entry.key
        async with entry.moving:
            if self._roster.find(key) is not entry:
                return None
            if entry.actor is not None:
                await custody.hands.to_keeper(entry, RecycleReason.MIGRATING, _WAIT_SECONDS)
            session = entry.session
            if session is None:
                return None
            move_id = uuid.uuid4().hex
            # Others who come for it find the lock free: they are told of at the session's gate.
            ref = await session.begin_hand_over(_WAIT_SECONDS, on_wanted=lambda: self._wanted(move_id))
        if isinstance(ref, Moved):
            return None
        segment = None
        try:
            stats, settings = session.describe(), custody.settings
            if not stats.num_waiting:
                segment = settings.segments.open(ref, settings.layout, settings.fingerprint)
                recorded = custody.recorded(key)
                offer = self._give(move_id, _of_segment(entry, segment, recorded), recorded, stats.idle_seconds)
                if offer is not None:
                    return offer
        except (SegmentGone, SegmentMismatch) as error:
            logger.warning("a session's memory cannot be moved: %s", error)
        finally:
            if move_id not in self._given:
                if segment is not None:
                    segment.close()
                session.cancel_hand_over()
        return None

    def _on_disk(self, key: SessionKey) -> Offer | None:
        found = self._hibernation.peek(key)
        if found is None:
            return None
        asleep, payload, recorded = found
        length = piece_nbytes(payload.nbytes)
        header = replace(payload.header, is_encrypted=False, nonce=os.urandom(8), piece_nbytes=length)
        given = _Given(key, OutgoingMemory(payload, header, payload.nbytes), asleep=asleep)
        # A file's age says how long nobody used it.
        idle = max(self._custody.settings.clock() - asleep.at, 0.0)
        return self._give(uuid.uuid4().hex, given, recorded, idle)

    def _give(self, move_id: str, given: _Given | None, recorded: Recorded, idle_seconds: float) -> Offer | None:
        if given is None:
            return None
        self._given[move_id] = given
        self._listen(move_id, given)
        return Offer(
            move_id,
            given.memory.packed,
            given.memory.num_pieces,
            idle_seconds,
            turns=recorded.turns if given.key.ephemeral else None,
            cache_hint=given.entry.cache_hint if given.entry is not None else None,
        )

    def _listen(self, move_id: str, given: _Given) -> None:
        if given.silence is not None:
            given.silence.cancel()
        loop = asyncio.get_running_loop()
        given.silence = loop.call_later(_SILENT_SECONDS, self._end, move_id, given)

    def _wanted(self, move_id: str) -> None:
        if (given := self._given.get(move_id)) is not None:
            self._end(move_id, given)

    def _end(self, move_id: str, given: _Given, *, taken: bool = False) -> bool:
        """Whether the session is here afterwards. Does not wait."""
        if given.is_over:
            return True
        given.is_over = True
        del self._given[move_id]
        self._taken.discard(given.key.digest)
        if given.silence is not None:
            given.silence.cancel()
        if given.entry is None:
            assert given.asleep is not None
            # Woken meanwhile: then its next turn is here.
            is_here = not (taken and self._hibernation.is_asleep(given.key, given.asleep))
        else:
            session, segment = given.entry.session, given.segment
            assert session is not None
            assert segment is not None
            is_here = not taken
            if taken:
                # Also for whoever still maps the memory.
                segment.clear()
                session.complete_hand_over()
            else:
                session.cancel_hand_over()
        given.close()
        return is_here


def _of_segment(entry: Entry, segment: Segment, recorded: Recorded) -> _Given | None:
    """None: no token of the conversation has keys and values."""
    # What an interrupted turn left behind the conversation is computed again if anybody reads on.
    num_tokens = min(segment.count_matching(recorded.token_ids), segment.num_computed_tokens)
    if num_tokens == 0:
        return None
    header = segment_header(segment, num_tokens, entry.key.digest, mark_of(recorded))
    payload = SegmentPayload(segment, num_tokens, num_tokens)
    nbytes = sum(length for _, length in segment.layout.used_ranges(num_tokens, num_tokens))
    return _Given(entry.key, OutgoingMemory(payload, header, nbytes), entry=entry, segment=segment)
