"""The responses that are being made in this process: from their beginning in the store to their end there.

Owns: the runs and their claims, how many in the background run at once, and that every end is stored. Knows nothing of
why a response is made here (asked for, or taken over), of who reads it and of HTTP.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import uuid
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any

from phi_cluster.cluster.errors import PhiError, Unavailable
from phi_cluster.cluster.response_api import Response
from phi_cluster.cluster.responses.forgetting import Forgetter
from phi_cluster.cluster.responses.run import Run, Tools
from phi_cluster.cluster.responses.store import Begun, Branch, ResponseStore, SessionKeeping
from phi_cluster.cluster.responses.store_thread import StoreThread

logger = logging.getLogger(__name__)

# So often an end is written that the disk refuses.
_END_ATTEMPTS = 5


@dataclass(frozen=True)
class Rhythm:
    """Seconds: how often progress is saved and wishes are seen, how often responses of dead processes are looked for,
    how often what is too old is, how often what others do is looked at while somebody waits for it, and for how long a
    branch waits for its origin's memory."""

    save: float = 0.2
    tend: float = 1.0
    expire: float = 60.0
    look: float = 0.1
    branch: float = 2.0


@dataclass(frozen=True)
class Surroundings:
    """What all parts of this room use."""

    store: ResponseStore
    thread: StoreThread
    tools: Tools
    sessions: SessionKeeping
    forgetter: Forgetter
    rhythm: Rhythm


class Workshop:
    """For one event loop. `runs` by tenant and id."""

    def __init__(self, around: Surroundings, max_background: int, era: str):
        """`max_background` run at once. `era`: claims of another one are nobody's, whatever processes there are."""
        self._around = around
        self._era = era
        self._places = asyncio.Semaphore(max_background)
        # Of responses that are made here, also before there is a run.
        self._claims: set[str] = set()
        self._tasks: set[asyncio.Task[Any]] = set()
        self.runs: dict[tuple[str, str], Run] = {}

    @property
    def num_in_background(self) -> int:
        """Responses in the background that are not over, running or not."""
        return sum(run.response.asked.background for run in self.runs.values())

    def new_claim(self) -> str:
        """For a response that is about to be made here; then `make` or `drop_claim`."""
        claim = f"{self._era}/{uuid.uuid4().hex}"
        self._claims.add(claim)
        return claim

    def holds(self, claim: str) -> bool:
        """Whether what is owned under this claim is being made here."""
        return claim in self._claims

    def is_of_now(self, claim: str) -> bool:
        """Whether whoever made this claim may live."""
        return claim.startswith(f"{self._era}/")

    def drop_claim(self, claim: str) -> None:
        self._claims.discard(claim)

    def make(self, begun: Begun, *, is_second: bool = False) -> Run:
        """Makes a response; `is_second`: what another process began. Its end is stored."""
        run = Run(self._around.tools, begun, is_second=is_second)
        self.runs[run.name] = run
        self.spawn(self._make(run, begun))
        return run

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Something to be done that nobody waits for; `close` does."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def close(self) -> list[Run]:
        """Nothing is made here any more. Returns what is not over; whoever comes after may go on with it."""
        left = list(self.runs.values())
        for run in left:
            run.give_up()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        return left

    async def _make(self, run: Run, begun: Begun) -> None:
        asked = run.response.asked
        try:
            if begun.branch is not None and asked.store:
                await self._branch(asked.tenant, begun.branch, begun.session_id)
            response = await (self._in_background(run) if asked.background else run.go())
            if run.is_given_up:
                return
            run.is_stored = True
            error = await self._store_end(run, response) if asked.store else None
            run.end(response if error is None else None, error)
            if response is None and asked.store:
                # The session that was to be is nobody's. Whoever asked has been told by now.
                with contextlib.suppress(PhiError):
                    await self._around.forgetter.forget(asked.tenant)
        finally:
            self.runs.pop(run.name, None)
            self._claims.discard(run.claim)
            if not run.is_done:
                # Others go on with it, or nobody expected this.
                run.give_up()
                run.end(None)

    async def _in_background(self, run: Run) -> Response | None:
        """When there is a place for it, or when it is cancelled."""
        place = asyncio.ensure_future(self._places.acquire())
        leaving = asyncio.ensure_future(run.left.wait())
        try:
            await asyncio.wait({place, leaving}, return_when=asyncio.FIRST_COMPLETED)
            return await run.go()
        finally:
            leaving.cancel()
            if place.done():
                self._places.release()
            else:
                place.cancel()

    async def _branch(self, tenant: str, origin: Branch, session_id: str) -> None:
        """Where the origin is in a turn, computing what was said is quicker than waiting for it."""
        branching = self._around.sessions.branch(tenant, origin, session_id)
        try:
            await asyncio.wait_for(branching, self._around.rhythm.branch)
        except (PhiError, asyncio.TimeoutError) as error:
            logger.info("a branch begins without its origin's memory: %s", type(error).__name__)

    async def _store_end(self, run: Run, response: Response | None) -> PhiError | None:
        """Returns why it could not be stored."""
        around, (tenant, response_id) = self._around, run.name
        error: PhiError | None = None
        for attempt in range(_END_ATTEMPTS):
            if attempt:
                await asyncio.sleep(around.rhythm.tend)
            try:
                if response is None:
                    await around.thread.call(around.store.drop, tenant, response_id, run.claim)
                elif not await around.thread.call(around.store.end, response, run.claim):
                    run.is_given_up = True
                return None
            except Unavailable as unavailable:
                error = unavailable
            except PhiError as broken:
                return broken
        return error
