"""Where a server's journals are: on its disk, or in a Redis that several servers share.

Owns: choosing, for every process that opens journals. Knows nothing of what is in them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from phi_cluster.cluster.messages import SessionKey
from phi_cluster.cluster.session.journal import Glance, Journal, Journals
from phi_cluster.cluster.session.sqlite_journal import SQLiteJournal, glance, journals_nbytes, list_sessions


@dataclass(frozen=True)
class JournalPlace:
    """`url`: of a Redis (it may hold a password, so it is not shown); None: files under `state_path`."""

    state_path: Path
    url: str | None = field(default=None, repr=False)


class SQLiteJournals:
    """Implements custody.Journals."""

    shared = False

    def __init__(self, state_path: Path, fingerprint: str, clock: Callable[[], float]):
        self._state_path = state_path
        self._fingerprint = fingerprint
        self._clock = clock

    def open(self, key: SessionKey) -> Journal:
        return SQLiteJournal(self._state_path, key, self._fingerprint, self._clock)

    def take_seat(self, key: SessionKey) -> None:
        """There is no other."""

    def keys(self) -> Iterable[SessionKey]:
        return list_sessions(self._state_path)

    def nbytes(self) -> int:
        return journals_nbytes(self._state_path)

    def glance(self, key: SessionKey) -> Glance | None:
        return glance(self._state_path, key)


def open_journals(place: JournalPlace, fingerprint: str, clock: Callable[[], float], node_id: str = "") -> Journals:
    """`clock`: wall time in seconds. `node_id`: where the turns begin that are begun in them."""
    if place.url is None:
        return SQLiteJournals(place.state_path, fingerprint, clock)
    # A quarter of a small process's memory, which most servers need not have.
    from phi_cluster.cluster.session.redis_journal import RedisJournals
    from phi_cluster.cluster.session.redis_server import RedisServer

    return RedisJournals(RedisServer(place.url), fingerprint, clock, node_id)
