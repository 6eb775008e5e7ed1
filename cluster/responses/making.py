"""A node's responses as one replica sees them: made here, made by others, or over.

Owns: `ResponseMaker` (implements response_api.Responses): who waits for what, and what cancelling and deleting take
with them. Several replicas share a store. Knows nothing of SQLite, of turns' insides and of HTTP.
"""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass

from phi_cluster.cluster.errors import InvalidRequest, Overloaded, PhiError, Unavailable
from phi_cluster.cluster.messages import ProcessId
from phi_cluster.cluster.response_api import ItemPage, NewResponse, Page, Response
from phi_cluster.cluster.responses.reading import RunReading
from phi_cluster.cluster.responses.run import Run
from phi_cluster.cluster.responses.store import Begun, StillRunning
from phi_cluster.cluster.responses.workshop import Surroundings, Workshop


@dataclass(frozen=True)
class MakerLimits:
    """`retention`: seconds that a response is kept, and a conversation after its last use. `wait`: seconds that one
    waits for another of the same conversation. `max_background` run at once here, `max_queued` more may wait."""

    retention: float
    wait: float
    max_background: int
    max_queued: int


class ResponseMaker:
    """For one event loop."""

    def __init__(self, around: Surroundings, workshop: Workshop, limits: MakerLimits, process: ProcessId):
        self._around = around
        self._store = around.store
        self._thread = around.thread
        self._workshop = workshop
        self._limits = limits
        self._process = process

    async def create(self, new: NewResponse) -> RunReading:
        """See response_api.Responses.create."""
        most = self._limits.max_background + self._limits.max_queued
        if new.background and self._workshop.num_in_background >= most:
            raise Overloaded("too many responses are waiting in the background; try again", retry_after=5)
        run = self._workshop.make(await self._begin(new))
        reading = self._reading(run.response, run, ends_with_reader=not new.background)
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
        return self._reading(response, self._workshop.runs.get((tenant, response_id)))

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
        await self._around.forgetter.forget(tenant)

    async def input_items(self, tenant: str, response_id: str, page: Page) -> ItemPage:
        """See response_api.Responses.input_items."""
        return await self._thread.call(self._store.input_items, tenant, response_id, page)

    async def _begin(self, new: NewResponse) -> Begun:
        """Waits until what it follows is over. Raises StillRunning if that takes too long."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._limits.wait
        while True:
            claim = self._workshop.new_claim()
            now = float(self._around.tools.clock.time())
            work = self._thread.call(self._store.begin, new, now, self._process, claim)
            beginning = asyncio.ensure_future(work)
            try:
                return await asyncio.shield(beginning)
            except asyncio.CancelledError:
                # The client left: what is stored all the same must not seem to be made.
                self._workshop.spawn(self._drop(beginning, claim))
                raise
            except StillRunning:
                self._workshop.drop_claim(claim)
                if loop.time() > deadline:
                    raise
            except BaseException:
                self._workshop.drop_claim(claim)
                raise
            await asyncio.sleep(self._around.rhythm.look)

    async def _drop(self, beginning: asyncio.Future[Begun], claim: str) -> None:
        with contextlib.suppress(PhiError):
            begun = await beginning
            if begun.response.asked.store:
                await self._thread.call(self._store.drop, begun.response.asked.tenant, begun.response.id, claim)
        self._workshop.drop_claim(claim)

    async def _end(self, tenant: str, response_id: str) -> Response:
        """Has it ended, wherever it is made. Raises Unavailable if that takes too long."""
        await self._thread.call(self._store.wish_cancelled, tenant, response_id)
        run = self._workshop.runs.get((tenant, response_id))
        if run is not None:
            run.cancel()
        deadline = asyncio.get_running_loop().time() + self._limits.wait
        while not (response := await self.get(tenant, response_id)).is_over:
            if asyncio.get_running_loop().time() > deadline:
                raise Unavailable("the response does not end; try again", retry_after=2)
            await asyncio.sleep(self._around.rhythm.look)
        return response

    def _reading(self, response: Response, run: Run | None, *, ends_with_reader: bool = False) -> RunReading:
        tenant, response_id = response.asked.tenant, response.id

        async def find(after: int) -> Response:
            return await self._thread.call(self._store.find, tenant, response_id, after)

        return RunReading(response, run, find, self._around.rhythm.look, ends_with_reader=ends_with_reader)
