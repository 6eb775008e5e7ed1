"""The process of one active session: it owns the session's KV segment and journal.

Owns: at most one `Session`, from `activate` until it has handed over. Knows nothing of engines, networks, text or when
to recycle; the keeper tells it what to take and when to let go. Small on purpose (no torch): there are many.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import ray

from phi_cluster.cluster.errors import Unavailable
from phi_cluster.cluster.logs import log_as
from phi_cluster.cluster.messages import (
    BeginTurn,
    CommitTurn,
    Moved,
    ProcessId,
    SegmentRef,
    SessionKey,
    TurnGrant,
)
from phi_cluster.cluster.processes import is_alive, process_id
from phi_cluster.cluster.session.journal import Journal
from phi_cluster.cluster.session.journals import JournalPlace, open_journals
from phi_cluster.cluster.session.segment import SegmentLayout
from phi_cluster.cluster.session.session import Session, SessionSettings, SessionStats


def session_settings(layout: SegmentLayout, fingerprint: str) -> SessionSettings:
    """Settings with the real clock and the real process table."""
    return SessionSettings(layout, fingerprint, time.time, is_alive)


@dataclass(frozen=True)
class Held:
    """A process and the session that it has, with its memory; None: it has none."""

    process: ProcessId
    key: SessionKey | None = None
    stats: SessionStats | None = None
    memory: SegmentRef | None = None


class SessionHost:
    """Every method answers `Moved` for a session that is not here. `journal` opens a session's."""

    def __init__(self, settings: SessionSettings, journal: Callable[[SessionKey], Journal], process: ProcessId):
        self._settings = settings
        self._journal = journal
        self._process = process
        self._session: Session | None = None

    async def process(self) -> ProcessId:
        return self._process

    async def activate(
        self, process: ProcessId, key: SessionKey, ref: SegmentRef, recycled: bool, last_used: float
    ) -> SessionStats:
        """Takes the session over from a process that is handing over; that one must hold on until this returns.

        `process`: who is to take it. Raises Unavailable if that is not this one (it has died, and its actor was
        restarted here: nobody would know who has the session), SegmentGone or SegmentMismatch, and the journal's
        errors.
        """
        if process != self._process:
            raise Unavailable("the session's actor was restarted; try again", retry_after=1)
        journal = self._journal(key)
        self._session = Session.take_over(ref, journal, self._settings, recycled=recycled, last_used=last_used)
        return self._session.describe()

    async def held(self) -> Held:
        """What is here, for a keeper that was restarted."""
        session = self._session
        if session is None:
            return Held(self._process)
        return Held(self._process, session.key, session.describe(), session.memory)

    async def begin_turn(self, request: BeginTurn) -> TurnGrant | Moved:
        session = self._find(request.key)
        return await session.begin_turn(request) if session else Moved(request.key)

    async def commit(self, commit: CommitTurn) -> SessionStats | Moved:
        session = self._find(commit.key)
        return session.commit(commit) if session else Moved(commit.key)

    async def abandon(self, key: SessionKey, epoch: int) -> SessionStats | Moved:
        session = self._find(key)
        if session is None:
            return Moved(key)
        session.abandon(epoch)
        return session.describe()

    async def withdraw(self, key: SessionKey, claim: str) -> bool | Moved:
        session = self._find(key)
        return session.withdraw(claim) if session else Moved(key)

    async def clear(self, key: SessionKey, wait_seconds: float) -> SessionStats | Moved:
        session = self._find(key)
        return await session.clear(wait_seconds) if session else Moved(key)

    async def delete(self, key: SessionKey, wait_seconds: float) -> bool | Moved:
        session = self._find(key)
        if session is None:
            return Moved(key)
        await session.delete(wait_seconds)
        return True

    async def drop_cache(self, key: SessionKey) -> int | Moved:
        session = self._find(key)
        return session.drop_cache() if session else Moved(key)

    async def describe(self, key: SessionKey) -> SessionStats | Moved:
        session = self._find(key)
        return session.describe() if session else Moved(key)

    async def begin_hand_over(self, key: SessionKey, wait_seconds: float) -> SegmentRef | Moved:
        session = self._find(key)
        return await session.begin_hand_over(wait_seconds) if session else Moved(key)

    async def complete_hand_over(self, key: SessionKey) -> None:
        session = self._find(key)
        if session is not None:
            session.complete_hand_over()

    async def cancel_hand_over(self, key: SessionKey) -> None:
        session = self._find(key)
        if session is not None:
            session.cancel_hand_over()

    def _find(self, key: SessionKey) -> Session | None:
        return self._session if self._session is not None and self._session.key == key else None


@ray.remote(num_cpus=0)
class SessionActor(SessionHost):
    """The host in a process of its own."""

    def __init__(self, layout: SegmentLayout, fingerprint: str, place: JournalPlace):
        log_as("session_actor")
        settings = session_settings(layout, fingerprint)
        journals = open_journals(place, fingerprint, settings.clock, ray.get_runtime_context().get_node_id())
        super().__init__(settings, journals.open, process_id())
