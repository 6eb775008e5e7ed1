"""Sessions that move here from other nodes: their memory is fetched from the keeper that has it, checked, and taken
over as if it had been woken; only then the other one lets go.

Owns: the order of a move, and what came of it. The journal decides, as for a hibernated cache: what is not of its
latest state when all has come is thrown away. A move is an optimisation: where anything is wrong, the session stays
where it is, and its next turn is computed, from the journal. Knows nothing of who wants a session moved, and of how it
is offered (offers.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from enum import Enum
from typing import Any

from ray.exceptions import RayError

from phi_cluster.cluster.errors import PhiError, SessionBusy
from phi_cluster.cluster.events import EventKind
from phi_cluster.cluster.messages import Moved, SessionKey
from phi_cluster.cluster.session.custody import Custody
from phi_cluster.cluster.session.hibernation import Hibernation, mark_of
from phi_cluster.cluster.session.hibernation_file import BadHibernation, HibernationHeader
from phi_cluster.cluster.session.journal import Journal, MemoryJournal
from phi_cluster.cluster.session.moving_memory import IncomingMemory
from phi_cluster.cluster.session.moving_policy import MoveSpeed, is_worth_moving
from phi_cluster.cluster.session.offers import Offer
from phi_cluster.cluster.session.recycler import RecycleReason
from phi_cluster.cluster.session.roster import Entry
from phi_cluster.cluster.session.segment import Segment
from phi_cluster.cluster.session.session import Session

logger = logging.getLogger(__name__)

# A keeper that does not answer for so long is gone, or its link too slow to move anything.
_ANSWER_SECONDS = 10.0
# Pieces of a session on their way at the same time, and sessions.
_PIECES_AT_ONCE = 2
_MOVES_AT_ONCE = 2


class MoveResult(str, Enum):
    """What became of a session that was to move. The values are metric labels."""

    MOVED = "moved"
    # It was here already, as warm as there.
    HERE = "here"
    # It is not there, or in use, there or here.
    REFUSED = "refused"
    # Computing it is sooner done.
    NOT_WORTH = "not_worth"
    NO_ROOM = "no_room"
    # A turn has begun, or it was deleted, while it was under way.
    STALE = "stale"
    # The other keeper died or fell silent, or something came that was not what was sent.
    FAILED = "failed"
    # Of a node that is given up: left to its journal.
    LEFT = "left"


class _Ended(Exception):
    """The other keeper has ended the move: somebody wants the session there."""


class Moves:
    """For one event loop. `peers(node_id)` finds a node's keeper, or raises ValueError; `monotonic` gives seconds, to
    measure with."""

    def __init__(
        self,
        custody: Custody,
        hibernation: Hibernation,
        peers: Callable[[str], Any],
        monotonic: Callable[[], float] = time.monotonic,
    ):
        self._custody = custody
        self._hibernation = hibernation
        self._roster = custody.roster
        self._peers = peers
        self._monotonic = monotonic
        self._coming: dict[str, asyncio.Task[bool]] = {}
        self._at_once = asyncio.Semaphore(_MOVES_AT_ONCE)
        self.speed = MoveSpeed()

    @property
    def num_coming(self) -> int:
        return len(self._coming)

    async def move_here(self, key: SessionKey, source_node_id: str, *, always: bool = False) -> bool:
        """Whether the session's memory is here now, with the state that its journal had. `always`: also if computing it
        would be sooner done. Never raises: the session's next turn is computed where False is the answer. Asked twice
        at the same time it is one move."""
        digest = key.digest
        if digest not in self._coming:
            task = self._coming[digest] = asyncio.ensure_future(self._move(key, source_node_id, always))
            task.add_done_callback(lambda _: self._coming.pop(digest, None))
        # Whoever asked may leave: what has begun is brought to an end.
        return await asyncio.shield(self._coming[digest])

    async def arrived(self, key: SessionKey) -> None:
        """Waits for the session if it is on its way here: its next turn is warm then."""
        if (coming := self._coming.get(key.digest)) is not None:
            await asyncio.wait((coming,))

    async def _move(self, key: SessionKey, source_node_id: str, always: bool) -> bool:
        result = MoveResult.FAILED
        try:
            async with self._at_once:
                result = await self._ask(key, source_node_id, always)
        except SessionBusy:
            result = MoveResult.REFUSED
        except _Ended:
            result = MoveResult.STALE
        except (PhiError, RayError, asyncio.TimeoutError, BadHibernation, OSError) as error:
            logger.warning("a session was not moved: %s", error)
        except Exception:
            # Whatever it is: who asked goes on without.
            logger.exception("a session was not moved")
        self._custody.metrics.on_move(result.value)
        return result in (MoveResult.MOVED, MoveResult.HERE)

    async def _ask(self, key: SessionKey, source_node_id: str, always: bool) -> MoveResult:
        try:
            source = self._peers(source_node_id)
        except ValueError:
            return MoveResult.FAILED
        offer: Offer | None = await asyncio.wait_for(source.offer.remote(key), _ANSWER_SECONDS)
        if offer is None:
            return MoveResult.REFUSED
        result = MoveResult.FAILED
        try:
            result = await self._take(key, source, offer, always)
        finally:
            taken = result in (MoveResult.MOVED, MoveResult.HERE)
            try:
                await asyncio.wait_for(source.let_go.remote(offer.move_id, taken), _ANSWER_SECONDS)
            except (PhiError, RayError, asyncio.TimeoutError, OSError) as error:
                # It ends the offer by itself after a while. Two may have the same memory then; the epoch tells them.
                logger.info("a keeper was not told what became of a session: %s", type(error).__name__)
        return result

    async def _take(self, key: SessionKey, source: Any, offer: Offer, always: bool) -> MoveResult:
        custody, settings = self._custody, self._custody.settings
        header = HibernationHeader.unpack(offer.packed)
        if not self._exists(key):
            return MoveResult.STALE
        if await self._has(key, header):
            return MoveResult.HERE
        layout, tokens_per_second = settings.layout, self._hibernation.policy.tokens_per_second
        nbytes = layout.nbytes_used(header.num_tokens, header.num_computed_tokens)
        if not always and not is_worth_moving(
            header.num_computed_tokens, nbytes, self.speed.bytes_per_second, tokens_per_second
        ):
            return MoveResult.NOT_WORTH
        lease = f"move {offer.move_id}"
        segment = None
        try:
            if not await custody.leases.take(lease, nbytes):
                return MoveResult.NO_ROOM
            began = self._monotonic()
            segment = settings.segments.create(layout, settings.fingerprint)
            incoming = IncomingMemory(offer.packed, segment, key.digest)
            await self._pull(source, offer, incoming)
            incoming.finish()
            if not await self._make_way(key):
                return MoveResult.REFUSED
            seconds = self._monotonic() - began
            # From here to the session's entry nothing waits.
            journal = self._journal(key, offer, incoming.header, segment)
            if journal is None:
                return MoveResult.STALE
            taken, segment = segment, None
            self._enter(key, offer, taken, journal, seconds)
        finally:
            if segment is not None:
                segment.close()
            custody.leases.release(lease)
        self.speed.moved(incoming.nbytes, seconds)
        custody.metrics.on_arrived(incoming.nbytes, seconds)
        await self._hibernation.forget(key)
        return MoveResult.MOVED

    def _exists(self, key: SessionKey) -> bool:
        """Whether it has not been deleted: asking its journal for more would make it anew."""
        return key.ephemeral or self._custody.journals.glance(key) is not None

    async def _has(self, key: SessionKey, header: HibernationHeader) -> bool:
        """Whether what is in memory here (the answer to an earlier move was lost, or it was here before) is as good.
        Raises SessionBusy, and what a hand-over raises."""
        entry = self._roster.find(key)
        if entry is None:
            return False
        custody, settings = self._custody, self._custody.settings
        async with entry.moving:
            if self._roster.find(key) is not entry:
                return False
            async with custody.hands.lent(entry, 0.0) as ref:
                if isinstance(ref, Moved):
                    return False
                segment = settings.segments.open(ref, settings.layout, settings.fingerprint)
                try:
                    matching = segment.count_matching(custody.recorded(key).token_ids)
                    return min(matching, segment.num_computed_tokens) >= header.num_computed_tokens
                finally:
                    segment.close()

    async def _pull(self, source: Any, offer: Offer, incoming: IncomingMemory) -> None:
        """Raises _Ended, BadHibernation, OSError, and what a call raises. No thread writes any more then."""
        numbers = iter(range(incoming.num_pieces))
        is_over = False

        async def pull() -> None:
            nonlocal is_over
            try:
                for number in numbers:
                    if is_over:
                        return
                    piece = await asyncio.wait_for(source.piece.remote(offer.move_id, number), _ANSWER_SECONDS)
                    if piece is None:
                        raise _Ended
                    await asyncio.to_thread(incoming.write, number, piece.data)
                    # Not while the next one comes: it lies in the object store.
                    del piece
            except BaseException:
                is_over = True
                raise

        pulls = [pull() for _ in range(_PIECES_AT_ONCE)]
        for outcome in await asyncio.gather(*pulls, return_exceptions=True):
            if outcome is not None:
                raise outcome

    async def _make_way(self, key: SessionKey) -> bool:
        """What is in memory here of the session is older: it goes. False if it is in use."""
        entry = self._roster.find(key)
        if entry is None:
            return True
        async with entry.moving:
            if self._roster.find(key) is entry:
                if entry.actor is not None:
                    await self._custody.hands.to_keeper(entry, RecycleReason.MIGRATING, 0.0)
                if entry.session is None:
                    return False
                await entry.session.deactivate(0.0)
                self._roster.forget(entry, deleted=False)
                self._custody.leases.release(key.digest)
        return self._roster.find(key) is None

    def _journal(self, key: SessionKey, offer: Offer, header: HibernationHeader, segment: Segment) -> Journal | None:
        """The session's, if the memory is of its latest state; None: it is not. Raises the journal's errors."""
        custody, settings = self._custody, self._custody.settings
        if key.ephemeral:
            journal = MemoryJournal(key, settings.fingerprint, settings.clock)
            journal.fill(offer.turns or [], settings.fingerprint)
            return journal
        if not self._exists(key):
            return None
        recorded = custody.recorded(key)
        if mark_of(recorded) != header.mark or segment.count_matching(recorded.token_ids) != segment.num_tokens:
            return None
        return custody.journal(key)

    def _enter(self, key: SessionKey, offer: Offer, segment: Segment, journal: Journal, seconds: float) -> None:
        custody, settings = self._custody, self._custody.settings
        last_used = settings.clock() - offer.idle_seconds
        session = Session.adopt(segment, journal, settings, last_used=last_used)
        entry = Entry(key, session=session, cache_hint=offer.cache_hint)
        self._roster.adopt(entry)
        custody.settle(entry, session.describe())
        custody.events.add(EventKind.SESSION_MOVED, key, seconds=seconds)
        if not key.ephemeral:
            # Where it cannot be told, the next turn that begins here tells it.
            with contextlib.suppress(PhiError):
                custody.journals.take_seat(key)
