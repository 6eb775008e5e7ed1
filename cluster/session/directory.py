"""Where a session is: a replica's view of the sessions of its node, and through their keepers of other nodes'.

Owns: the way from a session's key to whoever holds it (an actor, called directly, or the keeper), following it when
it moves and when a holder dies. A turn is run with this node's keeper; what an administrator asks goes to the keeper
that has the session in memory. Implements what `turn` and the HTTP edge ask of sessions. Knows nothing of text, engines
or HTTP, and where a turn should be run.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import math
import uuid
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

from ray.exceptions import RayActorError, RayError, RayTaskError

from phi_cluster.cluster.errors import KeeperMoved, NotFound, PhiError, SessionExists, StaleEpoch, Unavailable
from phi_cluster.cluster.messages import (
    JOURNAL_BEGIN,
    AdmitTurn,
    BeginTurn,
    CommitTurn,
    Moved,
    ProcessId,
    SegmentRef,
    SessionKey,
    Stretch,
    TenantLimits,
    TurnGrant,
    TurnUsage,
)
from phi_cluster.cluster.processes import end_of
from phi_cluster.cluster.session.journal import Glance
from phi_cluster.cluster.session.keeper_finder import KeeperFinder
from phi_cluster.cluster.session.kept_turns import HeldBy
from phi_cluster.cluster.session.merged_pages import merged_page, survey_query
from phi_cluster.cluster.session.recycler import RecycleReason
from phi_cluster.cluster.session.session import SessionStats
from phi_cluster.cluster.session.spool import open_spooled
from phi_cluster.cluster.session.uploads import Uploads
from phi_cluster.cluster.session_api import Download, ImportLimits, SessionPage, SessionQuery
from phi_cluster.cluster.turn_api import Rates

_T = TypeVar("_T")

_REMEMBERED_HOLDERS = 4096
# A keeper that was killed is back in seconds, on a busy machine in tens of them.
_RETRIES = 300
_RETRY_SECONDS = 0.1
# So many hops are made at once; who needs more goes round in circles, because something is about to change.
_QUICK_HOPS = 3
# Another node's keeper that is being started again is asked again for so long (tenths of a second); then the session is
# looked after from its journal.
_PATIENCE = 30
# So often a keeper is told what a tenant may use: it may be another one by now.
_TELL_LIMITS_SECONDS = 30.0
# For an answer that came just before its sender died.
_LATE_SECONDS = 0.05


class JournalObserver(Protocol):
    """Measures what is told of journals. Times in seconds."""

    def on_begin(self, seconds: float) -> None:
        """A turn was begun in its journal."""
        ...

    def on_commit(self, seconds: float, nbytes: int) -> None:
        """So much was recorded of it."""
        ...


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


class SessionDirectory:
    """For one event loop. `keeper()` finds the keeper's handle (it may be a new one after a restart); `spool_folder`:
    see uploads.py; `end_of`: see processes.py. `others` None: this node is alone. `limits_of`: what tenants may use,
    where that is limited."""

    def __init__(
        self,
        keeper: KeeperFinder,
        spool_folder: Path,
        journals: JournalObserver | None = None,
        others: OtherNodes | None = None,
        limits_of: Callable[[str], TenantLimits] | None = None,
        end_of: Callable[[ProcessId], AbstractContextManager[asyncio.Future[None]]] = end_of,
    ):
        self._keeper = keeper
        self._journals = journals
        self._end_of = end_of
        self._uploads = Uploads(spool_folder)
        self._others = others
        self._limits_of = limits_of
        # By tenant: what this node's keeper was told, and when (the loop's seconds).
        self._limits_told: dict[str, tuple[TenantLimits, float]] = {}
        self._holders: OrderedDict[str, HeldBy] = OrderedDict()
        self._background: set[asyncio.Future[Any]] = set()
        # By session: the memory of its last turn is being settled with the keeper.
        self._settling: dict[str, asyncio.Future[None]] = {}
        # By session: a prompt is being copied into it, which must not be torn.
        self._laying: dict[str, asyncio.Future[int]] = {}

    # What a turn asks.

    async def begin_turn(self, request: BeginTurn) -> TurnGrant:
        """Raises SessionBusy, and Unavailable if no holder answers."""
        await self._tell_limits(request.key.tenant)
        begin = asyncio.ensure_future(self._call(request.key, "begin_turn", request))
        try:
            grant: TurnGrant = await asyncio.shield(begin)
        except asyncio.CancelledError:
            # The client left while it waited: a turn that begins all the same must not stay open.
            self._in_background(self._withdraw(request, begin))
            raise
        if self._journals is not None:
            for one in grant.stretches:
                if one.name == JOURNAL_BEGIN:
                    self._journals.on_begin(one.seconds)
        return grant

    async def reserve(self, key: SessionKey, num_tokens: int, num_shared_tokens: int = 0) -> None:
        """Raises Overloaded."""
        await self._ask_keeper("reserve", key, num_tokens, num_shared_tokens)

    async def settle_early(self, key: SessionKey) -> None:
        await self._ask_keeper("settle_early", key)

    async def commit(self, commit: CommitTurn) -> Stretch | None:
        """When it was recorded; None: it was already. Raises StaleEpoch and the journal's errors. The turn is over in
        any case."""
        try:
            stats = await self._call(commit.key, "commit", commit)
        except StaleEpoch:
            if commit.key.ephemeral:
                return None
            raise
        recorded = stats.recorded if isinstance(stats, SessionStats) else None
        if self._journals is not None and recorded is not None:
            self._journals.on_commit(recorded.seconds, len(commit.token_ids) + len(commit.text))
        await self._settle(commit.key, stats)
        return recorded

    async def lay_prompt(self, grant: TurnGrant, source: SegmentRef, num_tokens: int) -> None:
        """The turn's session, which is new, gets the first tokens of another one's memory, as far as they are to be
        had."""
        key = grant.key
        laying = self._in_background(self._call(key, "lay_prompt", key, grant.epoch, source, num_tokens))
        self._laying[key.digest] = laying
        laying.add_done_callback(lambda _: self._laying.pop(key.digest, None))
        with contextlib.suppress(Unavailable):
            await asyncio.shield(laying)

    async def abandon(self, key: SessionKey, epoch: int) -> None:
        if laying := self._laying.get(key.digest):
            await asyncio.wait((laying,))
        await self._settle(key, await self._call(key, "abandon", key, epoch))

    async def admit(self, ask: AdmitTurn) -> Rates:
        """Raises LimitReached."""
        if self._others is not None:
            ask = replace(ask, node_id=self._others.own_id)
        return await self._ask_head("admit", ask)

    async def charge(self, usage: TurnUsage) -> None:
        await self._ask_head("charge", usage)

    async def give_way(self, key: SessionKey) -> None:
        # What its turn held is settled before, not after the next one has leased.
        settling = self._settling.pop(key.digest, None)
        if settling is not None:
            await asyncio.wait((settling,))
        await self._ask_keeper("drop_cache", key)

    # What asks where a turn should be run.

    async def locate(self, key: SessionKey) -> Glance | None:
        """See forwarding.SessionsOfNodes."""
        return await self._ask_keeper("locate", key)

    async def move_here(self, key: SessionKey, source_node_id: str) -> bool:
        """See forwarding.SessionsOfNodes. Never raises: what cannot be had is computed."""
        try:
            return await self._ask_keeper("move_here", key, source_node_id)
        except (PhiError, RayError, AttributeError):
            # Also a keeper that cannot do it.
            return False

    # What an administrator asks.

    async def usage(self, tenant: str | None) -> list[dict[str, Any]]:
        """See turn_api.UsageBook."""
        book: list[dict[str, Any]] = await self._ask_head("usage", tenant)
        others = () if self._others is None else {self._others.own_id, *self._others.ids} - {self._others.head_id}
        for told in await asyncio.gather(*(self._ask_node(one, "usage", tenant) for one in others)):
            memory = {one["name"]: one["kv_cache_bytes"] for one in told or ()}
            for one in book:
                one["kv_cache_bytes"] += memory.get(one["name"], 0)
        return book

    async def browse(self, query: SessionQuery) -> SessionPage:
        if self._others is None or not self._others.ids:
            return await self._ask_keeper("browse", query)
        nodes = [self._others.own_id, *self._others.ids]
        asked = survey_query(query)
        # What only the journals know is the same everywhere.
        surveys = await asyncio.gather(
            *(self._ask_node(one, "survey", asked, one != self._others.own_id) for one in nodes)
        )
        page = merged_page(query, [(one, known) for one, known in zip(nodes, surveys, strict=True) if known])
        by_node: dict[str, list[SessionKey]] = {}
        for node_id, key in page.rows:
            by_node.setdefault(node_id, []).append(key)
        told = await asyncio.gather(*(self._ask_node(one, "described", keys) for one, keys in by_node.items()))
        found = {
            key.digest: one
            for keys, some in zip(by_node.values(), told, strict=True)
            for key, one in zip(keys, some or [None] * len(keys), strict=True)
        }
        # Those that were deleted meanwhile, or whose node has just gone, are told of no more.
        sessions = [one for _, key in page.rows if (one := found[key.digest]) is not None]
        return SessionPage(sessions, page.totals, page.has_more, page.last)

    async def get(self, tenant: str, session_id: str) -> dict[str, Any]:
        return await self._ask_holder("describe", SessionKey(tenant, session_id))

    async def delete(self, tenant: str, session_id: str) -> None:
        key = SessionKey(tenant, session_id)
        is_there = await self._is_there(key)
        try:
            await self._ask_holder("delete", key)
        except NotFound:
            # What is gone meanwhile has been deleted, perhaps by this very call, whose first answer was lost.
            if not is_there:
                raise

    async def clear(self, tenant: str, session_id: str) -> dict[str, Any]:
        return await self._ask_holder("clear", SessionKey(tenant, session_id))

    async def recycle(self, tenant: str, session_id: str) -> dict[str, Any]:
        return await self._ask_holder("recycle", SessionKey(tenant, session_id), RecycleReason.REQUESTED)

    async def hibernate(self, tenant: str, session_id: str) -> dict[str, Any]:
        return await self._ask_holder("hibernate", SessionKey(tenant, session_id))

    async def said(self, tenant: str, session_id: str) -> str:
        """What the conversation's text is (see Transcript.text)."""
        return await self._ask_holder("said", SessionKey(tenant, session_id))

    async def export(self, tenant: str, session_id: str, cache_up_to: int | None = None) -> Download:
        """Raises Unavailable too."""
        key = SessionKey(tenant, session_id)
        # A file with a cache is handed over on one node: what another one has in memory is fetched from there before.
        if cache_up_to is not None and (
            (seat := await self._seat_elsewhere(key)) is None or await self.move_here(key, seat)
        ):
            answer = await self._ask_keeper("export", key, cache_up_to)
        else:
            answer = await self._ask_holder("export", key)
        if isinstance(answer, bytes):
            return Download(io.BytesIO(answer), len(answer))
        try:
            return Download(open_spooled(answer), answer.nbytes)
        except OSError:
            raise Unavailable("the keeper has died with the exported session; try again", retry_after=1) from None
        finally:
            self._in_background(self._told_fetched(answer.token))

    async def import_session(
        self, tenant: str, new_session_id: str | None, data: AsyncIterator[bytes], limits: ImportLimits
    ) -> dict[str, Any]:
        """Raises Overloaded and StorageFull too."""
        new = SessionKey(tenant, new_session_id or uuid.uuid4().hex)
        async with self._uploads.received(data) as received:
            try:
                return await self._ask_keeper("import_session", new, received, limits)
            except SessionExists:
                if new_session_id is not None:
                    raise
                # Nobody else knows the name: the first answer was lost.
                return await self.get(tenant, new.session_id)

    async def fork(self, tenant: str, session_id: str, new_session_id: str | None, turn: int | None) -> dict[str, Any]:
        new = SessionKey(tenant, new_session_id or uuid.uuid4().hex)
        try:
            return await self._ask_holder("fork", SessionKey(tenant, session_id), new, turn)
        except SessionExists:
            if new_session_id is not None:
                raise
            # Nobody else knows the name: the first answer was lost.
            return await self.get(tenant, new.session_id)

    # Inside.

    async def _call(self, key: SessionKey, method: str, *arguments: Any) -> Any:
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
                    await self._ask_keeper("actor_died", key)
                elif attempt < _QUICK_HOPS:
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

    async def _ask_keeper(self, method: str, *arguments: Any) -> Any:
        for attempt in range(_RETRIES):
            try:
                return await _unwrapped(getattr(self._find_keeper(), method).remote(*arguments))
            except KeeperMoved:
                await self._on_keeper_moved(attempt)
            except RayActorError:
                await asyncio.sleep(_RETRY_SECONDS)
        raise Unavailable("the keeper of this node does not answer; try again", retry_after=2)

    async def _ask_holder(self, method: str, key: SessionKey, *arguments: Any) -> Any:
        """The keeper of the node where the session's memory is, if that is another one that lives; else this node's."""
        seat = await self._seat_elsewhere(key)
        for _ in range(_PATIENCE if seat is not None else 0):
            assert seat is not None
            assert self._others is not None
            if seat not in self._others.ids:
                break
            try:
                return await self._ask_other(seat, method, key, *arguments)
            except (ValueError, RayActorError):
                await asyncio.sleep(_RETRY_SECONDS)
        return await self._ask_keeper(method, key, *arguments)

    async def _ask_head(self, method: str, *arguments: Any) -> Any:
        """The keeper that keeps the accounts of all nodes."""
        others = self._others
        if others is None or others.head_id == others.own_id:
            return await self._ask_keeper(method, *arguments)
        for _ in range(_RETRIES):
            try:
                return await self._ask_other(others.head_id, method, *arguments)
            except (ValueError, RayActorError):
                await asyncio.sleep(_RETRY_SECONDS)
        raise Unavailable("the keeper of the accounts does not answer; try again", retry_after=2)

    async def _ask_node(self, node_id: str, method: str, *arguments: Any) -> Any:
        """That node's keeper; None if it is gone."""
        assert self._others is not None
        if node_id == self._others.own_id:
            return await self._ask_keeper(method, *arguments)
        try:
            return await self._ask_other(node_id, method, *arguments)
        except (ValueError, RayActorError):
            return None

    async def _ask_other(self, node_id: str, method: str, *arguments: Any) -> Any:
        """Another node's keeper, once. Raises ValueError and RayActorError if there is none, or none in charge."""
        assert self._others is not None
        try:
            return await _unwrapped(getattr(self._others.keeper(node_id), method).remote(*arguments))
        except KeeperMoved:
            self._others.moved(node_id)
            raise ValueError(f"node {node_id} is changing its keeper") from None

    async def _seat_elsewhere(self, key: SessionKey) -> str | None:
        """The other node, if one that lives, that began the session's last turn."""
        if self._others is None or not self._others.ids:
            return None
        seen: Glance | None = await self._ask_keeper("locate", key)
        return seen.seat if seen is not None and seen.seat in self._others.ids else None

    async def _is_there(self, key: SessionKey) -> bool:
        try:
            return await self._ask_keeper("locate", key) is not None
        except PhiError:
            # A journal that cannot be read can be deleted all the same.
            return True

    async def _tell_limits(self, tenant: str) -> None:
        """This node's keeper, where another one keeps the accounts: memory is its own to limit."""
        if self._limits_of is None or self._others is None or self._others.head_id == self._others.own_id:
            return
        limits, now = self._limits_of(tenant), asyncio.get_running_loop().time()
        told, at = self._limits_told.get(tenant, (None, -math.inf))
        if limits != told or now - at > _TELL_LIMITS_SECONDS:
            await self._ask_keeper("learn_limits", tenant, limits)
            self._limits_told[tenant] = limits, now

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

    async def _settle(self, key: SessionKey, stats: SessionStats | Moved) -> None:
        # The keeper settles what it holds itself. A turn under way is a later one, with a lease of its own.
        if isinstance(stats, SessionStats) and not stats.in_turn and key.digest in self._holders:
            settling = self._in_background(self._ask_keeper("settle", key, stats.kv_cache_bytes))
            self._settling[key.digest] = settling
            settling.add_done_callback(lambda _: self._settled(key.digest, settling))

    async def _told_fetched(self, token: bytes) -> None:
        # Else it waits a minute.
        with contextlib.suppress(PhiError, RayError):
            await self._ask_keeper("export_fetched", token)

    async def _withdraw(self, request: BeginTurn, begin: asyncio.Future[TurnGrant]) -> None:
        if not begin.done():
            # Whatever comes of it: if the turn begins all the same, it is ended.
            with contextlib.suppress(PhiError, RayError):
                await self._call(request.key, "withdraw", request.key, request.attempt)
        try:
            grant = await begin
        except (PhiError, RayError):
            return
        with contextlib.suppress(PhiError, RayError):
            await self.abandon(grant.key, grant.epoch)

    def _remember(self, digest: str, actor: HeldBy) -> None:
        self._holders[digest] = actor
        self._holders.move_to_end(digest)
        if len(self._holders) > _REMEMBERED_HOLDERS:
            self._holders.popitem(last=False)

    def _settled(self, digest: str, settling: asyncio.Future[None]) -> None:
        if self._settling.get(digest) is settling:
            del self._settling[digest]

    def _in_background(self, work: Awaitable[_T]) -> asyncio.Future[_T]:
        task = asyncio.ensure_future(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)
        return task


async def _unwrapped(call: Awaitable[Any]) -> Any:
    """Our own errors as they were raised, not as Ray wraps them."""
    try:
        return await call
    except RayTaskError as error:
        if isinstance(error.cause, PhiError):
            raise error.cause from None
        raise
