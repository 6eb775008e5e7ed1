"""Reading a response while it is made, here or in another process.

Owns: following it, and what a reader's leaving does. Knows nothing of how it is made and of HTTP.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable

from phi_cluster.cluster.errors import PhiError
from phi_cluster.cluster.response_api import ReadingEvent, Response
from phi_cluster.cluster.responses.run import Run
from phi_cluster.cluster.turn_api import Rates


class RunReading:
    """Reads what is made, or was, in this process; elsewhere, or if it goes on there, what `find` finds (the response
    with its pieces from a number on) every `look_seconds`. Implements response_api.Reading."""

    def __init__(
        self,
        response: Response,
        run: Run | None,
        find: Callable[[int], Awaitable[Response]],
        look_seconds: float,
        *,
        ends_with_reader: bool = False,
    ):
        self.response = response
        self._run = run
        self._find = find
        self._look_seconds = look_seconds
        self._ends_with_reader = ends_with_reader

    @property
    def error(self) -> PhiError | None:
        """See response_api.Reading."""
        return None if self._run is None else self._run.error

    @property
    def rates(self) -> Rates | None:
        """See response_api.Reading."""
        return None if self._run is None else self._run.rates

    def leave(self) -> None:
        """See response_api.Reading."""
        if self._run is not None and self._ends_with_reader:
            self._run.cancel()

    async def events(self) -> AsyncGenerator[ReadingEvent, None]:
        """See response_api.Reading."""
        run = self._run
        num_read = 0
        while run is not None and not run.is_given_up:
            pieces = tuple(run.pieces[num_read:])
            if pieces:
                num_read += len(pieces)
                yield pieces
            elif not run.is_done:
                await run.changed()
            elif run.response.is_over:
                yield run.response
                return
            else:
                assert run.error is not None
                raise run.error
        while True:
            response = await self._find(num_read)
            if response.pieces:
                num_read += len(response.pieces)
                yield response.pieces
            if response.is_over:
                yield await self._find(0)
                return
            await asyncio.sleep(self._look_seconds)
