"""Whom a replica asks about a session: its actor, the keeper of this node, or another node's.

Owns: the way from a session's key to whoever holds it, following it when it moves and when a holder dies, and what is
remembered of it. Knows nothing of what is asked.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Collection
from contextlib import AbstractContextManager
from typing import Any, Protocol
from weakref import WeakValueDictionary

from ray.exceptions import RayActorError, RayTaskError

from phi_cluster.cluster.errors import KeeperMoved, PhiError, Unavailable
from phi_cluster.cluster.messages import Moved, ProcessId, SessionKey
from phi_cluster.cluster.session.journal import Glance
from phi_cluster.cluster.session.keeper_finder import KeeperFinder
from phi_cluster.cluster.session.kept_turns import HeldBy

_REMEMBERED_HOLDERS = 4096
# A keeper that was killed is back in seconds, on a busy machine in tens of them.
_RETRIES = 300
_RETRY_SECONDS = 0.1
# So many hops are made at once; who needs more goes round in circles, because something is about to change.
_QUICK_HOPS = 3
# Another node's keeper that is being started again is asked again for so long (tenths of a second); then the session is
# looked after from its journal.
_PATIENCE = 30
# For an answer that came just before its sender died.
_LATE_SECONDS = 0.05


class OtherNodes(Protocol):
    """The nodes beside this one, as far as they are known to live."""

    @property
    def own_id(self) -> str: ...

    @property
    def ids(self) -> Collection[str]:
        """Of the others."""
        ...

    @property
    def head_id(self) -> str:
        """Of the node that keeps the accounts, which may be this one."""
        ...

    def keeper(self, node_id: str) -> Any:
        """Raises ValueError if there is none (yet, or any more)."""
        ...

    def moved(self, node_id: str) -> None:
        """The keeper that was found last is not in charge."""
        ...

    def lost(self, node_id: str) -> None:
        """The keeper that was found last does not answer."""
        ...


class KeeperCalls:
    """For one event loop. `keeper()` finds the handle of this node's keeper (it may be a new one after a restart);
    `others` None: this node is alone; `end_of`: see processes.py."""

    def __init__(
        self,
        keeper: KeeperFinder,
        others: OtherNodes | None,
        end_of: Callable[[ProcessId], AbstractContextManager[asyncio.Future[None]]],
    ):
        self._keeper = keeper
        self._others = others
        self._end_of = end_of
        # By the session's digest.
        self._holders: OrderedDict[str, HeldBy] = OrderedDict()
        # By hash: one of each actor, for all its sessions. Each takes some 28 KB, and each answer brings another.
        self._handles: WeakValueDictionary[int, Any] = WeakValueDictionary()

    def is_with_actor(self, key: SessionKey) -> bool:
        """Whether an actor holds the session, as far as is known here."""
        return key.digest in self._holders

    def forget(self, key: SessionKey) -> None:
        """The session is gone."""
        self._holders.pop(key.digest, None)

    async def session(self, key: SessionKey, method: str, *arguments: Any) -> Any:
        """Calls whoever holds the session, and follows it. Not for calls that may not be repeated: a commit is
        idempotent, an epoch may be taken twice."""
        digest = key.digest
        for attempt in range(_RETRIES):
            if attempt >= _QUICK_HOPS:
                await asyncio.sleep(_RETRY_SECONDS)
            actor = self._holders.get(digest)
            try:
                if actor is not None:
                    answer = await self._ask_actor(actor, method, *arguments)
                else:
                    answer = await _unwrapped(getattr(self._find_keeper(), method).remote(*arguments))
            except KeeperMoved:
                await self._on_keeper_moved(attempt)
                continue
            except RayActorError:
                # The keeper is being restarted, or the actor died: the keeper knows where the session goes on.
                self._holders.pop(digest, None)
                if actor is not None:
                    await self.keeper("actor_died", key)
                else:
                    self._keeper.lost()
                    # The first time it may have been an old handle.
                    if 0 < attempt < _QUICK_HOPS:
                        await asyncio.sleep(_RETRY_SECONDS)
                continue
            if isinstance(answer, HeldBy):
                self._remember(digest, answer)
            elif isinstance(answer, Moved):
                if actor is None:
                    # Not even the keeper has it: an unnamed conversation that is gone.
                    return answer
                if self._holders.get(digest) is actor:
                    del self._holders[digest]
            else:
                return answer
        raise Unavailable("the session cannot be reached; try again", retry_after=2)

    async def keeper(self, method: str, *arguments: Any) -> Any:
        """This node's. Raises Unavailable."""
        for attempt in range(_RETRIES):
            try:
                return await _unwrapped(getattr(self._find_keeper(), method).remote(*arguments))
            except KeeperMoved:
                await self._on_keeper_moved(attempt)
            except RayActorError:
                self._keeper.lost()
                if attempt:
                    await asyncio.sleep(_RETRY_SECONDS)
        raise Unavailable("the keeper of this node does not answer; try again", retry_after=2)

    async def holder(self, method: str, key: SessionKey, *arguments: Any) -> Any:
        """The keeper of the node where the session's memory is, if that is another one that lives; else this node's."""
        seat = await self.seat_elsewhere(key)
        for _ in range(_PATIENCE if seat is not None else 0):
            assert seat is not None
            assert self._others is not None
            if seat not in self._others.ids:
                break
            try:
                return await self.other(seat, method, key, *arguments)
            except (ValueError, RayActorError):
                await asyncio.sleep(_RETRY_SECONDS)
        return await self.keeper(method, key, *arguments)

    async def head(self, method: str, *arguments: Any) -> Any:
        """The keeper that keeps the accounts of all nodes."""
        others = self._others
        if others is None or others.head_id == others.own_id:
            return await self.keeper(method, *arguments)
        for _ in range(_RETRIES):
            try:
                return await self.other(others.head_id, method, *arguments)
            except (ValueError, RayActorError):
                await asyncio.sleep(_RETRY_SECONDS)
        raise Unavailable("the keeper of the accounts does not answer; try again", retry_after=2)

    async def node(self, node_id: str, method: str, *arguments: Any) -> Any:
        """That node's keeper; None if it is gone."""
        assert self._others is not None
        if node_id == self._others.own_id:
            return await self.keeper(method, *arguments)
        try:
            return await self.other(node_id, method, *arguments)
        except (ValueError, RayActorError):
            return None

    async def other(self, node_id: str, method: str, *arguments: Any) -> Any:
        """Another node's keeper, once. Raises ValueError and RayActorError if there is none, or none in charge."""
        assert self._others is not None
        try:
            return await _unwrapped(getattr(self._others.keeper(node_id), method).remote(*arguments))
        except KeeperMoved:
            self._others.moved(node_id)
            raise ValueError(f"node {node_id} is changing its keeper") from None
        except RayActorError:
            self._others.lost(node_id)
            raise

    async def seat_elsewhere(self, key: SessionKey) -> str | None:
        """The other node, if one that lives, that began the session's last turn."""
        if self._others is None or not self._others.ids:
            return None
        seen: Glance | None = await self.keeper("locate", key)
        return seen.seat if seen is not None and seen.seat in self._others.ids else None

    async def _ask_actor(self, held: HeldBy, method: str, *arguments: Any) -> Any:
        """Raises RayActorError as soon as its process has ended: Ray, which restarts the actor, tells it only a second
        later."""
        answer = asyncio.ensure_future(_unwrapped(getattr(held.actor, method).remote(*arguments)))
        # Whoever asked may have gone.
        answer.add_done_callback(lambda late: late.cancelled() or late.exception())
        with self._end_of(held.process) as ended:
            await asyncio.wait({answer, ended}, return_when=asyncio.FIRST_COMPLETED)
            if not answer.done():
                # It may have been on the way.
                await asyncio.wait({answer}, timeout=_LATE_SECONDS)
        if answer.done():
            return answer.result()
        raise RayActorError(error_msg="the session's actor has died")

    async def _on_keeper_moved(self, attempt: int) -> None:
        self._keeper.moved()
        if attempt:
            # Neither is in charge yet.
            await asyncio.sleep(_RETRY_SECONDS)

    def _find_keeper(self) -> Any:
        """Raises RayActorError while there is none."""
        try:
            return self._keeper()
        except ValueError:
            raise RayActorError(error_msg="this node has no keeper (yet)") from None

    def _remember(self, digest: str, held: HeldBy) -> None:
        known = self._handles.get(hash(held.actor))
        if known is None or known != held.actor:
            known = self._handles[hash(held.actor)] = held.actor
        self._holders[digest] = HeldBy(known, held.process)
        self._holders.move_to_end(digest)
        if len(self._holders) > _REMEMBERED_HOLDERS:
            self._holders.popitem(last=False)


async def _unwrapped(call: Awaitable[Any]) -> Any:
    """Our own errors as they were raised, not as Ray wraps them."""
    try:
        return await call
    except RayTaskError as error:
        if isinstance(error.cause, PhiError):
            raise error.cause from None
        raise
