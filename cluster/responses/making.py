"""A node's responses as one replica sees them: made here, made by others, or over.

Owns: `ResponseMaker` (implements response_api.Responses): beginning, storing and ending responses, taking over those
whose process has died, and what deleting takes with it. Several replicas share a store. Knows nothing of SQLite, of
turns' insides and of HTTP.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import uuid
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, replace
from typing import Any

from phi_cluster.cluster.errors import InvalidRequest, Overloaded, PhiError, Unavailable
from phi_cluster.cluster.messages import ProcessId
from phi_cluster.cluster.response_api import ItemPage, NewResponse, Page, Response, ResponseFault
from phi_cluster.cluster.responses.forgetting import Forgetter
from phi_cluster.cluster.responses.reading import RunReading
from phi_cluster.cluster.responses.run import Run, Tools
from phi_cluster.cluster.responses.store import (
    Begun,
    Branch,
    Progress,
    ResponseStore,
    SessionKeeping,
    StillRunning,
    Unfinished,
)
from phi_cluster.cluster.responses.store_thread import StoreThread

logger = logging.getLogger(__name__)

_SAVE_SECONDS = 0.2
_TEND_SECONDS = 1.0
# In so many rounds of tending once: what is too old goes.
_ROUNDS_TO_EXPIRY = 60
_POLL_SECONDS = 0.1
# So often an end is written that the disk refuses.
_END_ATTEMPTS = 5


@dataclass(frozen=True)
class MakerLimits:
    """`retention`: seconds that a response is kept, and a conversation after its last use. `wait`: seconds that one
    waits for another of the same conversation. `max_background` run at once here, `max_queued` more may wait."""

    retention: float
    wait: float
    max_background: int
    max_queued: int


class ResponseMaker:
    """For one event loop. `start`, and `close` at the end."""

    def __init__(
        self,
        store: ResponseStore,
        tools: Tools,
        sessions: SessionKeeping,
        limits: MakerLimits,
        process: ProcessId,
        is_alive: Callable[[ProcessId], bool],
        thread: StoreThread,
        forgetter: Forgetter,
    ):
        self._store = store
        self._tools = tools
        self._sessions = sessions
        self._limits = limits
        self._process = process
        self._is_alive = is_alive
        self._thread = thread
        self._forgetter = forgetter
        self._runs: dict[tuple[str, str], Run] = {}
        # Of responses that are made here, also before there is a run.
        self._claims: set[str] = set()
        self._places = asyncio.Semaphore(limits.max_background)
        self._background: set[asyncio.Task[Any]] = set()
        self._loops: list[asyncio.Task[None]] = []
        self._is_closed = False

    def start(self) -> None:
        """From now on progress is saved, and what dead processes have left is gone on with."""
        loop = asyncio.get_running_loop()
        self._loops = [loop.create_task(self._save()), loop.create_task(self._tend())]

    async def close(self) -> None:
        """What is not over is left to whoever comes after."""
        self._is_closed = True
        for one in self._loops:
            one.cancel()
        runs = list(self._runs.values())
        for run in runs:
            run.give_up()
        await asyncio.gather(*self._loops, *self._background, return_exceptions=True)
        with contextlib.suppress(PhiError):
            await self._save_progress(runs)

    # What users ask.

    async def create(self, new: NewResponse) -> RunReading:
        """See response_api.Responses.create."""
        if new.background and sum(run.response.asked.background for run in self._runs.values()) >= (
            self._limits.max_background + self._limits.max_queued
        ):
            raise Overloaded("too many responses are waiting in the background; try again", retry_after=5)
        run = self._make(await self._begin(new))
        reading = RunReading(run.response, run, self._finder(*run.name), ends_with_reader=not new.background)
        if new.background:
            return reading
        try:
            while not (run.has_started or run.is_done):
                await run.changed()
        except BaseException:
            run.cancel()
            raise
        if run.error is not None and not run.response.is_over:
            raise run.error
        return reading

    async def get(self, tenant: str, response_id: str) -> Response:
        """See response_api.Responses.get."""
        return await self._thread.call(self._store.find, tenant, response_id)

    async def read(self, tenant: str, response_id: str) -> RunReading:
        """See response_api.Responses.read."""
        response = await self.get(tenant, response_id)
        return RunReading(response, self._runs.get((tenant, response_id)), self._finder(tenant, response_id))

    async def cancel(self, tenant: str, response_id: str) -> Response:
        """See response_api.Responses.cancel."""
        response = await self.get(tenant, response_id)
        if not response.asked.background:
            raise InvalidRequest(
                "only responses with background: true can be cancelled; to end this one, close its connection",
                param="response_id",
            )
        return response if response.is_over else await self._end(tenant, response_id)

    async def delete(self, tenant: str, response_id: str) -> None:
        """See response_api.Responses.delete."""
        if not (await self.get(tenant, response_id)).is_over:
            await self._end(tenant, response_id)
        await self._thread.call(self._store.delete, tenant, response_id)
        await self._forgetter.forget()

    async def input_items(self, tenant: str, response_id: str, page: Page) -> ItemPage:
        """See response_api.Responses.input_items."""
        return await self._thread.call(self._store.input_items, tenant, response_id, page)

    # Making.

    async def _begin(self, new: NewResponse) -> Begun:
        """Waits until what it follows is over. Raises StillRunning if that takes too long."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._limits.wait
        while True:
            claim = self._new_claim()
            now = float(self._tools.clock.time())
            work = self._thread.call(self._store.begin, new, now, self._process, claim)
            beginning = asyncio.ensure_future(work)
            try:
                return await asyncio.shield(beginning)
            except asyncio.CancelledError:
                # The client left: what is stored all the same must not seem to be made.
                self._spawn(self._drop(beginning, claim))
                raise
            except StillRunning:
                self._claims.discard(claim)
                if loop.time() > deadline:
                    raise
            except BaseException:
                self._claims.discard(claim)
                raise
            await asyncio.sleep(_POLL_SECONDS)

    async def _drop(self, beginning: asyncio.Future[Begun], claim: str) -> None:
        with contextlib.suppress(PhiError):
            begun = await beginning
            if begun.response.asked.store:
                await self._thread.call(self._store.drop, begun.response.asked.tenant, begun.response.id, claim)
        self._claims.discard(claim)

    def _make(self, begun: Begun, *, is_second: bool = False) -> Run:
        run = Run(self._tools, begun, is_second=is_second)
        self._runs[run.name] = run
        self._spawn(self._make_all(run, begun))
        return run

    async def _make_all(self, run: Run, begun: Begun) -> None:
        asked = run.response.asked
        try:
            if begun.branch is not None and asked.store:
                await self._branch(asked.tenant, begun.branch, begun.session_id)
            response = await (self._in_background(run) if asked.background else run.go())
            if run.is_given_up:
                run.end(None)
                return
            error = await self._store_end(run, response) if asked.store else None
            run.end(response if error is None else None, error)
        finally:
            self._runs.pop(run.name, None)
            self._claims.discard(run.claim)
            if not run.is_done:
                # Nobody expected it, or everything ends.
                run.give_up()
                run.tell()

    async def _in_background(self, run: Run) -> Response | None:
        """When there is a place for it, or when it is cancelled."""
        place = asyncio.ensure_future(self._places.acquire())
        leaving = asyncio.ensure_future(run.left.wait())
        try:
            await asyncio.wait({place, leaving}, return_when=asyncio.FIRST_COMPLETED)
            return await run.go()
        finally:
            leaving.cancel()
            if not place.cancel() and not place.cancelled():
                self._places.release()

    async def _branch(self, tenant: str, origin: Branch, session_id: str) -> None:
        try:
            await self._sessions.branch(tenant, origin, session_id)
        except PhiError as error:
            logger.info("a branch begins without its origin's memory: %s", type(error).__name__)

    async def _store_end(self, run: Run, response: Response | None) -> PhiError | None:
        """Returns why it could not be stored."""
        tenant, response_id = run.name
        error: PhiError | None = None
        for attempt in range(_END_ATTEMPTS):
            if attempt:
                await asyncio.sleep(_TEND_SECONDS)
            try:
                if response is None:
                    await self._thread.call(self._store.drop, tenant, response_id, run.claim)
                    await self._forgetter.forget()
                elif not await self._thread.call(self._store.end, response, run.claim):
                    run.is_given_up = True
                return None
            except Unavailable as unavailable:
                error = unavailable
            except PhiError as broken:
                return broken
        return error

    async def _end(self, tenant: str, response_id: str) -> Response:
        """Has it ended, wherever it is made. Raises Unavailable if that takes too long."""
        await self._thread.call(self._store.wish_cancelled, tenant, response_id)
        run = self._runs.get((tenant, response_id))
        if run is not None:
            run.cancel()
        deadline = asyncio.get_running_loop().time() + self._limits.wait
        while not (response := await self.get(tenant, response_id)).is_over:
            if asyncio.get_running_loop().time() > deadline:
                raise Unavailable("the response does not end; try again", retry_after=2)
            await asyncio.sleep(_POLL_SECONDS)
        return response

    # Tending.

    async def _save(self) -> None:
        while True:
            await asyncio.sleep(_SAVE_SECONDS)
            with contextlib.suppress(PhiError):
                # The disk is full, or busy: the next round will tell.
                await self._save_progress([run for run in self._runs.values() if not run.is_done])

    async def _save_progress(self, runs: list[Run]) -> None:
        """Of those in the background: others end with their process. Also finds out who is to end."""
        runs = [run for run in runs if run.response.asked.store]
        if not runs:
            return
        progress, counts = [], []
        for run in runs:
            fresh = tuple(run.pieces[run.num_saved :]) if run.response.asked.background else ()
            progress.append(Progress(*run.name, run.claim, run.has_started, run.num_saved, fresh))
            counts.append(run.num_saved + len(fresh))
        verdicts = await self._thread.call(self._store.save, progress)
        for run, count, verdict in zip(runs, counts, verdicts, strict=True):
            run.num_saved = count
            if run.is_done:
                continue
            if verdict == "to be cancelled":
                run.cancel()
            elif verdict == "lost" and run.name in self._runs:
                run.give_up()

    async def _tend(self) -> None:
        for round_number in range(2**62):
            try:
                for one in await self._thread.call(self._store.unfinished):
                    await self._take_over(one)
                if round_number % _ROUNDS_TO_EXPIRY == 0:
                    await self._thread.call(self._store.expire, self._tools.clock.time() - self._limits.retention)
                    await self._forgetter.forget()
            except PhiError as error:
                logger.warning("responses could not be tended: %s", error)
            await asyncio.sleep(_TEND_SECONDS)

    async def _take_over(self, one: Unfinished) -> None:
        """Goes on with a response whose process is dead, or that this one has lost; who waited for one in the
        foreground is gone with it."""
        if one.claim in self._claims if one.owner == self._process else self._is_alive(one.owner):
            return
        claim = self._new_claim()
        begun = await self._thread.call(self._store.take, one, self._process, claim)
        if begun is None:
            self._claims.discard(claim)
        elif begun.response.asked.background:
            self._make(begun, is_second=True)
        else:
            fault = ResponseFault("server_error", "the process that made this response has died")
            now = float(self._tools.clock.time())
            await self._thread.call(
                self._store.end, replace(begun.response, status="failed", fault=fault, ended_at=now), claim
            )
            self._claims.discard(claim)

    def _new_claim(self) -> str:
        claim = uuid.uuid4().hex
        self._claims.add(claim)
        return claim

    def _finder(self, tenant: str, response_id: str) -> Callable[[int], Awaitable[Response]]:
        return lambda after: self._thread.call(self._store.find, tenant, response_id, after)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)
