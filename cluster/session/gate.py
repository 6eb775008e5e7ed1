"""One at a time, first come first served, with a bounded wait: the order of the turns of one session.

Owns: the queue. Knows nothing of turns, epochs or segments. For one asyncio event loop; not for threads.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from enum import Enum, auto


class Entry(Enum):
    """How waiting at the gate ended."""

    ENTERED = auto()
    CLOSED = auto()
    WITHDRAWN = auto()


class GateTimeout(Exception):
    """The gate was not free in time, or too many wait already."""


class Gate:
    """Held by at most one; `release` hands it to the one who has waited longest.

    `reap` is called by those who wait, on arrival and every `poll_seconds`: it may find that the holder is
    dead and then calls `release` for it.
    """

    def __init__(self, reap: Callable[[], None], *, poll_seconds: float = 0.05, max_waiting: int = 64):
        self._reap = reap
        self._poll_seconds = poll_seconds
        self._max_waiting = max_waiting
        self._held = False
        self._closed = False
        self._waiting: deque[tuple[str, asyncio.Future[Entry]]] = deque()

    @property
    def held(self) -> bool:
        return self._held

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def hold(self) -> None:
        """Enter without waiting, where nobody can have come yet."""
        assert not self._held
        self._held = True

    async def enter(self, name: str, wait_seconds: float, *, first: bool = False) -> Entry:
        """Wait for the gate (`first`: before all others who wait). Whoever gets ENTERED must `release`.

        Raises GateTimeout after `wait_seconds`, or at once if too many wait. If it raises, a cancellation
        included, the gate is not held by the caller.
        """
        if self._closed:
            return Entry.CLOSED
        self._reap()
        if not self._held and not self._waiting:
            self._held = True
            return Entry.ENTERED
        if len(self._waiting) >= self._max_waiting:
            raise GateTimeout
        loop = asyncio.get_running_loop()
        deadline = loop.time() + wait_seconds
        future: asyncio.Future[Entry] = loop.create_future()
        waiter = (name, future)
        if first:
            self._waiting.appendleft(waiter)
        else:
            self._waiting.append(waiter)
        try:
            while not future.done():
                remaining = deadline - loop.time()
                if remaining <= 0:
                    raise GateTimeout
                await asyncio.wait((future,), timeout=min(remaining, self._poll_seconds))
                if not future.done():
                    self._reap()
        except BaseException:
            if not future.done():
                self._waiting.remove(waiter)
            elif future.result() is Entry.ENTERED:
                # The gate came in the moment in which the caller was cancelled: pass it on.
                self.release()
            raise
        return future.result()

    def release(self) -> None:
        """The holder is done."""
        if self._waiting and not self._closed:
            self._waiting.popleft()[1].set_result(Entry.ENTERED)
        else:
            self._held = False

    def withdraw(self, name: str) -> bool:
        """Whoever waits under this name stops waiting. False if nobody does."""
        for waiter in self._waiting:
            if waiter[0] == name:
                self._waiting.remove(waiter)
                waiter[1].set_result(Entry.WITHDRAWN)
                return True
        return False

    def close(self) -> None:
        """For good: all who wait, and all who come later, get CLOSED."""
        self._closed = True
        while self._waiting:
            self._waiting.popleft()[1].set_result(Entry.CLOSED)
