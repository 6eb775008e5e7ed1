"""One conversation: its memory, its record, and whose turn it is.

Owns: a KV segment, a transcript, a journal, and the gate that lets one turn in at a time. Knows nothing of
Ray, of networks, or of which process hosts it: an actor of its own, or the keeper. Clock, storage and the
liveness of processes are injected.

A turn: `begin_turn` takes the epoch in the journal, makes the segment hold exactly the stored ids, and lends
it; the borrower trims it to what it keeps and writes; `commit` records the turn and frees the gate, `abandon`
only frees it. Both mean that nobody writes into the segment any more. A turn all of whose writers are dead is
taken over by whoever waits; one that names no writers never is, because their death cannot be seen.

For one asyncio event loop. Methods that wait are coroutines and wait for the gate only; disk writes (about a
millisecond) are done in place.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from phi_cluster.cluster.errors import SessionBusy
from phi_cluster.cluster.messages import (
    JOURNAL_BEGIN,
    JOURNAL_COMMIT,
    WAITED,
    BeginTurn,
    CommitTurn,
    Moved,
    ProcessId,
    SegmentRef,
    SessionKey,
    Stretch,
    TurnGrant,
)
from phi_cluster.cluster.session.conversation import Conversation, name_digest
from phi_cluster.cluster.session.gate import Entry, Gate, GateTimeout
from phi_cluster.cluster.session.held_memory import HeldMemory
from phi_cluster.cluster.session.journal import Journal, JournalInfo, MemoryJournal
from phi_cluster.cluster.session.segment import Segment, SegmentGone, SegmentLayout, SegmentMismatch
from phi_cluster.cluster.session.transcript import Match

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SessionSettings:
    """What all sessions of a host share. `clock` is wall time in seconds; `poll_seconds` is how often those
    who wait for a turn look whether its writers still live, `segments` what makes and opens memory, `hold` what keeps
    another process's."""

    layout: SegmentLayout
    fingerprint: str
    clock: Callable[[], float]
    is_alive: Callable[[ProcessId], bool]
    poll_seconds: float = 0.05
    max_waiting: int = 64
    segments: type[Segment] = Segment
    hold: Callable[[SegmentRef], HeldMemory] = HeldMemory


@dataclass(frozen=True)
class SessionStats:
    """What can be told of a session. Sizes in bytes, times in seconds.

    `state`: "active", "handing_over", or "moved" (not here any more). `turns`, `activation` and `recycles`
    count over the session's life (see JournalInfo), `activation_turns` and `activation_age_seconds` over this
    incarnation. `recorded`: in the answer to a commit that was recorded, when and how long that took.
    """

    key: SessionKey
    state: str
    in_turn: bool
    num_waiting: int
    num_tokens: int
    num_computed_tokens: int
    kv_cache_bytes: int
    turns: int
    age_seconds: float
    idle_seconds: float
    activation: int
    recycles: int
    activation_turns: int
    activation_age_seconds: float
    recorded: Stretch | None = field(default=None, compare=False)


@dataclass(frozen=True)
class _Turn:
    # As the segment names it.
    claim: bytes
    epoch: int
    writers: tuple[ProcessId, ...]


class Session:
    """Made by `create`, `restore`, `take_over` or `adopt`."""

    def __init__(self, conversation: Conversation, settings: SessionSettings):
        """Takes the conversation over."""
        self.key = conversation.key
        self._conversation = conversation
        self._settings = settings
        self._gate = Gate(self._look, poll_seconds=settings.poll_seconds, max_waiting=settings.max_waiting)
        self._turn: _Turn | None = None
        self._state = "active"
        self._activated_at = self._last_used = settings.clock()
        self._activation_turns = 0
        # While the session is handed over: told of whoever wants it meanwhile.
        self._on_wanted: Callable[[], None] | None = None

    @classmethod
    def create(cls, journal: Journal, settings: SessionSettings, *, activate: bool = True) -> Session:
        """A new conversation. Raises ValueError if the journal holds turns: that one wants `restore`.

        `activate=False` for a host that only holds the session until its actor is up: no incarnation is
        counted.
        """
        session = cls.restore(journal, settings, activate=activate)
        if session._conversation.info.turns:
            session._leave()
            raise ValueError("the session's journal holds turns already")
        return session

    @classmethod
    def restore(cls, journal: Journal, settings: SessionSettings, *, activate: bool = True) -> Session:
        """The conversation as the journal has it, in new memory (whoever still maps the old one writes to
        nobody's).

        A turn that was under way may still be committed. Raises the journal's errors.
        """
        info = journal.activate(recycled=False) if activate else journal.info()
        segment = settings.segments.create(settings.layout, settings.fingerprint)
        return cls._built(segment, journal, settings, info)

    @classmethod
    def take_over(
        cls,
        ref: SegmentRef,
        journal: Journal,
        settings: SessionSettings,
        *,
        recycled: bool | None = True,
        last_used: float | None = None,
    ) -> Session:
        """The successor of an incarnation that is handing over, or that died: the same memory, still warm, and the turn
        that is under way in it (its incarnation died), if there is one.

        `recycled`: count it as a recycle (not when an actor takes a new session from the keeper; None: it is no new
        incarnation, because one keeper follows another). `last_used`: when the session had its last turn (changing
        hands is no use of it; default: now). The predecessor, or whoever else holds the memory, must hold on until this
        has returned. Raises SegmentGone or SegmentMismatch if the memory is not to be had (then `restore`), and the
        journal's errors.
        """
        segment = settings.segments.open(ref, settings.layout, settings.fingerprint)
        try:
            info = journal.info() if recycled is None else journal.activate(recycled=recycled)
        except BaseException:
            segment.close()
            raise
        session = cls._built(segment, journal, settings, info)
        if last_used is not None:
            session._last_used = last_used
        try:
            session._take_turn_over()
        except BaseException:
            segment.close()
            raise
        return session

    @classmethod
    def adopt(
        cls, segment: Segment, journal: Journal, settings: SessionSettings, *, last_used: float | None = None
    ) -> Session:
        """The conversation as the journal has it, in memory that holds keys and values of its beginning already: a
        copy, which nobody else has. Takes the segment over. No incarnation is counted; `last_used` as in `take_over`.
        Raises the journal's errors."""
        try:
            session = cls._built(segment, journal, settings, journal.info())
            if last_used is not None:
                session._last_used = last_used
            session._conversation.lay_tokens()
        except BaseException:
            segment.close()
            raise
        return session

    @classmethod
    def _built(cls, segment: Segment, journal: Journal, settings: SessionSettings, info: JournalInfo) -> Session:
        try:
            return cls(Conversation(segment, journal, settings.fingerprint, info), settings)
        except BaseException:
            segment.close()
            raise

    # A turn.

    async def begin_turn(self, request: BeginTurn) -> TurnGrant | Moved:
        """Wait for the session's turn and lend the segment, holding all stored ids (`num_tokens` of the
        grant).

        The borrower trims it to what it keeps: at least the grant's `num_kept_tokens`, more if the ids behind
        them agree with the prompt's. Moved if the session is not here (any more). Raises SessionBusy after
        `wait_seconds`, and the journal's errors.

        A request that reads on (`resume`) is told what is left of its reply; raises ReplyGone if that cannot be had.

        Whoever asks must take the answer even if its own client has gone, and then `abandon`; one that cannot
        know whether there was an answer calls `withdraw`, or asks again: one claim has one turn, the last one.
        """
        # Also of one whose answer was lost with who gave it.
        self.withdraw(request.attempt)
        clock, came = self._settings.clock, self._settings.clock()
        if not await self._enter(request.attempt, request.wait_seconds):
            return Moved(self.key)
        entered = clock()
        resumed = request.request_id if request.resume else None
        try:
            grant = self._conversation.begin(request.text, resumed, wants_ids=request.wants_ids)
            while self._is_borrowed():
                # An engine of an earlier turn came in before it could see the new epoch: its words go, when it has.
                await asyncio.sleep(self._settings.poll_seconds)
                grant = self._conversation.begin(request.text, resumed, wants_ids=request.wants_ids)
        except BaseException:
            self._gate.release()
            raise
        self._turn = _Turn(name_digest(request.attempt), grant.epoch, request.writers)
        # Also for whoever may have to take the session over.
        segment = self._conversation.segment
        segment.request, segment.claim = name_digest(request.request_id), self._turn.claim
        segment.committer = request.writers[0] if request.writers else None
        self._last_used = clock()
        told = {"request_id": request.request_id, "session": self.key.digest[:12]}
        logger.info("a turn has begun", extra=told)
        waited = Stretch(WAITED, came, max(entered - came, 0.0))
        begun = Stretch(JOURNAL_BEGIN, entered, max(self._last_used - entered, 0.0))
        return replace(grant, stretches=(waited, begun))

    def commit(self, turn: CommitTurn) -> SessionStats | Moved:
        """Record the turn durably and end it. A repeated commit changes nothing and gets the same answer.

        Raises StaleEpoch if the session was taken over since, ValueError if the numbers cannot be (nothing is
        stored then, and the turn goes on), and the journal's errors.
        """
        if self._state == "moved":
            return Moved(self.key)
        began, recorded = self._settings.clock(), None
        if self._conversation.record(turn):
            self._activation_turns += 1
            recorded = Stretch(JOURNAL_COMMIT, began, max(self._settings.clock() - began, 0.0))
            told = {"request_id": turn.request_id, "session": self.key.digest[:12], "outcome": turn.finish_reason}
            logger.info("a turn is recorded", extra=told | {"seconds": round(recorded.seconds, 6)})
        self.abandon(turn.epoch)
        return replace(self.describe(), recorded=recorded)

    def abandon(self, epoch: int) -> bool:
        """End a turn without recording it. What it wrote into the segment is dropped at the next turn. False
        if that turn is not under way (any more)."""
        if self._turn is None or self._turn.epoch != epoch:
            return False
        # What it wrote is recorded, or is to go.
        self._conversation.segment.request = None
        self._end_turn()
        return True

    async def lay_prompt(self, epoch: int, source: SegmentRef, num_tokens: int) -> int:
        """Before anybody writes in the turn of `epoch`, in a session that holds nothing yet: another session's first
        `num_tokens` tokens, with their keys and values, while that one's turn goes on. Returns how many have these
        now: fewer, or none, if the other's memory is not as it was; then the engine computes them. A lease must cover
        them, and the turn must not be ended meanwhile."""
        if self._turn is None or self._turn.epoch != epoch:
            return 0
        settings, segment = self._settings, self._conversation.segment
        try:
            other = settings.segments.open(source, settings.layout, settings.fingerprint)
        except (SegmentGone, SegmentMismatch):
            return 0
        try:
            await asyncio.to_thread(segment.copy_from, other, num_tokens)
        except (ValueError, OSError):
            return 0
        finally:
            other.close()
        return segment.num_computed_tokens

    def withdraw(self, claim: str) -> bool:
        """The attempt waits no more; if its turn had begun already, it is abandoned. False if there was
        neither."""
        if self._gate.withdraw(claim):
            return True
        if self._turn is not None and self._turn.claim == name_digest(claim):
            return self.abandon(self._turn.epoch)
        return False

    # The whole conversation.

    async def clear(self, wait_seconds: float = 30.0) -> SessionStats | Moved:
        """Forget the conversation: history, record and KV cache. The session goes on under its name, as new.

        Raises SessionBusy if a turn does not end in time, and the journal's errors.
        """
        if not await self._enter("clear", wait_seconds):
            return Moved(self.key)
        try:
            self._conversation.forget()
            self._last_used = self._settings.clock()
        finally:
            self._gate.release()
        return self.describe()

    def drop_cache(self) -> int:
        """Give the keys and values back but keep the conversation: its next turn computes them again. Returns
        the bytes freed; 0 if a turn (or hand-over) is under way."""
        if self._state != "active" or self._gate.held:
            return 0
        segment = self._conversation.segment
        before = segment.nbytes_resident
        segment.drop_kv()
        return before - segment.nbytes_resident

    def replace_segment(self) -> None:
        """Go on in new memory and end the turn under way, whose writers cannot be proven dead: they write
        into the old memory, which goes with them, and cannot commit any more. Raises the journal's errors."""
        if self._state != "active":
            raise ValueError("the session is being handed over, or was")
        settings = self._settings
        self._conversation.replace_segment(settings.segments.create(settings.layout, settings.fingerprint))
        if self._turn is not None:
            self._end_turn()

    @property
    def in_turn(self) -> bool:
        """Whether a turn, or anything else that keeps turns waiting, is under way."""
        return self._gate.held

    @property
    def memory_journal(self) -> MemoryJournal | None:
        """The journal, if it would die with this process."""
        journal = self._conversation.journal
        return journal if isinstance(journal, MemoryJournal) else None

    @property
    def memory(self) -> SegmentRef | None:
        """Where the memory can be opened for now; None once the session is not here."""
        return None if self._state == "moved" else self._conversation.segment.ref

    @property
    def last_prompt_chars(self) -> int:
        """Length of the last turn's rendered prompt: where its reply begins."""
        return self._conversation.transcript.last_prompt_chars

    def left_by(self, request_id: str) -> bool:
        """Whether what is last here is this request's reply, recorded or not, or is about to be."""
        return self._conversation.left_by(request_id)

    def match(self, text: str) -> Match:
        """How much of a prompt this conversation holds already (to find the one that a request continues)."""
        return self._conversation.transcript.match(text, self._settings.layout.max_model_len)

    def describe(self) -> SessionStats:
        """Statistics now. A turn whose writers have died is ended here too: nobody may ever ask for the next one."""
        self._reap()
        now = self._settings.clock()
        here = self._state != "moved"
        segment, info = self._conversation.segment, self._conversation.info
        return SessionStats(
            key=self.key,
            state=self._state,
            in_turn=self._turn is not None,
            num_waiting=self._gate.num_waiting,
            num_tokens=self._conversation.transcript.num_tokens,
            num_computed_tokens=segment.num_computed_tokens if here else 0,
            kv_cache_bytes=segment.nbytes_resident if here else 0,
            turns=info.turns,
            age_seconds=max(0.0, now - info.created_at),
            idle_seconds=0.0 if self._turn is not None else max(0.0, now - self._last_used),
            activation=info.activation,
            recycles=info.recycles,
            activation_turns=self._activation_turns,
            activation_age_seconds=max(0.0, now - self._activated_at),
        )

    def record(self) -> tuple[JournalInfo, list[CommitTurn]]:
        """What its own journal says: nobody else has that of an unnamed conversation."""
        return self._conversation.journal.info(), self._conversation.journal.load()

    def rest(self) -> None:
        """Close the journal's file until the next turn (for hosts, when a session has been idle for a
        while)."""
        self._conversation.journal.close()

    # The end of an incarnation.

    async def begin_hand_over(
        self, wait_seconds: float = 30.0, *, on_wanted: Callable[[], None] | None = None
    ) -> SegmentRef | Moved:
        """Wait for the turn under way (before all others who wait), let no other begin, and name the memory
        for the successor. Then `complete_hand_over` or `cancel_hand_over`, which `on_wanted` may do: it is called when
        somebody comes for the session meanwhile, who then need not wait. Raises SessionBusy."""
        if not await self._enter("hand over", wait_seconds, first=True):
            return Moved(self.key)
        try:
            self._conversation.journal.close()
            ref = self._conversation.segment.ref
        except BaseException:
            self._gate.release()
            raise
        self._state, self._on_wanted = "handing_over", on_wanted
        return ref

    def complete_hand_over(self) -> None:
        """The successor has the memory: let go. All who wait get Moved."""
        if self._state != "handing_over":
            raise ValueError("no hand-over is under way")
        self._leave()

    def cancel_hand_over(self) -> None:
        """No successor came: go on as before."""
        if self._state != "handing_over":
            raise ValueError("no hand-over is under way")
        self._state, self._on_wanted = "active", None
        self._gate.release()

    async def deactivate(self, wait_seconds: float = 0.0) -> None:
        """End this incarnation; the journal stays, the KV cache goes. All who wait get Moved. Raises
        SessionBusy if a turn does not end in time."""
        if await self._enter("deactivate", wait_seconds, first=True):
            self._leave()

    async def delete(self, wait_seconds: float = 30.0) -> None:
        """End the session: its pages are given back and its journal is deleted. All who wait get Moved.
        Raises SessionBusy if a turn does not end in time, and the journal's errors."""
        if not await self._enter("delete", wait_seconds, first=True):
            return
        try:
            self._conversation.journal.delete()
        except BaseException:
            self._gate.release()
            raise
        # Punched, not only let go: an engine that still maps the memory must not keep the conversation alive.
        self._conversation.segment.clear()
        self._leave()

    # Inside.

    async def _enter(self, name: str, wait_seconds: float, *, first: bool = False) -> bool:
        """True with the gate held, False if the session is not here."""
        try:
            entry = await self._gate.enter(name, wait_seconds, first=first)
        except GateTimeout:
            raise SessionBusy(
                "another turn of this session is running; try again when it has ended, or raise the wait"
            ) from None
        if entry is Entry.WITHDRAWN:
            raise SessionBusy("the request was withdrawn while it waited for the session")
        return entry is Entry.ENTERED

    def _look(self) -> None:
        """Somebody has come, or still waits."""
        if self._on_wanted is not None:
            self._on_wanted()
        self._reap()

    def _reap(self) -> None:
        """End the turn under way if all who may write are dead, also an engine that came into it later."""
        turn = self._turn
        if turn is None or not turn.writers:
            return
        if not self._is_borrowed() and not any(map(self._settings.is_alive, turn.writers)):
            self._end_turn()

    def _is_borrowed(self) -> bool:
        """Whether an engine that lives has the segment mapped to write to it."""
        writer = self._conversation.segment.writer
        return writer is not None and self._settings.is_alive(writer)

    def _take_turn_over(self) -> None:
        segment = self._conversation.segment
        if segment.request is None:
            self._conversation.lay_tokens()
        elif segment.committer is not None:
            # Its writers write: the memory stays as it is until they are through, or dead.
            self._turn = _Turn(segment.claim or b"", segment.epoch, (segment.committer,))
            self._gate.hold()

    def _end_turn(self) -> None:
        self._turn = None
        self._conversation.segment.committer = None
        self._conversation.segment.unshare()
        self._last_used = self._settings.clock()
        self._gate.release()

    def _leave(self) -> None:
        self._state, self._on_wanted = "moved", None
        # First those who wait: closing a file may fail.
        self._gate.close()
        self._conversation.close()
