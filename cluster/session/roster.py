"""Which sessions a node has and who holds each: the keeper itself, an actor, or only the disk.

Owns: the entries and the ways to find them: by name, or, for a conversation that nobody named, by what it has said.
Knows nothing of Ray (an actor is an opaque object), leases or HTTP.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from phi_cluster.cluster.messages import SessionKey
from phi_cluster.cluster.session.held_memory import HeldMemory
from phi_cluster.cluster.session.session import Session, SessionStats


@dataclass
class Entry:
    """A session in memory: exactly one of `session` (held here) and `actor` is set.

    `moving` is locked while the session changes hands. `wants_actor`: it had a turn while the keeper held it.
    `private_baseline` is its actor's private memory in bytes when it took the session. `memory` is the actor's, held so
    that it is not lost with it. `silent_since`: the actor has not answered since then; `turn_began`: the keeper let a
    turn begin then (the loop's seconds).
    """

    key: SessionKey
    session: Session | None = None
    actor: Any = None
    moving: asyncio.Lock = field(default_factory=asyncio.Lock)
    wants_actor: bool = False
    private_baseline: int = 0
    last_stats: SessionStats | None = None
    memory: HeldMemory | None = None
    silent_since: float | None = None
    turn_began: float = 0.0
    # Of an unnamed conversation's last turn, as a digest: see turn_api.TurnRequest.
    cache_hint: str | None = None

    def hold(self, memory: HeldMemory | None) -> None:
        """The actor's memory is this one; None: there is no actor, or it cannot be held."""
        if self.memory is not None:
            self.memory.close()
        self.memory = memory


class Roster:
    """For one event loop. `open_session(key)` makes a Session from its journal, or a new one."""

    def __init__(self, open_session: Callable[[SessionKey], Session], max_ephemeral: int):
        self._open_session = open_session
        self._max_ephemeral = max_ephemeral
        self._entries: dict[str, Entry] = {}
        # Named sessions with a journal, by tenant and name: also those that only the disk holds.
        self._named: dict[str, dict[str, SessionKey]] = {}
        # Told of a named session that comes to be or into memory, and of one that is deleted.
        self.on_change: Callable[[SessionKey], None] = lambda key: None

    def __iter__(self) -> Iterator[Entry]:
        return iter(list(self._entries.values()))

    def add_stored(self, key: SessionKey) -> None:
        """A journal exists for this key."""
        if not key.ephemeral:
            self._named.setdefault(key.tenant, {})[key.session_id] = key
            self.on_change(key)

    def adopt(self, entry: Entry) -> None:
        """An entry that exists already (its actor outlived a keeper)."""
        self._entries[entry.key.digest] = entry
        self.add_stored(entry.key)

    def find(self, key: SessionKey) -> Entry | None:
        """The entry, if the session is in memory."""
        return self._entries.get(key.digest)

    def is_known(self, key: SessionKey) -> bool:
        """Whether there is such a session, in memory or on disk."""
        stored = not key.ephemeral and key.session_id in self._named.get(key.tenant, {})
        return stored or key.digest in self._entries

    def named(self, tenant: str) -> Mapping[str, SessionKey]:
        """A tenant's sessions by name, in memory or on disk; a view, not to be kept."""
        return self._named.get(tenant, {})

    def stored_keys(self) -> Iterator[SessionKey]:
        for names in list(self._named.values()):
            yield from list(names.values())

    def open(self, key: SessionKey) -> Entry:
        """The session's entry; one that is not in memory is opened here. Raises the journal's errors."""
        entry = self._entries.get(key.digest)
        if entry is None:
            entry = Entry(key, session=self._open_session(key))
            self.adopt(entry)
        return entry

    def left_by(self, tenant: str, request_id: str) -> Entry | None:
        """The tenant's unnamed conversation in which this request's reply is the last, complete or not."""
        for entry in self._entries.values():
            if not entry.key.ephemeral or entry.key.tenant != tenant or entry.session is None:
                continue
            if entry.session.left_by(request_id):
                return entry
        return None

    def continue_or_open(self, tenant: str, text: str, hint: str | None = None) -> Entry:
        """The tenant's idle unnamed conversation that `text` goes on with, else a new one.

        It goes on with a conversation if it repeats all of it, at least up to the last reply: whoever shares no more
        than a beginning must not take another's cache away. Of two that it repeats equally it is the one whose last
        turn had the same hint.
        """
        best: tuple[tuple[int, bool], Entry] | None = None
        for entry in self._entries.values():
            session = entry.session
            if session is None or not entry.key.ephemeral or entry.key.tenant != tenant or session.in_turn:
                continue
            kept = session.match(text).num_kept_chars
            rank = (kept, hint is not None and entry.cache_hint == hint)
            if kept > 0 and kept >= session.last_prompt_chars and (best is None or rank > best[0]):
                best = (rank, entry)
        found = self.open(SessionKey(tenant, uuid.uuid4().hex, ephemeral=True)) if best is None else best[1]
        found.cache_hint = hint
        return found

    def surplus_ephemeral(self) -> list[Entry]:
        """Unnamed conversations beyond the number to keep, longest idle first; never one in a turn."""
        idle = [e for e in self._entries.values() if e.key.ephemeral and e.session and not e.session.in_turn]
        count = sum(e.key.ephemeral for e in self._entries.values())
        idle.sort(key=lambda e: -e.session.describe().idle_seconds if e.session else 0.0)
        return idle[: max(count - self._max_ephemeral, 0)]

    def forget_stored(self, key: SessionKey) -> None:
        """The journal of a session that is not in memory is gone."""
        self.on_change(key)
        names = self._named.get(key.tenant, {})
        names.pop(key.session_id, None)
        if not names:
            self._named.pop(key.tenant, None)

    def forget(self, entry: Entry, *, deleted: bool) -> None:
        """The session is not in memory any more; `deleted`: nor on disk. An entry that is here no more changes
        nothing: the session may have been opened again since."""
        if self._entries.get(entry.key.digest) is not entry:
            return
        entry.hold(None)
        del self._entries[entry.key.digest]
        if deleted and not entry.key.ephemeral:
            self.forget_stored(entry.key)
