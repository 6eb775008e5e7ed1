"""What every journal of a conversation does, its errors, and the one that keeps nothing: for unnamed
conversations.

Owns: the protocol, and who may write: the epoch is taken here by whoever begins a turn, and a commit with any
other is refused. Knows nothing of segments, actors or what the ids mean.

A journal holds what the transcript is made of and nothing else: a turn of which later turns left nothing (the
client edited its history before it) is dropped with the commit that supersedes it, so a journal is about as
large as the conversation, however often that is rewritten.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from phi_cluster.cluster.errors import PhiError, StaleEpoch, Unavailable
from phi_cluster.cluster.messages import CommitTurn, SessionKey

# A moment before the first journal.
_EPOCHS_SINCE = 1_700_000_000


class JournalCorrupt(PhiError):
    """The journal's file is damaged, or is something else: the conversation cannot be read."""

    code = "journal_corrupt"
    told = "this session's record is damaged; the server's log says more. Delete the session to begin anew"


class JournalTooNew(PhiError):
    """A later version of this program wrote the journal: this one would damage it."""

    code = "journal_too_new"
    told = "a later version of this server wrote the session's record; this one cannot go on with it"


class JournalFull(Unavailable):
    """The disk is full: nothing was written."""

    code = "journal_full"
    told = "the server's disk is full: the turn was not recorded; try again later"


class JournalUnavailable(Unavailable):
    """The journal cannot be read or written just now (locked by another process, an I/O error,
    permissions)."""

    code = "journal_unavailable"
    told = "the session's record cannot be read or written just now; try again"


@dataclass(frozen=True)
class JournalInfo:
    """What a journal knows besides its turns.

    `turns` counts all commits ever made (also those since superseded; `clear` resets it); `activation` and
    `recycles` count the session's incarnations, and those of them that succeeded a living one by policy;
    `fingerprint` is the model whose ids the turns hold; `created_at` is wall clock in seconds. `seat`: the node that
    began the last turn (of `take_epoch`: the one before that), where several share the journal; None: not known.
    """

    epoch: int
    turns: int
    activation: int
    recycles: int
    fingerprint: str
    created_at: float
    seat: str | None = None


@dataclass(frozen=True)
class Glance:
    """What can be told of a journal without reading its turns. `last_used`: when it was made or had its last turn,
    whichever was later; it and `created_at` are wall clock in seconds. The rest as in `JournalInfo`."""

    num_tokens: int
    turns: int
    activation: int
    recycles: int
    created_at: float
    last_used: float
    seat: str | None = None


class Journal(Protocol):
    """All methods block, may raise the errors of this file, and are called by one thread."""

    key: SessionKey

    def info(self) -> JournalInfo: ...

    def activate(self, *, recycled: bool) -> JournalInfo:
        """A new incarnation of the session begins (`recycled`: it succeeds one that handed over)."""
        ...

    def take_epoch(self) -> JournalInfo:
        """Raise the epoch by one: from now on no commit with an earlier one is accepted."""
        ...

    def commit(self, turn: CommitTurn) -> bool:
        """Store the turn durably, all or nothing. True if it was, False if the same request's commit is there
        already (a retry). Raises StaleEpoch if a later turn has begun or another request used this epoch."""
        ...

    def load(self) -> list[CommitTurn]:
        """The stored turns, oldest first."""
        ...

    def fill(self, turns: Sequence[CommitTurn], fingerprint: str) -> None:
        """Make the journal, which must not be there yet, with turns of another session (oldest first) and the
        fingerprint of the model whose ids they hold: durably, all or nothing. Its epoch is beyond theirs. Raises
        ValueError if there is a journal."""
        ...

    def clear(self) -> None:
        """Drop all turns. The epoch goes on from where it is."""
        ...

    def delete(self) -> None:
        """Drop everything. Used again, the journal is a new one."""
        ...

    def close(self) -> None:
        """Let go of files and memory that an idle session does not need; the next use takes them again."""
        ...


class Journals(Protocol):
    """All durable journals that a node's sessions have. `shared`: other nodes' sessions have theirs there, too."""

    @property
    def shared(self) -> bool: ...

    def open(self, key: SessionKey) -> Journal: ...

    def take_seat(self, key: SessionKey) -> None:
        """The session's memory has been brought to this node: its turns belong here from now on, before the first has
        begun. Changes nothing where nobody shares the journals, or where there is none. Raises the errors of this
        file."""
        ...

    def keys(self) -> Iterable[SessionKey]:
        """Of all that there are. Called in a thread."""
        ...

    def nbytes(self) -> int:
        """Disk that all of them take. Called in a thread."""
        ...

    def glance(self, key: SessionKey) -> Glance | None:
        """What can be told of a session without reading its turns; None: there is no journal that could be read. Makes
        none. Called in a thread too."""
        ...


def stale_epoch(turn: CommitTurn, epoch: int) -> StaleEpoch:
    """The error for a commit that came too late."""
    return StaleEpoch(
        f"the turn's epoch is {turn.epoch} and the session's is {epoch} by now: another turn took it over"
    )


def first_epoch(now: float) -> int:
    """Where a new journal begins to count: above all epochs of a deleted one of the same name, so that none of its
    turns is taken for a new one's (no session has a thousand turns a second). `now`: wall clock, seconds."""
    return max(int((now - _EPOCHS_SINCE) * 1000), 0)


def filled(turns: Sequence[CommitTurn], fingerprint: str, now: float) -> JournalInfo:
    """What a journal knows that is made of another session's turns at `now` (wall clock, seconds)."""
    # No epoch twice, also if the clock was set back.
    epoch = max([first_epoch(now), *(turn.epoch + 1 for turn in turns)])
    return JournalInfo(epoch, len(turns), 0, 0, fingerprint, now)


def supersedes(later: CommitTurn, earlier: CommitTurn) -> bool:
    """Whether nothing of `earlier` is left once `later` is applied: it is cut off before `earlier` begins."""
    return later.num_kept_chars <= earlier.num_kept_chars and later.num_kept_tokens <= earlier.num_kept_tokens


class MemoryJournal:
    """A journal that dies with its process: unnamed conversations, and tests."""

    def __init__(self, key: SessionKey, fingerprint: str, clock: Callable[[], float]):
        self.key = key
        self._fingerprint = fingerprint
        self._clock = clock
        self._turns: list[CommitTurn] = []
        self._info = JournalInfo(first_epoch(clock()), 0, 0, 0, fingerprint, clock())

    def info(self) -> JournalInfo:
        return self._info

    def activate(self, *, recycled: bool) -> JournalInfo:
        self._info = replace(self._info, activation=self._info.activation + 1, recycles=self._info.recycles + recycled)
        return self._info

    def take_epoch(self) -> JournalInfo:
        self._info = replace(self._info, epoch=self._info.epoch + 1)
        return self._info

    def commit(self, turn: CommitTurn) -> bool:
        same_epoch = [stored for stored in self._turns if stored.epoch == turn.epoch]
        if same_epoch and same_epoch[0].request_id == turn.request_id:
            return False
        if same_epoch or turn.epoch != self._info.epoch:
            raise stale_epoch(turn, self._info.epoch)
        self._turns = [stored for stored in self._turns if not supersedes(turn, stored)] + [turn]
        self._info = replace(self._info, turns=self._info.turns + 1, fingerprint=self._fingerprint)
        return True

    def load(self) -> list[CommitTurn]:
        return list(self._turns)

    def fill(self, turns: Sequence[CommitTurn], fingerprint: str) -> None:
        if self._turns or self._info.activation or self._info.turns:
            raise ValueError("the journal is not new")
        self._turns = [replace(turn, key=self.key) for turn in turns]
        self._info = filled(turns, fingerprint, self._clock())

    def clear(self) -> None:
        self._turns = []
        self._info = replace(self._info, turns=0)

    def delete(self) -> None:
        self._turns = []
        self._info = JournalInfo(first_epoch(self._clock()), 0, 0, 0, self._fingerprint, self._clock())

    def close(self) -> None:
        pass
