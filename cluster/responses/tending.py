"""What a replica does for responses all the time: saving what is said, seeing wishes, taking over, forgetting.

Owns: these loops. Knows nothing of how a response is made and of who asks for it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Iterable
from dataclasses import replace

from phi_cluster.cluster.errors import PhiError
from phi_cluster.cluster.messages import ProcessId
from phi_cluster.cluster.response_api import ResponseFault
from phi_cluster.cluster.responses.run import Run
from phi_cluster.cluster.responses.store import Progress, Unfinished
from phi_cluster.cluster.responses.workshop import Surroundings, Workshop

logger = logging.getLogger(__name__)


class Tender:
    """For one event loop. `start`, and `close` at the end."""

    def __init__(
        self,
        around: Surroundings,
        workshop: Workshop,
        retention: float,
        process: ProcessId,
        is_alive: Callable[[ProcessId], bool],
    ):
        """`retention` in seconds."""
        self._around = around
        self._workshop = workshop
        self._retention = retention
        self._process = process
        self._is_alive = is_alive
        self._loops: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """From now on progress is saved, and what dead processes have left is gone on with."""
        loop = asyncio.get_running_loop()
        self._loops = [loop.create_task(work) for work in (self._save(), self._take_over_all(), self._expire())]

    async def close(self) -> None:
        for one in self._loops:
            one.cancel()
        await asyncio.gather(*self._loops, return_exceptions=True)

    async def save(self, runs: Iterable[Run]) -> None:
        """What was said in those in the background (others end with their process); and finds out who is to end. Raises
        the store's errors."""
        runs = [run for run in runs if run.response.asked.store and not run.is_stored]
        if not runs:
            return
        progress, counts = [], []
        for run in runs:
            fresh = tuple(run.pieces[run.num_saved :]) if run.response.asked.background else ()
            progress.append(Progress(*run.name, run.claim, run.has_started, run.num_saved, fresh))
            counts.append(run.num_saved + len(fresh))
        verdicts = await self._around.thread.call(self._around.store.save, progress)
        for run, count, verdict in zip(runs, counts, verdicts, strict=True):
            run.num_saved = count
            if verdict == "to be cancelled":
                run.cancel()
            elif verdict == "lost" and not run.is_stored:
                run.give_up()

    async def _save(self) -> None:
        while True:
            await asyncio.sleep(self._around.rhythm.save)
            with contextlib.suppress(PhiError):
                # The disk is full, or busy: the next round will tell.
                await self.save(self._workshop.runs.values())

    async def _take_over_all(self) -> None:
        told = ""
        while True:
            try:
                for one in await self._around.thread.call(self._around.store.unfinished):
                    await self._take_over(one)
                told = ""
            except PhiError as error:
                # Once, not every second.
                if told != str(error):
                    told = str(error)
                    logger.warning("responses of dead processes could not be looked for: %s", told)
            await asyncio.sleep(self._around.rhythm.tend)

    async def _expire(self) -> None:
        """Apart from taking over: it may wait for turns to end."""
        around = self._around
        while True:
            is_more = False
            try:
                is_more = await around.thread.call(around.store.expire, around.tools.clock.time() - self._retention)
                await around.forgetter.forget()
            except PhiError as error:
                logger.warning("old responses could not be deleted: %s", error)
            await asyncio.sleep(around.rhythm.tend if is_more else around.rhythm.expire)

    async def _take_over(self, one: Unfinished) -> None:
        """Goes on with a response whose process is dead, or that this one has lost; who waited for one in the
        foreground is gone with it."""
        if one.owner == self._process:
            is_made = self._workshop.holds(one.claim)
        else:
            is_made = self._workshop.is_of_now(one.claim) and self._is_alive(one.owner)
        if is_made:
            return
        around = self._around
        claim = self._workshop.new_claim()
        begun = await around.thread.call(around.store.take, one, self._process, claim)
        if begun is None:
            self._workshop.drop_claim(claim)
        elif begun.response.asked.background:
            self._workshop.make(begun, is_second=True)
        else:
            fault = ResponseFault("server_error", "the process that made this response has died")
            ended_at = float(around.tools.clock.time())
            failed = replace(begun.response, status="failed", fault=fault, ended_at=ended_at)
            await around.thread.call(around.store.end, failed, claim)
            self._workshop.drop_claim(claim)
