"""Looks at a server again and again: whether it says that it is ready, and which of its processes have gone.

Owns: the looking. Knows nothing of why a process went, and of what /ready ought to say.
"""

from __future__ import annotations

import asyncio
import time

from tests.chaos.history import Death, History, Ready
from tests.chaos.streams import Address, ask
from tests.chaos.victims import Census, Victim

_PERIOD_SECONDS = 0.5
# Whose deaths are of interest; idle workers of Ray's come and go.
_WATCHED = {"engine", "replica", "keeper", "controller", "weight store", "Serve controller", "proxy", "fallback proxy"}


class Watcher:
    """Runs until it is cancelled."""

    def __init__(self, address: Address, census: Census, history: History):
        self._address = address
        self._census = census
        self._history = history
        self._known: dict[int, Victim] = {}

    async def run(self) -> None:
        await asyncio.gather(self._watch_ready(), self._watch_processes())

    async def _watch_ready(self) -> None:
        while True:
            answer = await ask(self._address, "GET", "/ready", timeout=3.0)
            self._history.ready.append(Ready(time.monotonic(), answer.status))
            await asyncio.sleep(_PERIOD_SECONDS)

    async def _watch_processes(self) -> None:
        while True:
            now = {one.pid: one for one in await asyncio.to_thread(self._census.take) if one.role in _WATCHED}
            for pid, victim in self._known.items():
                if pid not in now or now[pid].process != victim.process:
                    self._history.deaths.append(Death(time.monotonic(), victim.role, pid))
            self._known = now
            await asyncio.sleep(_PERIOD_SECONDS)
