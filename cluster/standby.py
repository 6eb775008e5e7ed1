"""Engines that are up and connected and wait for the death of the one that serves.

Owns: how many there are: they are started one at a time while nothing is wrong, watched while they wait, and replaced.
Knows nothing of sequences, or of what starts an engine (it is injected).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence

from phi_cluster.cluster.engine_link import EngineLink
from phi_cluster.cluster.events import EventKind, EventLog

logger = logging.getLogger(__name__)

# Before each start. The first of it is for the streams that have just gone on elsewhere.
_PAUSES = (1.0, 2.0, 5.0, 10.0, 30.0)
# A start that is under way when an engine is needed is waited for so long.
_JOIN_SECONDS = 10.0


class StandbyEngines:
    """`wanted` engines that stand by, from `fill` on. For one event loop.

    Attributes: `losses`, how many were lost while they stood by, by how.
    """

    def __init__(
        self,
        wanted: int,
        start: Callable[[], Awaitable[EngineLink]],
        *,
        may_begin: asyncio.Event | None = None,
        events: EventLog | None = None,
        pauses: Sequence[float] = _PAUSES,
        join_seconds: float = _JOIN_SECONDS,
    ):
        """`start` brings up and connects one engine. Nothing is started before `may_begin` is set. `pauses`: before a
        start, by the number of starts that failed before it, in seconds."""
        self._wanted = wanted
        self._start = start
        self._may_begin = may_begin
        self._events = EventLog(time.time) if events is None else events
        self._pauses = pauses
        self._join_seconds = join_seconds
        self._waiting: dict[EngineLink, asyncio.Task[None]] = {}
        self._starting: asyncio.Task[bool] | None = None
        self._keeping: asyncio.Task[None] | None = None
        # Whether it is time for starts: not while the replica has no engine at all.
        self._quiet = asyncio.Event()
        self._short = asyncio.Event()
        self.losses: Counter[str] = Counter()

    @property
    def pids(self) -> list[int]:
        """Of those that could take over now."""
        return [link.engine.process.pid for link in self._waiting if not link.is_lost]

    def fill(self) -> None:
        """An engine serves: time to start what is missing."""
        self._quiet.set()
        if self._keeping is None and self._wanted:
            self._keeping = asyncio.get_running_loop().create_task(self._keep_full())

    async def take(self) -> EngineLink | None:
        """One that can take over now, or very soon; None if there is none. No other is started until `fill`."""
        self._quiet.clear()
        if not self._waiting and self._starting is not None:
            # What it has done already need not be done again, and nobody else computes now.
            await asyncio.wait({self._starting}, timeout=self._join_seconds)
        return self._pick()

    async def make(self) -> EngineLink:
        """One for a change that is planned, so that it may take a while: also where none stands by. Raises whatever
        goes wrong with its start."""
        return self._pick() or await self._start()

    def _pick(self) -> EngineLink | None:
        link = next((link for link in self._waiting if not link.is_lost), None)
        if link is not None:
            self._waiting.pop(link).cancel()
            self._short.set()
        return link

    async def close(self) -> None:
        """Ends them all, also one that is being started."""
        tasks = [task for task in (self._keeping, self._starting, *self._waiting.values()) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for link in self._waiting:
            await link.end()
        self._waiting.clear()

    async def _keep_full(self) -> None:
        if self._may_begin is not None:
            await self._may_begin.wait()
        failures = 0
        while True:
            while len(self._waiting) >= self._wanted:
                self._short.clear()
                await self._short.wait()
            await self._quiet.wait()
            await asyncio.sleep(self._pauses[min(failures, len(self._pauses) - 1)])
            if not self._quiet.is_set():
                continue
            self._starting = asyncio.get_running_loop().create_task(self._start_one())
            try:
                failures = 0 if await asyncio.shield(self._starting) else failures + 1
            finally:
                if self._starting.done():
                    self._starting = None

    async def _start_one(self) -> bool:
        """Whether there is one more."""
        try:
            link = await self._start()
        except Exception as error:
            logger.warning("a standby engine did not start: %s", error)
            return False
        self._waiting[link] = asyncio.get_running_loop().create_task(self._attend(link))
        return True

    async def _attend(self, link: EngineLink) -> None:
        """Until it is lost and ended, or taken (then this is cancelled)."""
        how = await link.lost()
        self.losses[how] += 1
        self._events.add(EventKind.STANDBY_ENGINE_DIED, reason=how)
        logger.warning("a standby engine was lost (%s) and is replaced", how)
        await link.end()
        del self._waiting[link]
        self._short.set()
