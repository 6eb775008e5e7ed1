"""How one keeper follows another while turns go on: what is handed to the successor, and when.

Owns: who is in charge of a node (one process at a time, by a lock that ends with it), keeping calls out for the moment
in which everything changes hands, and the estate. Knows nothing of Ray, of what the calls are about, or of when to
renew.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from phi_cluster.cluster.errors import KeeperMoved
from phi_cluster.cluster.messages import ProcessId, SegmentRef, SessionKey
from phi_cluster.cluster.session.custody import Custody
from phi_cluster.cluster.session.journal import MemoryJournal
from phi_cluster.cluster.session.roster import Entry
from phi_cluster.cluster.session.segment import SegmentGone, SegmentMismatch
from phi_cluster.cluster.session.session import Session, SessionStats


class Charge(Protocol):
    """Being the keeper of a node: one process has it."""

    def take(self) -> bool:
        """Whether this process has it now."""
        ...

    def give(self) -> None:
        """Another may take it."""
        ...


class SoleCharge:
    """Of a keeper that there is only one of."""

    def take(self) -> bool:
        return True

    def give(self) -> None:
        """Nobody else wants it."""


class FileCharge:
    """A lock on a file: whoever dies has it no more."""

    def __init__(self, path: Path):
        self._path = path
        self._fd = -1

    def take(self) -> bool:
        """Raises OSError."""
        if self._fd >= 0:
            return True
        fd = os.open(self._path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            return False
        except BaseException:
            os.close(fd)
            raise
        self._fd = fd
        return True

    def give(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class Door:
    """Calls go through it. Shut, they wait in front of it; for good, they are sent to the successor."""

    def __init__(self) -> None:
        self._inside = 0
        self._empty = asyncio.Event()
        self._opened = asyncio.Event()
        self._opened.set()
        self.is_left = False

    @contextlib.asynccontextmanager
    async def inside(self) -> AsyncIterator[None]:
        """Raises KeeperMoved."""
        while not self._opened.is_set():
            await self._opened.wait()
        if self.is_left:
            raise KeeperMoved("the sessions of this node have another keeper; try again", retry_after=1)
        self._inside += 1
        self._empty.clear()
        try:
            yield
        finally:
            self._inside -= 1
            if not self._inside:
                self._empty.set()

    async def shut(self, seconds: float) -> bool:
        """Whether all who were inside came out in time; if not it is open again."""
        self._opened.clear()
        if not self._inside:
            return True
        try:
            await asyncio.wait_for(self._empty.wait(), seconds)
        except asyncio.TimeoutError:
            self._opened.set()
            return False
        return True

    def open(self) -> None:
        """Of all who waited, also."""
        self._opened.set()

    def leave(self) -> None:
        """For good."""
        self.is_left = True
        self._opened.set()


@dataclass(frozen=True)
class HeldSession:
    """One that the keeper has itself. `memory` is open for as long as that keeper lives; `journal` of unnamed ones."""

    key: SessionKey
    memory: SegmentRef
    last_used: float
    wants_actor: bool
    cache_hint: str | None
    journal: MemoryJournal | None


@dataclass(frozen=True)
class ActiveSession:
    """One that is with an actor; `memory` as the keeper holds it (None: it does not)."""

    key: SessionKey
    handle: Any
    process: ProcessId
    private_baseline: int
    last_stats: SessionStats
    memory: SegmentRef | None


@dataclass(frozen=True)
class Estate:
    """What a keeper leaves to its successor. `leases`: bytes by session; `in_turn`: those of them whose turn is under
    way. `rest`: what others of its rooms leave, by room."""

    held: list[HeldSession]
    active: list[ActiveSession]
    warm: list[tuple[Any, ProcessId]]
    stored: list[SessionKey]
    leases: dict[str, int]
    in_turn: set[str]
    rest: dict[str, Any] = field(default_factory=dict)


def bequeath(custody: Custody) -> Estate | None:
    """What there is, while no call is inside and none comes; None if something is changing hands. From then on nothing
    may change here, unless the successor does not come after all."""
    entries = list(custody.roster)
    if any(entry.moving.locked() for entry in entries):
        return None
    held, active = [], []
    for entry in entries:
        if entry.session is not None:
            held.append(_held(custody, entry, entry.session))
        else:
            assert entry.last_stats is not None
            memory = None if entry.memory is None else entry.memory.ref
            actor = entry.actor
            active.append(
                ActiveSession(entry.key, actor.handle, actor.process, entry.private_baseline, entry.last_stats, memory)
            )
    return Estate(
        held,
        active,
        custody.hands.leave_warm(),
        list(custody.roster.stored_keys()),
        *custody.leases.leave(),
    )


def inherit(custody: Custody, estate: Estate) -> None:
    """All of it; the predecessor lives until this has returned. A memory that cannot be had is computed again."""
    for key in estate.stored:
        custody.roster.add_stored(key)
    for active in estate.active:
        actor = custody.hands.known_actor(active.handle, active.process)
        entry = Entry(active.key, actor=actor, private_baseline=active.private_baseline, last_stats=active.last_stats)
        custody.hands.hold(entry, active.memory)
        custody.roster.adopt(entry)
    for one in estate.held:
        journal = one.journal or custody.journal(one.key)
        try:
            session = Session.take_over(one.memory, journal, custody.settings, recycled=None, last_used=one.last_used)
        except (SegmentGone, SegmentMismatch):
            journal.close()
            continue
        custody.roster.adopt(Entry(one.key, session=session, wants_actor=one.wants_actor, cache_hint=one.cache_hint))
    for handle, process in estate.warm:
        custody.hands.add_warm(handle, process)
    here = {entry.key.digest for entry in custody.roster}
    leases = {digest: nbytes for digest, nbytes in estate.leases.items() if digest in here}
    custody.leases.inherit(leases, estate.in_turn & here)


def _held(custody: Custody, entry: Entry, session: Session) -> HeldSession:
    memory = session.memory
    assert memory is not None
    return HeldSession(
        entry.key,
        memory,
        custody.settings.clock() - session.describe().idle_seconds,
        entry.wants_actor,
        entry.cache_hint,
        session.memory_journal,
    )
