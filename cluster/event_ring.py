"""The events of all processes, in one numbered ring.

Owns: the numbers, and who waits for the next one. Numbers begin at the clock, so that they go on rising when the
controller is replaced; its successor collects anew what the others still know, under new numbers but the same ids.
Knows nothing of Ray, HTTP, or of what the events are about.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

from phi_cluster.cluster.events import Event, pack_event, unpack_event
from phi_cluster.cluster.watch_api import EventPage


@dataclass
class _Source:
    """A process that tells of events; `seen`: the number, in its own log, of the last one it has told."""

    name: str
    node_id: str
    seen: int = 0


class _Collected(NamedTuple):
    """As little as can be: the ring is most of what a controller gathers in its first days."""

    source: _Source
    packed: bytes


class EventRing:
    """For one event loop. `clock` is wall time in seconds."""

    def __init__(self, clock: Callable[[], float], capacity: int = 2000):
        # With numbers without a gap, up to the last.
        self._collected: deque[_Collected] = deque(maxlen=capacity)
        # No ring gets a thousand events a second for long: see events.py.
        self._last = int(clock() * 1000)
        self._sources: dict[str, _Source] = {}
        self._news = asyncio.Event()
        self._closed = False

    def seen(self, source: str) -> int:
        """The number, in its own log, of the last event that this source has told."""
        known = self._sources.get(source)
        return 0 if known is None else known.seen

    def take(self, source: str, node_id: str, events: Iterable[Event]) -> None:
        """What a source tells, oldest first; what it has told before is left out. `source` names one process, and no
        later one."""
        known = self._sources.setdefault(source, _Source(source, node_id))
        for event in events:
            if event.number > known.seen:
                known.seen = event.number
                self._last += 1
                self._collected.append(_Collected(known, pack_event(event)))
                self._news.set()

    def forget(self, source: str) -> None:
        """It is gone for sure and will not tell anything any more."""
        self._sources.pop(source, None)

    def close(self) -> None:
        """Nobody waits any more: the cluster is about to end."""
        self._closed = True
        self._news.set()

    async def page(self, after: int | None, limit: int, tenant: str | None, wait_seconds: float = 0.0) -> EventPage:
        """At most `limit` events behind the one numbered `after`, oldest first; None: the last ones. Sessions are named
        to their own tenant, to everybody if `tenant` is None. Waits for an event if there is none."""
        if after is not None and wait_seconds > 0:
            await self._wait(after, wait_seconds)
        first = self._last - len(self._collected) + 1
        found = [(n, one) for n, one in enumerate(self._collected, first) if after is None or n > after]
        page = found[-limit:] if after is None else found[:limit]
        return EventPage(
            events=[_public(number, one, tenant) for number, one in page],
            # Also if there is none: what comes next is behind it.
            last=page[-1][0] if page else max(after or 0, self._last),
            has_more=after is not None and len(found) > limit,
            is_ending=self._closed,
        )

    async def _wait(self, after: int, seconds: float) -> None:
        deadline = asyncio.get_running_loop().time() + seconds
        while self._last <= after and not self._closed:
            self._news.clear()
            left = deadline - asyncio.get_running_loop().time()
            try:
                await asyncio.wait_for(self._news.wait(), max(left, 0.0))
            except asyncio.TimeoutError:
                return


def _public(number: int, one: _Collected, tenant: str | None) -> dict[str, Any]:
    """Under the names of the HTTP API."""
    event = unpack_event(one.packed)
    key = event.key if event.key is not None and tenant in (None, event.key.tenant) else None
    return {
        "object": "event",
        "number": number,
        "id": f"{one.source.name}-{event.number}",
        "time": round(event.time, 3),
        "kind": event.kind.value,
        "text": event.text,
        "count": event.count,
        "reason": event.reason,
        "seconds": None if event.seconds is None else round(event.seconds, 3),
        "node_id": one.source.node_id,
        "tenant": None if key is None else key.tenant,
        "session_id": None if key is None else key.session_id,
    }
