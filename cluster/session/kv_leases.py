"""Turns waiting for KV memory: the ledger says what there is, this lets them wait in order, for a bounded time.

Owns: the queue. Knows nothing of how room is made (injected) or of what the bytes hold.

Sessions that hold memory already come first: a reply that is growing ends and gives its memory back only if it can
grow, so it must not stand behind a newcomer who waits for that memory. If all turns that hold memory wait for more,
none of them would ever end: the one that came last gives way.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass

from phi_cluster.cluster.errors import GaveWay, Overloaded
from phi_cluster.cluster.session.ledger import Ledger


@dataclass(eq=False)
class _Waiter:
    digest: str
    nbytes: int
    grows: bool
    granted: asyncio.Future[None]


class KVLeases:
    """For one event loop. `make_room(nbytes)` gives back idle sessions' memory and returns whether it freed any."""

    def __init__(self, ledger: Ledger, make_room: Callable[[int], Awaitable[bool]], wait_seconds: float):
        self._ledger = ledger
        self._make_room = make_room
        self._wait_seconds = wait_seconds
        self._waiting: list[_Waiter] = []
        self._pressing: asyncio.Task[None] | None = None
        # Whose turn is under way: from a lease that was granted until it is settled.
        self._active: set[str] = set()
        # Whether a lease shrank since room was asked for.
        self._has_changed = False

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    async def reserve(self, digest: str, nbytes: int) -> None:
        """Leases memory for the session to hold `nbytes` in all. Raises Overloaded; GaveWay if its turn has been
        granted some, and others need that to go on or there was no more in time."""
        if nbytes > self._ledger.capacity:
            raise Overloaded(
                f"the turn may need {nbytes} bytes of KV cache and the server has {self._ledger.capacity} in all; "
                "shorten the conversation or lower max_tokens",
                retry_after=60,
            )
        waiter = _Waiter(digest, nbytes, self._ledger.lease(digest) > 0, asyncio.get_running_loop().create_future())
        # Behind those of its kind; those who grow stand before the others.
        place = sum(other.grows for other in self._waiting) if waiter.grows else len(self._waiting)
        self._waiting.insert(place, waiter)
        try:
            self._advance()
            if not waiter.granted.done():
                await asyncio.wait_for(waiter.granted, self._wait_seconds)
        except asyncio.TimeoutError:
            raise (GaveWay if digest in self._active else Overloaded)(
                "no KV memory became free in time; try again, end idle sessions or raise kv.budget", retry_after=5
            ) from None
        finally:
            if waiter in self._waiting:
                self._waiting.remove(waiter)
                self._advance()

    async def take(self, digest: str, nbytes: int) -> bool:
        """Leases memory for what can do without: at once or, if nobody waits for memory, once idle sessions have made
        room. False if there is none."""
        if self._waiting:
            return False
        if self._ledger.reserve(digest, nbytes):
            return True
        if nbytes > self._ledger.capacity or not await self._make_room(self._ledger.missing(digest, nbytes)):
            return False
        # Who began to wait meanwhile may have been given the room, or has a better right to it.
        self._grant()
        return not self._waiting and self._ledger.reserve(digest, nbytes)

    def settle(self, digest: str, nbytes: int) -> None:
        """The session's turn is over, it holds so many bytes."""
        self._has_changed = self._has_changed or nbytes < self._ledger.lease(digest)
        self._ledger.settle(digest, nbytes)
        self._active.discard(digest)
        self._advance()

    def leave(self) -> tuple[dict[str, int], set[str]]:
        """For a successor: all leases, and whose turn is under way."""
        return self._ledger.leases(), set(self._active)

    def inherit(self, leases: Mapping[str, int], in_turn: set[str]) -> None:
        """What a predecessor left."""
        for digest, nbytes in leases.items():
            self._ledger.settle(digest, nbytes)
        self._active |= in_turn

    def release(self, digest: str) -> None:
        """The session holds nothing any more. Its turn is over: what that one waits for stands in nobody's way."""
        for waiter in self._waiting:
            if waiter.digest == digest and not waiter.granted.done():
                waiter.granted.set_exception(GaveWay("the turn that asked for KV memory is over", retry_after=1))
        self._has_changed = self._ledger.release(digest) > 0 or self._has_changed
        self._active.discard(digest)
        self._advance()

    def _advance(self) -> None:
        """Something changed: grants in order, and has room made for the first who does not fit (a session whose turn
        is over may be an idle one now)."""
        self._grant()
        if self._waiting and self._pressing is None:
            self._pressing = asyncio.get_running_loop().create_task(self._press())

    def _grant(self) -> None:
        while self._waiting:
            first = self._waiting[0]
            if not first.granted.done() and not self._ledger.reserve(first.digest, first.nbytes):
                return
            del self._waiting[0]
            if not first.granted.done():
                self._active.add(first.digest)
                first.granted.set_result(None)

    def _break_standstill(self) -> None:
        """If all turns that hold memory wait for more, one of them is told to give way: the one that asked last, of
        those that hold much (who gave way before holds next to nothing), and never the first."""
        if not self._waiting or self._active - {waiter.digest for waiter in self._waiting}:
            return
        growing = [waiter for waiter in self._waiting if waiter.grows and not waiter.granted.done()]
        most = max((self._ledger.lease(waiter.digest) for waiter in growing), default=0)
        for waiter in reversed(growing):
            if waiter is not self._waiting[0] and 4 * self._ledger.lease(waiter.digest) >= most:
                waiter.granted.set_exception(
                    GaveWay("the conversation's memory is needed by others that began before it", retry_after=5)
                )
                return

    async def _press(self) -> None:
        """Has room made until nobody waits, or nothing is left to give back. One at a time: two would each make room
        for the same waiter."""
        try:
            while self._waiting:
                self._has_changed = False
                first = self._waiting[0]
                try:
                    freed = await self._make_room(self._ledger.missing(first.digest, first.nbytes))
                except Exception as error:
                    if not first.granted.done():
                        first.granted.set_exception(error)
                    freed = True
                self._grant()
                if not freed and not self._has_changed:
                    self._break_standstill()
                    return
        finally:
            self._pressing = None
