"""What happens to the cluster, as its parts tell it: an engine died, a session was woken, a turn found no room.

Owns: the kinds of events, and the bounded log in which a process keeps its own until they are collected. Many of a kind
within a second are folded into one with a count, so that a storm costs no more than a breeze. Knows nothing of who
collects them (event_ring.py) and of how they are shown. No event says what a conversation is about.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import Enum
from itertools import islice

import msgpack

from phi_cluster.cluster.messages import SessionKey

# So many of a kind are told one by one within a second.
_EACH = 4


class EventKind(str, Enum):
    """The value is its name in the API."""

    CONTROLLER_STARTED = "controller_started"
    KEEPER_STARTED = "keeper_started"
    KEEPER_REPLACED = "keeper_replaced"
    KEEPER_HUNG = "keeper_hung"
    NODE_JOINED = "node_joined"
    NODE_REFUSED = "node_refused"
    NODE_DRAINING = "node_draining"
    NODE_RESTS = "node_rests"
    NODE_LOST = "node_lost"
    REPLICA_STARTED = "replica_started"
    REPLICA_LOST = "replica_lost"
    ENGINE_STARTED = "engine_started"
    ENGINE_DIED = "engine_died"
    ENGINE_TOOK_OVER = "engine_took_over"
    ENGINE_RECYCLED = "engine_recycled"
    STANDBY_ENGINE_DIED = "standby_engine_died"
    SESSION_ACTIVATED = "session_activated"
    SESSION_RECYCLED = "session_recycled"
    SESSION_DEACTIVATED = "session_deactivated"
    SESSION_ACTOR_DIED = "session_actor_died"
    SESSION_ACTOR_HUNG = "session_actor_hung"
    SESSION_HIBERNATED = "session_hibernated"
    SESSION_WOKEN = "session_woken"
    SESSION_MOVED = "session_moved"
    SESSION_FORKED = "session_forked"
    SESSION_IMPORTED = "session_imported"
    SESSION_CLEARED = "session_cleared"
    SESSION_DELETED = "session_deleted"
    MEMORY_GIVEN_WAY = "memory_given_way"
    TURN_REFUSED = "turn_refused"


_TEXTS = {
    EventKind.CONTROLLER_STARTED: "the controller started",
    EventKind.KEEPER_STARTED: "a keeper started",
    EventKind.KEEPER_REPLACED: "a keeper was replaced",
    EventKind.KEEPER_HUNG: "a keeper did not answer and was ended",
    EventKind.NODE_JOINED: "a node joined",
    EventKind.NODE_REFUSED: "a node could not be started",
    EventKind.NODE_DRAINING: "a node is leaving",
    EventKind.NODE_RESTS: "a node without replicas gave its keeper and weights back",
    EventKind.NODE_LOST: "a node is gone",
    EventKind.REPLICA_STARTED: "a replica started",
    EventKind.REPLICA_LOST: "a replica has fallen silent",
    EventKind.ENGINE_STARTED: "an engine started",
    EventKind.ENGINE_DIED: "an engine was lost",
    EventKind.ENGINE_TOOK_OVER: "an engine took over",
    EventKind.ENGINE_RECYCLED: "an engine was renewed",
    EventKind.STANDBY_ENGINE_DIED: "a standby engine was lost",
    EventKind.SESSION_ACTIVATED: "a session got an actor of its own",
    EventKind.SESSION_RECYCLED: "a session's actor was renewed",
    EventKind.SESSION_DEACTIVATED: "a session gave its actor back",
    EventKind.SESSION_ACTOR_DIED: "a session's actor died; the keeper has the session",
    EventKind.SESSION_ACTOR_HUNG: "a session's actor did not answer and was ended",
    EventKind.SESSION_HIBERNATED: "a session hibernated",
    EventKind.SESSION_WOKEN: "a session woke",
    EventKind.SESSION_MOVED: "a session moved here from another node",
    EventKind.SESSION_FORKED: "a session was forked",
    EventKind.SESSION_IMPORTED: "a session was imported",
    EventKind.SESSION_CLEARED: "a session was cleared",
    EventKind.SESSION_DELETED: "a session was deleted",
    EventKind.MEMORY_GIVEN_WAY: "a cache left memory for others",
    EventKind.TURN_REFUSED: "a turn was refused",
}


@dataclass(frozen=True)
class Event:
    """`number` counts the events of its log from 1; `time` is wall clock in seconds. `count`: so many happened within
    that second. `reason` says why, or how, in a word; `seconds` how long it took, where that matters. `key` is the
    session that it is about, if it is about a named one."""

    number: int
    time: float
    kind: EventKind
    count: int = 1
    reason: str | None = None
    seconds: float | None = None
    key: SessionKey | None = None

    @property
    def text(self) -> str:
        """One short line."""
        text = _TEXTS[self.kind]
        if self.reason is not None:
            text += f" ({self.reason})"
        if self.seconds is not None:
            text += f" after {self.seconds:.3f} s"
        return text if self.count == 1 else f"{text}, {self.count} more within a second"


def pack_event(event: Event) -> bytes:
    """To be kept: about a quarter of what the objects take."""
    key = None if event.key is None else (event.key.tenant, event.key.session_id)
    values = (event.number, event.time, event.kind.value, event.count, event.reason, event.seconds, key)
    packed: bytes = msgpack.packb(values)
    return packed


def unpack_event(packed: bytes) -> Event:
    number, at, kind, count, reason, seconds, key = msgpack.unpackb(packed)
    return Event(number, at, EventKind(kind), count, reason, seconds, None if key is None else SessionKey(*key))


class EventLog:
    """The last events of one process. `clock` is wall time in seconds. Belongs to one thread."""

    def __init__(self, clock: Callable[[], float], capacity: int = 512):
        self._clock = clock
        # With numbers without a gap, up to the last.
        self._packed: deque[bytes] = deque(maxlen=capacity)
        self._last = 0
        self._second = 0
        self._told: Counter[EventKind] = Counter()

    def add(
        self,
        kind: EventKind,
        key: SessionKey | None = None,
        *,
        reason: str | None = None,
        seconds: float | None = None,
    ) -> None:
        now = self._clock()
        if int(now) != self._second:
            self._fold()
            self._second = int(now)
        self._told[kind] += 1
        if self._told[kind] <= _EACH:
            named = key if key is not None and not key.ephemeral else None
            self._append(Event(0, now, kind, 1, reason, seconds, named))

    def after(self, number: int) -> list[Event]:
        """Those that are still known and have a greater number, oldest first."""
        self._fold()
        known = self._last - len(self._packed)
        return [unpack_event(one) for one in islice(self._packed, max(number - known, 0), None)]

    def _fold(self) -> None:
        """What was not told one by one."""
        for kind, count in self._told.items():
            if count > _EACH:
                self._append(Event(0, self._clock(), kind, count - _EACH))
                self._told[kind] = _EACH
        if int(self._clock()) != self._second:
            self._told.clear()

    def _append(self, event: Event) -> None:
        self._last += 1
        self._packed.append(pack_event(replace(event, number=self._last)))
