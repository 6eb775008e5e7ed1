"""Several event streams read as one, each event as soon as it comes.

Owns: a task for each stream, and that all of them have ended, by themselves or closed, when the reader has. Knows
nothing of what the events are.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from types import TracebackType
from typing import Generic, TypeVar

E = TypeVar("E")


class Merged(Generic[E]):
    """An async context: leaving it closes what has not ended. Nothing is dropped, nothing waits for the reader."""

    def __init__(self) -> None:
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._said: asyncio.Queue[tuple[int, E | None, Exception | None]] = asyncio.Queue()
        self._num_open = 0

    async def __aenter__(self) -> Merged[E]:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for task in self._tasks.values():
            task.cancel()
        if self._tasks:
            # Not gather: a second cancellation from outside must not disturb how the streams put themselves away.
            await asyncio.wait(self._tasks.values())

    def add(self, name: int, events: AsyncGenerator[E, None]) -> None:
        """One more stream, also while others are read."""
        self._num_open += 1
        self._tasks[name] = asyncio.ensure_future(self._run(name, events))

    async def read(self) -> AsyncGenerator[tuple[int, E], None]:
        """All events with their streams' names, until all streams have ended. Raises what the first that fails
        raises."""
        while self._num_open:
            name, event, error = await self._said.get()
            if error is not None:
                raise error
            if event is None:
                self._num_open -= 1
            else:
                yield name, event

    async def _run(self, name: int, events: AsyncGenerator[E, None]) -> None:
        failure: Exception | None = None
        try:
            async with aclosing(events):
                async for event in events:
                    self._said.put_nowait((name, event, None))
        except Exception as error:
            failure = error
        self._said.put_nowait((name, None, failure))
