"""When something that goes wrong is seen: in a metric, by its alert, in the events.

Owns: looking at a server and its Prometheus several times a second, and the moments at which something changed there.
Knows nothing of how things go wrong: faults are given.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import httpx

from tests.prometheus import Prometheus

_STATES = {"inactive": "is resolved", "pending": "is pending", "firing": "fires"}


@dataclass(frozen=True)
class Fault:
    """Something that goes wrong when `happens` is called. `expression` is what is looked at, and moves once it is above
    `moves_at`; `events` are the kinds that are told. `ends` puts an end to it; None: the alert is not waited for then.
    `name` is for files."""

    name: str
    what: str
    alert: str
    expression: str
    moves_at: float
    events: tuple[str, ...]
    happens: Callable[[], Awaitable[None]]
    ends: Callable[[], Awaitable[None]] | None = None


@dataclass
class Timeline:
    """What was seen of one fault; seconds since it began."""

    fault: str
    alert: str
    moments: list[tuple[float, str]] = field(default_factory=list)

    def add(self, at: float, what: str) -> None:
        self.moments.append((round(at, 1), what))

    @property
    def has_fired(self) -> bool:
        return any(what == f"{self.alert} fires" for _, what in self.moments)

    def __str__(self) -> str:
        return "\n".join([f"{self.fault}:", *(f"  {at:7.1f} s  {what}" for at, what in self.moments)])


class Watcher:
    """Of one server. `photograph` is called when a fault's alert fires, before the fault ends."""

    def __init__(self, client: httpx.AsyncClient, prometheus: Prometheus, photograph: Callable[[str], Awaitable[None]]):
        self._client = client
        self._prometheus = prometheus
        self._photograph = photograph

    async def watch(self, fault: Fault, patience: float) -> Timeline:
        """Until the alert is resolved (where that is waited for), or patience is at its end. Raises what the fault
        raises."""
        timeline = Timeline(fault.what, fault.alert)
        state, has_moved = "inactive", False
        last = (await self._events(None))["last"]
        began, began_at = time.monotonic(), time.time()
        happening = asyncio.ensure_future(fault.happens())
        ending: asyncio.Future[None] | None = None
        while time.monotonic() - began < patience:
            value, now_state = await self._value(fault.expression), await self._state(fault.alert)
            page = await self._events(last)
            at, last = time.monotonic() - began, page["last"]
            if not has_moved and value > fault.moves_at:
                has_moved = True
                timeline.add(at, f"{fault.expression} is {value:.3g}")
            for event in page["data"]:
                if event["kind"] in fault.events:
                    # Its own time, not when we looked.
                    timeline.add(event["time"] - began_at, f"event: {event['text']}")
            if now_state != state:
                timeline.add(at, f"{fault.alert} {_STATES[now_state]}")
                state = now_state
            if happening.done():
                happening.result()
                if state == "firing" and ending is None:
                    ending = asyncio.ensure_future(self._end(fault))
            if ending is not None and (state == "inactive" or fault.ends is None):
                break
            await asyncio.sleep(0.2)
        await happening
        if ending is not None:
            await ending
        timeline.moments.sort(key=lambda moment: moment[0])
        return timeline

    async def _end(self, fault: Fault) -> None:
        await self._photograph(fault.name)
        if fault.ends is not None:
            await fault.ends()

    async def _value(self, expression: str) -> float:
        found = await asyncio.to_thread(self._prometheus.query, expression)
        return max((value for _, value in found), default=0.0)

    async def _state(self, alert: str) -> str:
        alerts = (await asyncio.to_thread(self._prometheus.get, "/alerts"))["alerts"]
        states = {one["state"] for one in alerts if one["labels"]["alertname"] == alert}
        return "firing" if "firing" in states else "pending" if "pending" in states else "inactive"

    async def _events(self, after: int | None) -> Any:
        asked = {"limit": 100} | ({} if after is None else {"after": after})
        return (await self._client.get("/v1/events", params=asked)).raise_for_status().json()
