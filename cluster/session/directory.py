"""A replica's view of the sessions of its node, and through their keepers of other nodes'.

Owns: what is asked of whom: a turn is run with this node's keeper or the session's actor; what an administrator asks
goes to the keeper that has the session in memory. Implements what `turn` and the HTTP edge ask of sessions. Knows
nothing of text, engines or HTTP, how a session is found (keeper_calls.py), and where a turn should be run.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import math
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

from ray.exceptions import RayError

from phi_cluster.cluster.errors import NotFound, PhiError, SessionExists, StaleEpoch, Unavailable
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
from phi_cluster.cluster.session.keeper_calls import KeeperCalls, OtherNodes
from phi_cluster.cluster.session.keeper_finder import KeeperFinder
from phi_cluster.cluster.session.merged_pages import merged_page, survey_query
from phi_cluster.cluster.session.recycler import RecycleReason
from phi_cluster.cluster.session.session import SessionStats
from phi_cluster.cluster.session.spool import open_spooled
from phi_cluster.cluster.session.uploads import Uploads
from phi_cluster.cluster.session_api import Download, ImportLimits, SessionPage, SessionQuery
from phi_cluster.cluster.turn_api import Rates

_T = TypeVar("_T")

# So often a keeper is told what a tenant may use: it may be another one by now.
_TELL_LIMITS_SECONDS = 30.0


class JournalObserver(Protocol):
    """Measures what is told of journals. Times in seconds."""

    def on_begin(self, seconds: float) -> None:
        """A turn was begun in its journal."""
        ...

    def on_commit(self, seconds: float, nbytes: int) -> None:
        """So much was recorded of it."""
        ...


class SessionDirectory:
    """For one event loop. `keeper`, `others`, `end_of`: see keeper_calls.py; `spool_folder`: see uploads.py.
    `limits_of`: what tenants may use, where that is limited."""

    def __init__(
        self,
        keeper: KeeperFinder,
        spool_folder: Path,
        journals: JournalObserver | None = None,
        others: OtherNodes | None = None,
        limits_of: Callable[[str], TenantLimits] | None = None,
        end_of: Callable[[ProcessId], AbstractContextManager[asyncio.Future[None]]] = end_of,
    ):
        self._calls = KeeperCalls(keeper, others, end_of)
        self._journals = journals
        self._uploads = Uploads(spool_folder)
        self._others = others
        self._limits_of = limits_of
        # By tenant: what this node's keeper was told, and when (the loop's seconds).
        self._limits_told: dict[str, tuple[TenantLimits, float]] = {}
        self._background: set[asyncio.Future[Any]] = set()
        # By session: the memory of its last turn is being settled with the keeper.
        self._settling: dict[str, asyncio.Future[None]] = {}
        # By session: a prompt is being copied into it, which must not be torn.
        self._laying: dict[str, asyncio.Future[int]] = {}

    # What a turn asks.

    async def begin_turn(self, request: BeginTurn) -> TurnGrant:
        """Raises SessionBusy, and Unavailable if no holder answers."""
        await self._tell_limits(request.key.tenant)
        begin = asyncio.ensure_future(self._calls.session(request.key, "begin_turn", request))
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
        await self._calls.keeper("reserve", key, num_tokens, num_shared_tokens)

    async def settle_early(self, key: SessionKey) -> None:
        await self._calls.keeper("settle_early", key)

    async def commit(self, commit: CommitTurn) -> Stretch | None:
        """When it was recorded; None: it was already. Raises StaleEpoch and the journal's errors. The turn is over in
        any case."""
        try:
            stats = await self._calls.session(commit.key, "commit", commit)
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
        laying = self._in_background(self._calls.session(key, "lay_prompt", key, grant.epoch, source, num_tokens))
        self._laying[key.digest] = laying
        laying.add_done_callback(lambda _: self._laying.pop(key.digest, None))
        with contextlib.suppress(Unavailable):
            await asyncio.shield(laying)

    async def abandon(self, key: SessionKey, epoch: int) -> None:
        if laying := self._laying.get(key.digest):
            await asyncio.wait((laying,))
        await self._settle(key, await self._calls.session(key, "abandon", key, epoch))

    async def admit(self, ask: AdmitTurn) -> Rates:
        """Raises LimitReached."""
        if self._others is not None:
            ask = replace(ask, node_id=self._others.own_id)
        return await self._calls.head("admit", ask)

    async def charge(self, usage: TurnUsage) -> None:
        await self._calls.head("charge", usage)

    async def give_way(self, key: SessionKey) -> None:
        # What its turn held is settled before, not after the next one has leased.
        settling = self._settling.pop(key.digest, None)
        if settling is not None:
            await asyncio.wait((settling,))
        await self._calls.keeper("drop_cache", key)

    # What asks where a turn should be run.

    async def locate(self, key: SessionKey) -> Glance | None:
        """See forwarding.SessionsOfNodes."""
        return await self._calls.keeper("locate", key)

    async def move_here(self, key: SessionKey, source_node_id: str) -> bool:
        """See forwarding.SessionsOfNodes. Never raises: what cannot be had is computed."""
        try:
            return await self._calls.keeper("move_here", key, source_node_id)
        except (PhiError, RayError, AttributeError):
            # Also a keeper that cannot do it.
            return False

    # What an administrator asks.

    async def usage(self, tenant: str | None) -> list[dict[str, Any]]:
        """See turn_api.UsageBook."""
        book: list[dict[str, Any]] = await self._calls.head("usage", tenant)
        others = () if self._others is None else {self._others.own_id, *self._others.ids} - {self._others.head_id}
        for told in await asyncio.gather(*(self._calls.node(one, "usage", tenant) for one in others)):
            memory = {one["name"]: one["kv_cache_bytes"] for one in told or ()}
            for one in book:
                one["kv_cache_bytes"] += memory.get(one["name"], 0)
        return book

    async def browse(self, query: SessionQuery) -> SessionPage:
        if self._others is None or not self._others.ids:
            return await self._calls.keeper("browse", query)
        nodes = [self._others.own_id, *self._others.ids]
        asked = survey_query(query)
        # What only the journals know is the same everywhere.
        surveys = await asyncio.gather(
            *(self._calls.node(one, "survey", asked, one != self._others.own_id) for one in nodes)
        )
        page = merged_page(query, [(one, known) for one, known in zip(nodes, surveys, strict=True) if known])
        by_node: dict[str, list[SessionKey]] = {}
        for node_id, key in page.rows:
            by_node.setdefault(node_id, []).append(key)
        told = await asyncio.gather(*(self._calls.node(one, "described", keys) for one, keys in by_node.items()))
        found = {
            key.digest: one
            for keys, some in zip(by_node.values(), told, strict=True)
            for key, one in zip(keys, some or [None] * len(keys), strict=True)
        }
        # Those that were deleted meanwhile, or whose node has just gone, are told of no more.
        sessions = [one for _, key in page.rows if (one := found[key.digest]) is not None]
        return SessionPage(sessions, page.totals, page.has_more, page.last)

    async def get(self, tenant: str, session_id: str) -> dict[str, Any]:
        return await self._calls.holder("describe", SessionKey(tenant, session_id))

    async def delete(self, tenant: str, session_id: str) -> None:
        key = SessionKey(tenant, session_id)
        is_there = await self._is_there(key)
        try:
            await self._calls.holder("delete", key)
        except NotFound:
            # What is gone meanwhile has been deleted, perhaps by this very call, whose first answer was lost.
            if not is_there:
                raise
        self._calls.forget(key)

    async def clear(self, tenant: str, session_id: str) -> dict[str, Any]:
        return await self._calls.holder("clear", SessionKey(tenant, session_id))

    async def recycle(self, tenant: str, session_id: str) -> dict[str, Any]:
        return await self._calls.holder("recycle", SessionKey(tenant, session_id), RecycleReason.REQUESTED)

    async def hibernate(self, tenant: str, session_id: str) -> dict[str, Any]:
        return await self._calls.holder("hibernate", SessionKey(tenant, session_id))

    async def said(self, tenant: str, session_id: str) -> str:
        """What the conversation's text is (see Transcript.text)."""
        return await self._calls.holder("said", SessionKey(tenant, session_id))

    async def export(self, tenant: str, session_id: str, cache_up_to: int | None = None) -> Download:
        """Raises Unavailable too."""
        key = SessionKey(tenant, session_id)
        # A file with a cache is handed over on one node: what another one has in memory is fetched from there before.
        if cache_up_to is not None and (
            (seat := await self._calls.seat_elsewhere(key)) is None or await self.move_here(key, seat)
        ):
            answer = await self._calls.keeper("export", key, cache_up_to)
        else:
            answer = await self._calls.holder("export", key)
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
                return await self._calls.keeper("import_session", new, received, limits)
            except SessionExists:
                if new_session_id is not None:
                    raise
                # Nobody else knows the name: the first answer was lost.
                return await self.get(tenant, new.session_id)

    async def fork(self, tenant: str, session_id: str, new_session_id: str | None, turn: int | None) -> dict[str, Any]:
        new = SessionKey(tenant, new_session_id or uuid.uuid4().hex)
        try:
            return await self._calls.holder("fork", SessionKey(tenant, session_id), new, turn)
        except SessionExists:
            if new_session_id is not None:
                raise
            # Nobody else knows the name: the first answer was lost.
            return await self.get(tenant, new.session_id)

    # Inside.

    async def _is_there(self, key: SessionKey) -> bool:
        try:
            return await self.locate(key) is not None
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
            await self._calls.keeper("learn_limits", tenant, limits)
            self._limits_told[tenant] = limits, now

    async def _settle(self, key: SessionKey, stats: SessionStats | Moved) -> None:
        # The keeper settles what it holds itself. A turn under way is a later one, with a lease of its own.
        if isinstance(stats, SessionStats) and not stats.in_turn and self._calls.is_with_actor(key):
            settling = self._in_background(self._calls.keeper("settle", key, stats.kv_cache_bytes))
            self._settling[key.digest] = settling
            settling.add_done_callback(lambda _: self._settled(key.digest, settling))

    async def _told_fetched(self, token: bytes) -> None:
        # Else it waits a minute.
        with contextlib.suppress(PhiError, RayError):
            await self._calls.keeper("export_fetched", token)

    async def _withdraw(self, request: BeginTurn, begin: asyncio.Future[TurnGrant]) -> None:
        if not begin.done():
            # Whatever comes of it: if the turn begins all the same, it is ended.
            with contextlib.suppress(PhiError, RayError):
                await self._calls.session(request.key, "withdraw", request.key, request.attempt)
        try:
            grant = await begin
        except (PhiError, RayError):
            return
        with contextlib.suppress(PhiError, RayError):
            await self.abandon(grant.key, grant.epoch)

    def _settled(self, digest: str, settling: asyncio.Future[None]) -> None:
        if self._settling.get(digest) is settling:
            del self._settling[digest]

    def _in_background(self, work: Awaitable[_T]) -> asyncio.Future[_T]:
        task = asyncio.ensure_future(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)
        return task
