"""Turns that are refused for want of room, or because a key has used what it may: told as events.

Owns: noticing them, whoever refuses, at one place that every turn comes by. Knows nothing of why there was no room.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing

from phi_cluster.cluster.errors import LimitReached, Overloaded
from phi_cluster.cluster.events import EventKind, EventLog
from phi_cluster.cluster.messages import SessionKey
from phi_cluster.cluster.turn_api import TurnEvent, TurnRequest, TurnRunner


class RefusalsTold:
    """Runs turns as `turns` does (implements turn_api.TurnRunner)."""

    def __init__(self, turns: TurnRunner, events: EventLog):
        self._turns = turns
        self._events = events

    async def run(self, request: TurnRequest) -> AsyncGenerator[TurnEvent, None]:
        """See turn_api.TurnRunner.run."""
        try:
            async with aclosing(self._turns.run(request)) as events:
                async for event in events:
                    yield event
        except (Overloaded, LimitReached) as error:
            key = None if request.session_id is None else SessionKey(request.tenant, request.session_id)
            self._events.add(EventKind.TURN_REFUSED, key, reason=error.code)
            raise
