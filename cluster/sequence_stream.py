"""One sequence's outputs as its turn reads them, across the engines that have it.

Owns: what has come, what another engine needs to go on with it, and when no other may have it. Knows nothing of
sockets, of who sends frames, and of text.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Protocol

from phi_cluster.cluster.frames import AddSequence, SequenceOutput

# A sequence on which so many engines died at the same place, without a token in between, is failed: a third must not
# have it (promise C8). One that got on in between was there when others were killed; that ends, too.
MAX_DEATHS_IN_PLACE = 2
MAX_ENGINE_DEATHS = 8


class SequenceWatcher(Protocol):
    """Is told how one sequence fares."""

    def on_scheduled(self, queue_seconds: float) -> None:
        """It had waited for so long in this engine for its first step there."""
        ...

    def on_tokens(self) -> None:
        """It has tokens."""
        ...

    def on_preempted(self) -> None:
        """Its memory was taken from it for others."""
        ...

    def on_moved(self, *, died: bool) -> None:
        """Its engine is gone; `died`: not as it was told to."""
        ...


class SequenceStream:
    """One sequence's outputs, across engines. Iterating ends after `released`."""

    def __init__(self, add: AddSequence):
        self.add = add
        self.received: list[int] = []
        self.finish_reason: str | None = None
        self.released = False
        self.aborted = False
        # Whether more than one engine has had it.
        self.was_moved = False
        self.engine_deaths = 0
        self._deaths_in_place = 0
        self._outputs: asyncio.Queue[SequenceOutput] = asyncio.Queue()
        # Is told from here on.
        self.watcher: SequenceWatcher | None = None

    def push(self, output: SequenceOutput) -> None:
        self.received += output.token_ids
        if self.watcher is not None:
            if output.queue_seconds is not None:
                self.watcher.on_scheduled(output.queue_seconds)
            if output.token_ids:
                self.watcher.on_tokens()
        if output.token_ids:
            self._deaths_in_place = 0
        self.finish_reason = self.finish_reason or output.finish_reason
        self.released = self.released or output.released
        self._outputs.put_nowait(output)

    def outlive_engine(self, *, died: bool = True) -> None:
        """The engine that had it is gone; `died`: not as it was told to."""
        self.was_moved = True
        self.engine_deaths += died
        self._deaths_in_place += died
        if self.watcher is not None:
            self.watcher.on_moved(died=died)

    def preempted(self) -> None:
        """It lost its memory in the engine, and is computed again there."""
        if self.watcher is not None:
            self.watcher.on_preempted()

    @property
    def is_poisonous(self) -> bool:
        """Whether no other engine may have it."""
        return self._deaths_in_place >= MAX_DEATHS_IN_PLACE or self.engine_deaths >= MAX_ENGINE_DEATHS

    def remaining(self) -> AddSequence:
        """What another engine needs to go on: the reply so far is part of the ids."""
        return replace(self.add, token_ids=self.add.token_ids + self.received)

    async def __aiter__(self) -> AsyncIterator[SequenceOutput]:
        while True:
            output = await self._outputs.get()
            yield output
            if output.released:
                return
