"""A keeper's time in charge of its node: it begins, ends with a successor, or did not come.

Owns: the start, with what is stored or with a predecessor's estate, and the renewal, make before break. Knows nothing
of what a keeper is asked; who may be in charge and what an estate is made of is succession.py's.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Awaitable, Callable
from typing import Protocol, TypeGuard

from ray.exceptions import RayError, RayTaskError

from phi_cluster.cluster.errors import KeeperMoved
from phi_cluster.cluster.events import EventKind
from phi_cluster.cluster.session.accounts import Accounts
from phi_cluster.cluster.session.custody import Custody
from phi_cluster.cluster.session.hibernation import Hibernation
from phi_cluster.cluster.session.succession import Charge, Door, Estate, bequeath, inherit

logger = logging.getLogger(__name__)

# For calls that are inside when the keeper is renewed; they are short, but for those that wait.
_DRAIN_SECONDS = 0.5
# A successor that is up takes over in a fraction of a second.
_SUCCEED_SECONDS = 20.0


class Successor(Protocol):
    """A keeper that is up and not in charge."""

    async def succeed(self, estate: Estate) -> int:
        """See `Tenure.succeed`."""
        ...

    def give_up(self) -> None:
        """It is not wanted after all: it ends."""
        ...


class Tenure:
    """Attributes: `door`, which all calls go through."""

    def __init__(
        self,
        custody: Custody,
        hibernation: Hibernation,
        accounts: Accounts,
        charge: Charge,
        make_successor: Callable[[], Awaitable[Successor]] | None,
        is_bound: Callable[[], bool],
        on_charge: Callable[[], None],
        end_process: Callable[[], Awaitable[None]],
    ):
        """`make_successor` None: there will be none. `is_bound`: whether something is under way that cannot change
        hands. `on_charge` is called when it begins. `end_process` ends this process, where nobody knows who is in
        charge: Ray starts another keeper in its place, if it is needed."""
        self._custody = custody
        self._hibernation = hibernation
        self._accounts = accounts
        self._charge = charge
        self._make_successor = make_successor
        self._is_bound = is_bound
        self._on_charge = on_charge
        self._end_process = end_process
        self._starting: asyncio.Task[None] | None = None
        # One that is up, until there is a moment for it.
        self._successor: Successor | None = None
        self._renewing = asyncio.Lock()
        self.door = Door()

    async def start(self) -> int:
        """Finds what is stored and what actors hold; then tends to the sessions. Idempotent; returns the pid. Raises
        KeeperMoved if another keeper is in charge."""
        if not _has_begun(self._starting):
            self._starting = asyncio.create_task(self._start(None))
        await asyncio.shield(self._starting)
        return os.getpid()

    async def succeed(self, estate: Estate) -> int:
        """Takes over from a keeper that has nobody inside. Raises KeeperMoved, with nothing taken; returns the pid."""
        if _has_begun(self._starting) or not self._charge.take():
            raise KeeperMoved("somebody else is in charge, or this keeper is already")
        self._starting = asyncio.create_task(self._start(estate))
        try:
            await asyncio.shield(self._starting)
        except BaseException:
            self._charge.give()
            raise
        return os.getpid()

    async def renew(self) -> bool:
        """Has a successor take over: calls that come meanwhile wait for a moment, and then are sent to it. False if
        that cannot be just now. A successor that fails leaves this keeper in charge; of one that does not answer nobody
        knows how far it came, and this process ends."""
        await self.start()
        if self._make_successor is None or self._renewing.locked() or self.door.is_left or self._is_bound():
            return False
        async with self._renewing:
            # It starts while all goes on here, and waits if it must.
            successor = self._successor = self._successor or await self._make_successor()
            if await self.door.shut(_DRAIN_SECONDS):
                estate = self._bequeath()
                if estate is not None:
                    self._successor = None
                    return await self._hand_on(successor, estate)
                self.door.open()
            return False

    async def _start(self, estate: Estate | None) -> None:
        if not self._charge.take():
            raise KeeperMoved("the sessions of this node have another keeper; try again", retry_after=1)
        if estate is None:
            await self._custody.start()
            await self._hibernation.start()
        else:
            inherit(self._custody, estate)
            self._accounts.inherit(estate.rest["accounts"])
            self._hibernation.inherit(estate.rest["hibernation"])
        self._custody.hands.start()
        self._custody.events.add(EventKind.KEEPER_STARTED)
        self._on_charge()

    def _bequeath(self) -> Estate | None:
        estate = bequeath(self._custody)
        if estate is not None:
            estate.rest.update(accounts=self._accounts.leave(), hibernation=self._hibernation.leave())
        return estate

    async def _hand_on(self, successor: Successor, estate: Estate) -> bool:
        self._charge.give()
        try:
            await asyncio.wait_for(successor.succeed(estate), _SUCCEED_SECONDS)
        except RayTaskError as error:
            logger.warning("the keeper was not renewed: %s", error.cause)
            successor.give_up()
            if not self._charge.take():
                await self._end_process()
            for handle, process in estate.warm:
                self._custody.hands.add_warm(handle, process)
            self._custody.hands.start()
            self.door.open()
            return False
        except (RayError, asyncio.TimeoutError) as error:
            logger.error("a successor did not answer: %s", type(error).__name__)
            await self._end_process()
        # What it holds stays open until the successor ends this process, for those who are about to open it.
        self.door.leave()
        return True


def _has_begun(starting: asyncio.Task[None] | None) -> TypeGuard[asyncio.Task[None]]:
    """Or is about to: a start that failed is none."""
    return starting is not None and (not starting.done() or starting.exception() is None)
